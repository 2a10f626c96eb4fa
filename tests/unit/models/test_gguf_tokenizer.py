"""Texts become the ids that a GGUF file's model was trained with, or the file is refused; and conversions have a
version."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf import GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spdbench.errors import InputError
from spdbench.models.checkpoints import find_model as finding
from spdbench.models.checkpoints import gguf_file
from spdbench.models.checkpoints.find_model import find_model
from spdbench.models.checkpoints.gguf_file import PRE_TOKENIZERS, read_gguf
from spdbench.models.hf import library
from tests.unit.models.gguf_files import TOKENS, vocabulary_gguf, write_gguf

pytestmark = pytest.mark.usefixtures("own_cache")


def ids_of(file: Path, text: str) -> list[str]:
    """The tokens of `text`, where every byte is a token, and so are some pairs of bytes."""
    tokenizer = library.load_tokenizer(find_model(str(file)).directory)
    return [tokenizer.convert_ids_to_tokens(token) for token in tokenizer.encode(text, add_special_tokens=False)]


BYTES = bytes_to_unicode()
PAIRS = ("  ", "\n\n", "12", "a1", "1 ", "!!", ".a", "ab", "'s")


def byte_level(*, pre: str | None = None, more: Callable[[GGUFWriter], object] = lambda _: None) -> Any:
    """A tokenizer with a token for each byte, and one for each of `PAIRS`, in the keys of a GGUF file."""
    spelled = ["".join(BYTES[byte] for byte in pair.encode()) for pair in PAIRS]

    def about(writer: GGUFWriter) -> None:
        keys = writer.kv_data[0]
        tokens = [*TOKENS[:3], *BYTES.values(), *spelled]
        keys["tokenizer.ggml.tokens"].value = tokens
        keys["tokenizer.ggml.token_type"].value = [3] * 3 + [1] * (len(tokens) - 3)
        keys["tokenizer.ggml.merges"].value = [" ".join(pair) for pair in spelled]
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        more(writer)

    return about


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a  12\n\n1 !!", ["a", " ", " ", "12", "\n", "\n", "1", " ", "!!"]),
        ("smollm", "a  12\n\n1 !!", ["a", "  ", "1", "2", "\n\n", "1", " ", "!!"]),
        ("starcoder", "ab12", ["ab", "1", "2"]),
        ("llama-bpe", "a  12\n\n1 !!", ["a", " ", " ", "12", "\n\n", "1", " ", "!!"]),
        ("qwen2", "a  12\n\n1 !!", ["a", " ", " ", "1", "2", "\n\n", "1", " ", "!!"]),
        ("glm4", ".a", [".a"]),
        ("gpt-2", ".a", [".", "a"]),
        ("tekken", "12", ["1", "2"]),
        ("gpt-4o", "b's12", ["b", "'s", "12"]),
        ("default", "a1!!", ["a", "1", "!!"]),
        ("default", "1234", ["12", "3", "4"]),
        (None, "1234", ["12", "3", "4"]),
        ("falcon", "1212", ["12", "1", "2"]),
        ("bloom", "ab 12", ["ab", " ", "12"]),
        ("viking", "ab12", ["ab", "1", "2"]),
    ],
)
def test_texts_are_cut_as_the_file_says(tmp_path: Path, pre: str | None, text: str, pieces: list[str]) -> None:
    file = vocabulary_gguf(tmp_path / "cut.gguf", byte_level(pre=pre))
    assert ids_of(file, text) == ["".join(BYTES[byte] for byte in piece.encode()) for piece in pieces]


def test_every_name_of_a_pre_tokenizer_makes_a_tokenizer_that_keeps_all_of_a_text(tmp_path: Path) -> None:
    text = "It's 1234  años,\n\n\tnot ABCdef’s\u3000日本語, 5.5%!\n"
    base = vocabulary_gguf(tmp_path / "base.gguf", byte_level())
    tokenizer = library.load_tokenizer(find_model(str(base)).directory)
    for name in PRE_TOKENIZERS:
        header = replace(read_gguf(base), tokenizer={"model": "gpt2", "pre": name})
        header.set_pre_tokenizer(tokenizer)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_pre_tokenizer_that_is_unknown_is_refused_by_name(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "new.gguf", about=lambda writer: writer.add_tokenizer_pre("gpt-9"))
    with pytest.raises(InputError, match=r"ggml\.pre is 'gpt-9', and how .* Known: .*smollm.* hub id instead"):
        find_model(str(file))


def test_a_file_that_names_no_pre_tokenizer_is_said_to_be_so_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = write_gguf(tmp_path / "named.gguf", about=lambda writer: writer.add_tokenizer_pre("gpt-2"))
    find_model(str(named))
    assert "tokenizer.ggml.pre" not in capsys.readouterr().err
    file = write_gguf(tmp_path / "silent.gguf")
    for _ in range(2):
        folder = find_model(str(file)).directory
        assert "silent.gguf does not say how its tokenizer cuts texts" in capsys.readouterr().err
    find_model(str(folder))
    assert "silent.gguf does not say" in capsys.readouterr().err


def test_a_piece_that_is_a_token_stays_whole_where_the_tokenizer_does_so(tmp_path: Path) -> None:
    """No merge leads to it; and texts begin with BOS, unless the file says otherwise."""

    def about(writer: GGUFWriter) -> None:
        keys = writer.kv_data[0]
        keys["tokenizer.ggml.tokens"].value = [*TOKENS, "bc"]
        keys["tokenizer.ggml.token_type"].value = [3] * 3 + [1] * 28
        keys["tokenizer.ggml.merges"].value = ["b c"]
        writer.add_bos_token_id(1)

    for pre, expected in (("llama-bpe", [1, 29]), ("qwen2", [3, 4])):

        def named(writer: GGUFWriter, pre: str = pre) -> None:
            about(writer)
            writer.add_tokenizer_pre(pre)

        file = vocabulary_gguf(tmp_path / f"{pre}.gguf", named)
        assert library.load_tokenizer(find_model(str(file)).directory).encode("ab") == expected


def test_text_gets_no_space_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a"]

    def about(writer: GGUFWriter) -> None:
        keys = writer.kv_data[0]
        del keys["tokenizer.ggml.merges"]
        keys["tokenizer.ggml.model"].value = "llama"
        keys["tokenizer.ggml.tokens"].value = tokens
        keys["tokenizer.ggml.token_type"].value = [2, 3, 3, 1, 1, 1, 1, 1]
        writer.add_token_scores([0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -1.0, -2.0])

    for is_added, expected in ((None, ["\u2581", "ab"]), (True, ["\u2581", "ab"]), (False, ["ab"])):

        def flagged(writer: GGUFWriter, is_added: bool | None = is_added) -> None:
            about(writer)
            if is_added is not None:
                writer.add_add_space_prefix(is_added)

        file = vocabulary_gguf(tmp_path / f"{is_added}.gguf", flagged)
        assert ids_of(file, "ab") == expected
        tokenizer = library.load_tokenizer(find_model(str(file)).directory)
        assert tokenizer.decode(tokenizer.encode("ab a", add_special_tokens=False)) == "ab a"


def test_a_token_that_is_there_twice_is_named(tmp_path: Path) -> None:
    def about(writer: GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.tokens"].value = [*TOKENS[:20], "c", *TOKENS[21:]]

    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens has 'c' more than once"):
        find_model(str(write_gguf(tmp_path / "twice.gguf", about=about)))


CONVERTED_BY: dict[ModuleType, tuple[str, ...]] = {
    library: ("convert_gguf", "_factors_as_llama3", "_refuse_other_tensors"),
    finding: ("_write_source_note",),
    gguf_file: (),
}
"""The functions of each module that decide what a conversion writes; none: all of the module."""


def _code(module: ModuleType, names: tuple[str, ...]) -> str:
    """The lines of code, without comments, blank lines and docstrings, so that words may change."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    tree = ast.parse(source)
    nodes = [node for node in tree.body if not names or getattr(node, "name", None) in names]
    words = {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    numbers = [number for node in nodes for number in range(node.lineno, (node.end_lineno or 0) + 1)]
    kept = [lines[number - 1].partition("  # ")[0].strip() for number in numbers if number not in words]
    return "\n".join(line for line in kept if line and not line.startswith("#"))


def test_conversions_have_another_version_when_their_code_changes() -> None:
    """Folders that an earlier version converted stay in the cache, and are used as long as the version is the same."""
    digest = hashlib.sha256("\n".join(_code(*each) for each in CONVERTED_BY.items()).encode()).hexdigest()[:16]
    assert (finding.CONVERSION, digest) == (5, "c7db1dcfc15db0e3"), (
        "the code that converts GGUF files has changed: raise CONVERSION if it writes other files than before, and "
        "put both numbers here"
    )
