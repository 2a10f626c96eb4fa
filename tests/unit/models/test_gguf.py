"""GGUF files: all of a file is used in the conversion, known to be harmless, or refused by name."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from spdbench.errors import InputError
from spdbench.models.checkpoints.find_model import ModelFiles, find_model
from spdbench.models.checkpoints.gguf_file import read_gguf
from spdbench.models.hf import library
from spdbench.models.target import Target, load_target
from tests.unit.models.gguf_files import HEAD_DIM, KV_HEADS, TOKENS, WIDTH, write_gguf

pytestmark = pytest.mark.usefixtures("own_cache")


def convert(file: Path) -> Target:
    return load_target(str(file), "float32", "cpu")


def raw_config(files: ModelFiles) -> dict[str, Any]:
    return dict(json.loads((files.directory / "config.json").read_text()))


def test_a_whole_file_is_converted_and_its_end_of_text_ends_answers(tmp_path: Path) -> None:
    target = convert(write_gguf(tmp_path / "whole.gguf"))
    assert target.config.eos_ids == {0}
    assert target.own_decoder.config.num_layers == 3
    assert raw_config(target.files)["tie_word_embeddings"] is True


def test_the_umask_decides_who_may_read_a_converted_model(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    folder = convert(write_gguf(tmp_path / "whole.gguf")).files.directory
    assert folder.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_every_token_that_ends_a_turn_ends_answers(tmp_path: Path) -> None:
    def about(writer: GGUFWriter) -> None:
        writer.add_eot_token_id(1)
        writer.add_eom_token_id(2)

    assert convert(write_gguf(tmp_path / "turns.gguf", about=about)).config.eos_ids == {0, 1, 2}


@pytest.mark.parametrize(
    ("texts", "kind", "expected"),
    [
        (("<|eot_id|>", "b"), 3, {0, 3}),
        (("<|end|>", "<|eom_id|>"), 4, {0, 3, 4}),
        (("<|eot_id|>", "b"), 1, {0}),  # plain text that looks like one
        (("<|end|>", "<|return|>", "<|call|>"), 3, {0, 4, 5}),  # such models end channels with <|end|>
    ],
)
def test_a_control_token_with_a_known_text_ends_answers_though_no_key_names_it(
    tmp_path: Path, texts: tuple[str, ...], kind: int, expected: set[int]
) -> None:
    def about(writer: GGUFWriter) -> None:
        keys = writer.kv_data[0]
        keys["tokenizer.ggml.tokens"].value = [*TOKENS[:3], *texts, *TOKENS[3 + len(texts) :]]
        keys["tokenizer.ggml.token_type"].value = [3] * 3 + [kind] * len(texts) + [1] * (27 - len(texts))

    assert set(read_gguf(write_gguf(tmp_path / "named.gguf", about=about)).end_ids) == expected


def test_layers_beyond_the_count_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "more.gguf", extra={"blk.3.attn_norm.weight": [1.0] * WIDTH})
    with pytest.raises(InputError, match=r"1 tensors have no place .* e\.g\. blk\.3\.attn_norm\.weight"):
        find_model(str(file))


def test_one_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    def about(writer: GGUFWriter) -> None:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 3)

    file = write_gguf(tmp_path / "part.gguf", about=about)
    with pytest.raises(InputError, match=r"part 2 of 3 of a split model\. Join the parts"):
        find_model(str(file))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("blk.2.", "the tensors of 1 of 3 layers .* are missing"),
        ("blk.1.ffn_up.weight", r"1 tensors are missing from the weights, e\.g\. model\.layers\.1\.mlp\.up_proj"),
        ("token_embd.weight", "tensors are missing from the weights"),
    ],
)
def test_tensors_that_are_missing_are_never_filled_in(tmp_path: Path, name: str, why: str) -> None:
    file = write_gguf(tmp_path / "some.gguf", without=lambda tensor: tensor.startswith(name))
    with pytest.raises(InputError, match=why):
        find_model(str(file))


def test_a_tensor_that_the_conversion_does_not_use_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "bias.gguf", extra={"blk.1.attn_v.bias": [3.0] * KV_HEADS * HEAD_DIM})
    with pytest.raises(InputError, match=r"1 tensors have no place .* e\.g\. blk\.1\.attn_v\.bias"):
        find_model(str(file))


def test_a_key_that_the_conversion_does_not_use_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "scale.gguf", about=lambda writer: writer.add_float32("llama.logit_scale", 0.25))
    with pytest.raises(InputError, match=r"llama\.logit_scale is 0\.25, which the conversion cannot apply"):
        find_model(str(file))


@pytest.mark.parametrize(("scale", "taken"), [(0.0, True), (HEAD_DIM**-0.5, True), (1.0, False), (0.3, False)])
def test_scale_of_attention_scores_is_taken_only_as_the_models_own(tmp_path: Path, scale: float, taken: bool) -> None:
    file = write_gguf(
        tmp_path / "scale.gguf", about=lambda writer: writer.add_float32("llama.attention.scale", float(scale))
    )
    if taken:
        assert find_model(str(file)).directory.is_dir()
    else:
        with pytest.raises(InputError, match=r"llama\.attention\.scale is .* cannot apply"):
            find_model(str(file))


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    def about(writer: GGUFWriter) -> None:
        writer.add_key_length(HEAD_DIM)
        writer.add_expert_count(0)
        writer.add_float32("llama.logit_scale", 1.0)
        writer.add_sliding_window(512)
        writer.add_rope_scaling_type(library_scaling("none"))

    assert find_model(str(write_gguf(tmp_path / "plain.gguf", about=about))).directory.is_dir()


def without_key(key: str) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.kv_data[0].pop(key) and None


@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "attention.head_count"])
def test_a_key_for_which_there_is_only_a_default_is_missed(tmp_path: Path, key: str) -> None:
    file = write_gguf(tmp_path / "less.gguf", about=without_key(f"llama.{key}"))
    with pytest.raises(InputError, match=f"less.gguf: (llama.{key} is missing|cannot be converted)"):
        find_model(str(file))


def test_a_window_is_refused_where_no_context_length_says_that_it_is_wide(tmp_path: Path) -> None:
    def about(writer: GGUFWriter) -> None:
        without_key("llama.context_length")(writer)
        writer.add_sliding_window(2)

    with pytest.raises(InputError, match=r"sliding_window is 2, which the conversion cannot apply"):
        find_model(str(write_gguf(tmp_path / "window.gguf", about=about)))


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    def about(writer: GGUFWriter) -> None:
        writer.kv_data[0]["llama.attention.layer_norm_rms_epsilon"].value = float("nan")

    with pytest.raises(InputError, match=r"layer_norm_rms_epsilon is nan, expected a finite number"):
        find_model(str(write_gguf(tmp_path / "nan.gguf", about=about)))


@pytest.mark.parametrize("key", ["attention.sliding_window", "attention.scale", "rope.scaling.factor"])
def test_text_in_place_of_a_number_is_refused(tmp_path: Path, key: str) -> None:
    file = write_gguf(tmp_path / "text.gguf", about=lambda writer: writer.add_string(f"llama.{key}", "x"))
    with pytest.raises(InputError, match="cannot apply"):
        find_model(str(file))


def test_no_token_ends_answers_where_the_file_names_none(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "endless.gguf", about=without_key("tokenizer.ggml.eos_token_id"))
    assert convert(file).config.eos_ids == set()


def library_scaling(name: str) -> Any:
    from gguf import RopeScalingType

    return RopeScalingType(name)


def test_a_scaling_of_rotary_positions_is_applied(tmp_path: Path) -> None:
    def about(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(library_scaling("yarn"))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    rope = raw_config(convert(write_gguf(tmp_path / "yarn.gguf", about=about)).files)["rope_parameters"]
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    assert expected.items() <= rope.items()


def test_a_factor_alone_scales_rotary_positions_linearly(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "factor.gguf", about=lambda writer: writer.add_rope_scaling_factor(4.0))
    assert {"rope_type": "linear", "factor": 4.0}.items() <= raw_config(convert(file).files)["rope_parameters"].items()


def test_another_scaling_of_rotary_positions_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "long.gguf", about=lambda w: w.add_rope_scaling_type(library_scaling("longrope")))
    with pytest.raises(InputError, match=r"scales rotary positions in a way .*'type': 'longrope'"):
        find_model(str(file))


def test_frequency_factors_become_the_scaling_that_they_are_of(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    scaled, _ = library.scaled_frequencies(scaling, HEAD_DIM, 8192)
    plain, _ = library.scaled_frequencies({"rope_type": "default", "rope_theta": 500000.0}, HEAD_DIM, 8192)
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    file = write_gguf(tmp_path / "factors.gguf", rope_base=500000.0, extra=factors)
    assert scaling.items() <= raw_config(convert(file).files)["rope_parameters"].items()


@pytest.mark.parametrize("last", [5.0, float("nan"), float("inf")])
def test_other_frequency_factors_are_refused(tmp_path: Path, last: float) -> None:
    file = write_gguf(tmp_path / "other.gguf", extra={"rope_freqs.weight": [last, 1.0, 2.0, 3.0]})
    with pytest.raises(InputError, match=r"rope_freqs\.weight scales rotary positions"):
        find_model(str(file))


@pytest.mark.parametrize("key", ["eos", "eot", "bos", "padding", "unknown"])
def test_a_special_token_beyond_the_vocabulary_is_named(tmp_path: Path, key: str) -> None:
    def about(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}_token_id", None)
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", 900)

    file = write_gguf(tmp_path / "far.gguf", about=about)
    with pytest.raises(InputError, match=rf"tokenizer\.ggml\.{key}_token_id is 900, but its vocabulary has 30 tokens"):
        find_model(str(file))


@pytest.mark.parametrize("blocks", [2**31, 10**9, 0])
def test_layers_that_the_file_does_not_hold_are_refused_before_they_are_built(tmp_path: Path, blocks: int) -> None:
    file = write_gguf(tmp_path / "deep.gguf")
    at = file.read_bytes().index(b"llama.block_count") + len(b"llama.block_count") + 4
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(blocks.to_bytes(4, "little"))
    with pytest.raises(InputError, match="block_count"):
        find_model(str(file))


def test_a_long_file_name_is_no_problem(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / ("long" * 60 + ".gguf"))
    assert find_model(str(file)).directory.is_dir()


class RustLibraryError(Exception):
    """Raised by libraries that do not raise `OSError`."""


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RustLibraryError(f"I/O error: no room (os error {errno.EDQUOT})")]
)
def test_a_full_disk_is_called_so_and_nothing_is_left(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_file: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"some")
        raise error

    monkeypatch.setattr(library, "convert_gguf", fail)
    with pytest.raises(InputError, match=r"the converted model cannot be written .* SPDBENCH_CACHE"):
        find_model(str(write_gguf(tmp_path / "any.gguf")))
    assert list((own_cache / "models").iterdir()) == []
