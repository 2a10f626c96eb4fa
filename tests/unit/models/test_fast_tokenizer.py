"""Tokenizers and chat templates without transformers: the same ids and texts as with it, for every kind of tokenizer
that a model may come with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer, WordPieceTrainer

from spdbench.models.checkpoints import facts_cache
from spdbench.models.checkpoints.fast_tokenizer import FastTokenizer, TokenizerFacts
from spdbench.models.hf import library
from tests import tiny

TEXTS = (
    "Hello, world!",
    "  two  spaces and\ttabs\n\nnew lines  ",
    "Grüße, 你好, नमस्ते, 🙂🏽 e\u0301",
    "def f(x):\n    return x ** 2  # 1234567 3.14",
    "<s>in</s> a text <|im_start|>user\nx<|im_end|> <tool> </think>",
    "it's can't we'll I'M",
    "",
    " ",
    "\u2063 \x00 \ufeff a",
)
CORPUS = [*TEXTS[:6], "the quick brown fox jumps over the lazy dog", "spam and eggs and spam"] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(**options: Any) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(CORPUS, BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))
    return found


def split_first() -> Tokenizer:
    """As in Llama 3 and Qwen: a regular expression cuts the text before bytes are looked at."""
    found = byte_level()
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    found.normalizer = normalizers.NFC()
    return found


def sentencepiece(**options: Any) -> Tokenizer:
    """As in Llama 2: spaces become a letter, and bytes stand for letters without a token."""
    found = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    found.train_from_iterator(CORPUS, BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_]))
    return found


def unigram() -> Tokenizer:
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    found.train_from_iterator(CORPUS, UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"))
    return found


def word_piece() -> Tokenizer:
    found = Tokenizer(models.WordPiece(unk_token="<unk>"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.train_from_iterator(CORPUS, WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return found


def word_level() -> Tokenizer:
    found = Tokenizer(models.WordLevel(unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.train_from_iterator(CORPUS, WordLevelTrainer(special_tokens=SPECIAL))
    return found


def around(make: Callable[[], Tokenizer], template: str) -> Callable[[], Tokenizer]:
    """With special tokens put around every text."""

    def made() -> Tokenizer:
        found = make()
        used = [(token, found.token_to_id(token)) for token in ("<s>", "</s>") if token in template.split()]
        found.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
        return found

    return made


def with_added(make: Callable[[], Tokenizer]) -> Callable[[], Tokenizer]:
    """With added tokens that are no special ones, or take the spaces next to them."""

    def made() -> Tokenizer:
        found = make()
        found.add_tokens(["<tool>", AddedToken("</think>", lstrip=True, rstrip=True, normalized=False)])
        found.add_tokens([AddedToken("world", single_word=True), "  "])
        found.add_special_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
        return found

    return made


def cut_and_padded() -> Tokenizer:
    """Limits that are saved with a tokenizer, and which transformers lifts."""
    found = byte_level()
    found.enable_truncation(4)
    found.enable_padding(length=12)
    return found


TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "byte level": (byte_level, {}),
    "byte level, space first": (lambda: byte_level(add_prefix_space=True), {}),
    "byte level, no regular expression": (lambda: byte_level(use_regex=False), {}),
    "byte level, bos": (around(byte_level, "<s> $A"), {}),
    "byte level, bos and eos": (around(byte_level, "<s> $A </s>"), {}),
    "byte level, bos by setting": (byte_level, {"add_bos_token": True}),
    "byte level, eos by setting": (byte_level, {"add_eos_token": True, "add_bos_token": False}),
    "byte level, added tokens": (with_added(byte_level), {}),
    "byte level, special tokens split": (byte_level, {"split_special_tokens": True}),
    "byte level, extra special tokens": (byte_level, {"extra_special_tokens": ["<image>", "<tool>"]}),
    "byte level, spaces cleaned": (byte_level, {"clean_up_tokenization_spaces": True}),
    "byte level, cut and padded": (cut_and_padded, {}),
    "GPT-2": (byte_level, {"tokenizer_class": "GPT2Tokenizer"}),
    "Qwen 2": (split_first, {"tokenizer_class": "Qwen2Tokenizer"}),
    "Llama 3": (around(split_first, "<s> $A"), {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "Llama by class": (split_first, {"tokenizer_class": "LlamaTokenizerFast"}),
    "Llama 2": (sentencepiece, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "Llama 2, no space first": (lambda: sentencepiece(prepend_scheme="never"), {"tokenizer_class": "LlamaTokenizer"}),
    "sentencepiece": (sentencepiece, {}),
    "sentencepiece, first": (lambda: sentencepiece(prepend_scheme="first"), {}),
    "sentencepiece, added tokens": (with_added(sentencepiece), {}),
    "Gemma": (sentencepiece, {"tokenizer_class": "GemmaTokenizer"}),
    "unigram": (unigram, {}),
    "unigram, added tokens": (with_added(unigram), {}),
    "word pieces": (word_piece, {}),
    "word pieces, cleaned": (around(word_piece, "<s> $A </s>"), {"clean_up_tokenization_spaces": True}),
    "words": (word_level, {}),
}
TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <s> there \n"},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": "Grüße & <b>'tags'</b>"},
)
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "names of tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "blocks on lines": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m.content }}]\n    {% endif %}\n{% endfor %}\n"
    ),
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}",
    "control of loops": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": (
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['b']) }}",
    "tools": "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ nothing is defined }}",
    "variables": "{{ date_string }}{{ enable_thinking }}{{ messages[0].content }}",
}


def save(folder: Path, name: str) -> Path:
    """A model folder with a tokenizer, as its authors publish it."""
    make, settings = TOKENIZERS[name]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    make().save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATES["chatml"]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def facts_of(folder: Path) -> TokenizerFacts:
    found = library.tokenizer_facts(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FastTokenizer]:
    """transformers' tokenizer and ours, of one folder."""
    folder = save(tmp_path_factory.mktemp("tokenizer") / "model", "byte level, added tokens")
    return library.load_tokenizer(folder), FastTokenizer(facts_of(folder))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "model", name)
    theirs, ours = library.load_tokenizer(folder), FastTokenizer(facts_of(folder))
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == list(ids)
            for skip in (True, False):
                shown = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == shown
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert list(ours.all_special_ids) == list(theirs.all_special_ids)
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    added = theirs.added_tokens_decoder
    assert {k: (v.content, v.special) for k, v in ours.added_tokens_decoder.items()} == {
        k: (v.content, v.special) for k, v in added.items()
    }
    assert [ours.convert_ids_to_tokens(i) for i in range(300)] == [theirs.convert_ids_to_tokens(i) for i in range(300)]


def applied(tokenizer: Any, template: str, **options: Any) -> Any:
    talk = [dict(message) for message in TALK]
    return tokenizer.apply_chat_template(talk, chat_template=template, return_dict=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_what_they_give_in_transformers(both: tuple[Any, FastTokenizer], name: str) -> None:
    theirs, ours = both
    cases: tuple[Mapping[str, Any], ...] = (
        {},
        {"tokenize": False},
        {"add_generation_prompt": True},
        {"tokenize": False, "date_string": "01 Jan 2025", "enable_thinking": False, "bos_token": "other"},
    )
    for options in cases:
        assert applied(ours, TEMPLATES[name], **options) == applied(theirs, TEMPLATES[name], **options)


@pytest.mark.parametrize("template", ["chatml", "names of tokens"])
def test_a_message_is_continued_as_in_transformers(both: tuple[Any, FastTokenizer], template: str) -> None:
    theirs, ours = both
    options: dict[str, Any] = {"tokenize": False, "continue_final_message": True}
    assert applied(ours, TEMPLATES[template], **options) == applied(theirs, TEMPLATES[template], **options)


@pytest.mark.parametrize("tokenizer", [0, 1], ids=["theirs", "ours"])
@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('no such role') }}", TemplateError),
        ("{% for %}", TemplateError),
        ("{{ messages.append(1) }}", SecurityError),
        ("{{ ''.__class__.__mro__ }}", SecurityError),
        ("{{ dict.__class__ }}{{ dict.__class__.x }}", TemplateError),
        ("{% set n = namespace(__class__=1) %}", SecurityError),
        ("{% set n = namespace() %}{% set n._x = 1 %}", SecurityError),
        ("{{ messages[9].content.x }}", TemplateError),
        ("{{ 1 / 0 }}", ZeroDivisionError),
    ],
)
def test_a_template_that_may_not_do_what_it_does(
    both: tuple[Any, FastTokenizer], template: str, error: type[Exception], tokenizer: int
) -> None:
    with pytest.raises(error):
        applied(both[tokenizer], template)


@pytest.mark.parametrize("tokenizer", [0, 1], ids=["theirs", "ours"])
@pytest.mark.parametrize(
    ("messages", "template"),
    [((), "x"), (TALK, "{{ content }}"), (TALK, "{{ messages[0].content }}"), (TALK, "{{ messages | tojson }}")],
)
def test_what_cannot_be_continued(
    both: tuple[Any, FastTokenizer], messages: tuple[Any, ...], template: str, tokenizer: int
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        both[tokenizer].apply_chat_template(
            list(messages), chat_template=template, tokenize=False, continue_final_message=True
        )


def test_a_tokenizer_with_parts_in_python_is_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", "byte level")
    loaded = library.load_tokenizer(folder)
    monkeypatch.setattr(library, "load_tokenizer", lambda _: loaded)
    assert library.tokenizer_facts(folder) is not None

    class Upper(type(loaded)):  # type: ignore[misc]
        def _decode(self, *words: Any, **options: Any) -> str:
            return str(super()._decode(*words, **options)).upper()

    loaded.__class__ = Upper
    assert library.tokenizer_facts(folder) is None


def test_a_target_has_the_same_tokenizer_from_the_cache(
    tiny_model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_cache, "optional_cache_folder", lambda: own_cache)
    first, second = (tiny.load(tiny_model).tokenizer for _ in range(2))
    assert isinstance(first, FastTokenizer)
    assert isinstance(second, FastTokenizer)
    assert first._facts == second._facts
    assert len(list(own_cache.rglob("*.tokenizer.json"))) == 1
