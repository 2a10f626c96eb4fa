"""From a model's name to weights, and every way in which that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spdbench.errors import InputError
from spdbench.models.checkpoints.find_model import find_model
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench.models.target import find_device, load_target
from tests import tiny


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path, own_cache: Path) -> Path:  # noqa: ARG001 - the cache is the point
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_local_folder_is_called_by_its_name_and_hashed(copy: Path) -> None:
    files = find_model(str(copy))
    assert files.id == "model"
    assert files.sha256 == sha256_of_files([copy / "model.safetensors"])
    assert len(files.sha256) == 64


def test_a_changed_weight_changes_the_hash_in_spite_of_the_memo(copy: Path) -> None:
    before = find_model(str(copy)).sha256
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, copy / "model.safetensors", {"format": "pt"}
    )
    assert find_model(str(copy)).sha256 != before


def test_sharded_and_bin_weights_load_like_one_file(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    sharded = Path(shutil.copytree(copy, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, sharded / f"part{number}.safetensors", {"format": "pt"})
        index.update(dict.fromkeys(part, f"part{number}.safetensors"))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    old = Path(shutil.copytree(copy, tmp_path / "old"))
    (old / "model.safetensors").unlink()
    torch.save(tensors, old / "pytorch_model.bin")
    for folder in (sharded, old):
        found = tiny.load(folder).own_decoder
        assert torch.equal(found.weights[5].qkv.plain(), tiny.load(copy).own_decoder.weights[5].qkv.plain())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_were_not_downloaded_say_so(copy: Path, name: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"cannot be read as weights: it is a pointer of Git LFS .*git lfs pull"):
        tiny.load(copy).decoder  # noqa: B018


def test_a_pickle_that_would_run_code_is_refused(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as weights"):
        tiny.load(copy).decoder  # noqa: B018
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="a model folder without weights"):
        find_model(str(copy))


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_is_neither_passed_over_nor_taken_for_a_model(copy: Path, has_model: bool) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    save_file(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 32)},
        copy / "adapter_model.safetensors",
    )
    if not has_model:
        for name in ("config.json", "model.safetensors"):
            (copy / name).unlink()
    with pytest.raises(InputError, match=r"holds an adapter \(adapter_config\.json\).*merge_and_unload"):
        tiny.load(copy)


def test_a_tensor_in_two_files_is_named(copy: Path) -> None:
    """The index says which of them counts, but not every reader asks it."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "a.safetensors", {"format": "pt"})
    save_file({"model.norm.weight": tensors["model.norm.weight"] * 3}, copy / "b.safetensors", {"format": "pt"})
    index = dict.fromkeys(tensors, "a.safetensors") | {"some.other": "b.safetensors"}
    for text in (json.dumps({"weight_map": index}), None):
        (copy / "model.safetensors.index.json").unlink(missing_ok=True)
        if text is not None:
            (copy / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match=r"model.norm.weight is in a.safetensors and in b.safetensors"):
            tiny.load(copy).own_decoder  # noqa: B018 - weights are read when they are needed


def test_tensors_that_the_config_gives_no_place_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.sinks", "extra"):
        save_file({**tensors, name: torch.ones(2)}, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=f"1 tensors have no place in this model, e.g. {name}"):
            tiny.load(copy).own_decoder  # noqa: B018 - weights are read when they are needed


def test_a_shard_that_the_index_names_is_missing(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"gone\.safetensors is missing"):
        find_model(str(copy))


def test_an_index_of_files_that_are_gone_does_not_hide_the_weights(copy: Path, tmp_path: Path) -> None:
    before = find_model(str(copy)).sha256
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert find_model(str(copy)).sha256 == before
    old = Path(shutil.copytree(copy, tmp_path / "old"))
    torch.save(load_file(copy / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert Checkpoint(old).files == [old / "pytorch_model.bin"]


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "/etc/hostname", "", "a\0b", "x/../../model.safetensors"]
)
def test_an_index_that_names_files_outside_its_folder(copy: Path, name: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="which is not a file within the folder"):
        find_model(str(copy))


def test_an_index_that_names_a_file_of_a_name_too_long(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "n" * 5000}}))
    with pytest.raises(InputError, match="is missing, though"):
        find_model(str(copy))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_weights_that_are_no_file(copy: Path, make: Callable[[Path], object]) -> None:
    (copy / "model.safetensors").unlink()
    make(copy / "model.safetensors")
    with pytest.raises(InputError, match="is not a file of weights"):
        find_model(str(copy))


def test_weights_of_the_oldest_format_load(copy: Path) -> None:
    expected = tiny.load(copy).own_decoder.weights[2].qkv.plain()
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(tiny.load(copy).own_decoder.weights[2].qkv.plain(), expected)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {5: torch.ones(2)},
        {"model.norm.weight": "text"},
        {"state": {"model.norm.weight": torch.ones(2)}},
        {"model.norm.weight": torch.ones(2, device="meta")},
        {"model.norm.weight": torch.ones(2, 2).to_sparse()},
    ],
)
def test_a_bin_file_of_anything_but_dense_tensors(copy: Path, content: object) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(content, copy / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"pytorch_model\.bin: (holds no|is not a mapping|tensor model\.norm\.weight is not a dense)"
    ):
        tiny.load(copy).decoder  # noqa: B018


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.4.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite(copy: Path, name: str, number: float) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[3] = number
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    for load in (lambda: tiny.load(copy).decoder, lambda: tiny.load(copy).load_for_generation()):
        with pytest.raises(InputError, match=f"{name} holds numbers that are not finite"):
            load()


def test_weights_that_a_narrower_type_cannot_hold(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"not finite in torch\.float16"):
        load_target(str(copy), "float16", "cpu").decoder  # noqa: B018


def test_a_truncated_weight_file(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read as weights"):
        tiny.load(copy).decoder  # noqa: B018


def test_a_missing_and_a_misshapen_tensor_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name][:, :5].contiguous()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} has shape \[32, 5\], expected \[32, 48\]"):
        tiny.load(copy).decoder  # noqa: B018
    save_file({k: v for k, v in tensors.items() if k != name}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{name} is missing"):
        tiny.load(copy).decoder  # noqa: B018


def test_a_head_of_its_own_where_the_config_ties_it_is_refused_unless_it_is_the_embedding(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    edit_config(copy, tie_word_embeddings=True)
    save_file({**tensors, "lm_head.weight": embedding.clone()}, copy / "model.safetensors", {"format": "pt"})
    tiny.load(copy).decoder  # noqa: B018
    save_file({**tensors, "lm_head.weight": embedding + 1}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight is not the embedding.*tie_word_embeddings"):
        tiny.load(copy).decoder  # noqa: B018


def test_double_precision_is_no_quantisation(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    Checkpoint(copy).refuse_quantised()
    tiny.load(copy).decoder  # noqa: B018


def test_what_our_own_layers_do_not_know_is_named(copy: Path) -> None:
    assert tiny.load(copy).unsupported_reason is None
    edit_config(copy, hidden_act="gelu")
    assert tiny.load(copy).unsupported_reason == "hidden_act 'gelu'"
    edit_config(copy, hidden_act="silu", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert tiny.load(copy).unsupported_reason == "rope_type 'dynamic'"


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("nonsense", "'nonsense' is not supported: neither spdbench nor this version of transformers knows it"),
        ("t5", "'t5' is not supported: it is an encoder-decoder"),
        ("vit", "'vit' is not supported: it is not a causal language model"),
        (None, "names no architecture"),
    ],
)
def test_what_is_no_decoder_only_language_model_is_refused(copy: Path, family: str | None, why: str) -> None:
    edit_config(copy, model_type=family)
    with pytest.raises(InputError, match=why):
        tiny.load(copy)


def test_quantised_models_that_only_transformers_knows_are_refused_too(copy: Path) -> None:
    edit_config(copy, model_type="gpt2", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match=r"quantised weights \(gptq\) are not supported"):
        tiny.load(copy)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised weights \(fp8\) are not supported"),
        ({"num_hidden_layers": 3}, "tensors have no place in this model"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected at least 1"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5, which is not supported here"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which is not supported here"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported here"),
        ({"num_hidden_layers": "six"}, "cannot be used"),
        ({"num_attention_heads": 0}, r"config\.json: "),
        ({"rms_norm_eps": "x"}, "cannot be used"),
        ({"rope_parameters": "x"}, "cannot be used"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "cannot be used"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "cannot be used"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": []}}, "cannot be used"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, expected a number from 0 to 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 5000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000, expected at most 5000"),
        ({"head_dim": 10**9}, "head_dim is 1000000000, expected at most"),
        ({"max_position_embeddings": -4}, "max_position_embeddings is -4, expected at least 1"),
        ({"head_dim": 7}, "even"),
        ({"num_key_value_heads": 3}, "expected a multiple of the second and an even head_dim"),
        ({"vocab_size": 10**18}, "vocab_size is 1000000000000000000, expected at most"),
        ({"eos_token_id": 10**20}, r"(?<!generation_)config\.json: cannot be used \(eos_token_id is 1000"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, expected at least 1"),
        ({"model_type": "mistral", "sliding_window": "x"}, "cannot be used"),
    ],
)
def test_a_config_that_cannot_be_or_does_not_belong(copy: Path, changes: dict[str, object], why: str) -> None:
    edit_config(copy, **changes)
    with pytest.raises(InputError, match=why):
        tiny.load(copy).decoder  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_experts": [6]}, "cannot be used"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7, expected at most 6"),
        ({"num_experts_per_tok": 10**30}, "num_experts_per_tok is 1000.*, expected at most 6"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, expected at least 1"),
        ({"num_experts": 10**9}, "num_experts is 1000000000, expected at most"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected at least 1"),
        ({"moe_intermediate_size": -5}, r"moe_intermediate_size is -5"),
        ({"mlp_only_layers": 3}, r"config\.json: "),
    ],
)
def test_experts_that_cannot_be(tmp_path: Path, own_cache: Path, changes: dict[str, object], why: str) -> None:  # noqa: ARG001
    folder = tiny.make_model(tmp_path / "experts", "qwen3_moe")
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=why):
        tiny.load(folder).decoder  # noqa: B018


def test_layers_without_weights_of_a_model_that_only_transformers_knows(tmp_path: Path, own_cache: Path) -> None:  # noqa: ARG001
    folder = tiny.make_model(tmp_path / "m", "gpt2")
    edit_config(folder, n_layer=4000)
    with pytest.raises(InputError, match="num_hidden_layers is 4000, but there are only"):
        tiny.load(folder).decoder  # noqa: B018


def test_json_that_is_nested_too_deeply(copy: Path) -> None:
    deep = "[" * 100_000
    for name in ("spdbench.json", "model.safetensors.index.json", "generation_config.json", "config.json"):
        (copy / name).write_text(deep)
        with pytest.raises(InputError, match=f"{name}: nested too deeply"):
            tiny.load(copy)
        if name != "config.json":
            (copy / name).unlink()


@pytest.mark.parametrize("note", ["[]", "{}", '{"sha256": 5}', '{"sha256": "x"}', '{"sha256": null}'])
def test_a_note_of_a_conversion_that_names_no_hash(copy: Path, note: str) -> None:
    (copy / "spdbench.json").write_text(note)
    with pytest.raises(InputError, match=r"spdbench\.json: sha256 is .*, expected 64 hexadecimal digits"):
        find_model(str(copy))


def test_keys_that_only_look_like_limits_are_left_alone(copy: Path) -> None:
    edit_config(copy, num_steps=100, original={"num_layers_note": -1})
    assert tiny.load(copy).config.num_layers == 6


def test_end_of_sequence_ids_that_the_model_cannot_generate_are_ignored(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 5, 50256]}))
    assert tiny.load(copy).config.eos_ids == {5}


def test_quantised_tensors_are_never_read_as_plain_ones(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{name} is torch.float8_e4m3fn; only unquantised"):
        tiny.load(copy).decoder  # noqa: B018


@pytest.mark.parametrize(
    "text", ["[]", '{"eos_token_id": "x"}', '{"eos_token_id": [["x"]]}', '{"eos_token_id": ["x"]}', "{"]
)
def test_generation_settings_that_cannot_be_used(copy: Path, text: str) -> None:
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config\.json: (cannot be used|not JSON)"):
        tiny.load(copy)


def test_a_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        tiny.load(copy).tokenizer  # noqa: B018


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {"a": 5}}', '{"weight_map": {}}', "{"])
def test_a_broken_weight_index(copy: Path, text: str) -> None:
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"is not a weight index|not JSON"):
        find_model(str(copy))


def test_remote_code_is_never_run(copy: Path) -> None:
    edit_config(copy, auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="'evil' is not supported"):
        tiny.load(copy)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~nobody-is-called-so/m", "nonsense", "a/b/c", "n" * 5000]
)
def test_a_name_that_is_nothing_says_what_is_allowed(name: str) -> None:
    with pytest.raises(InputError, match="no such folder or file, and not a hub id"):
        find_model(name)


def test_a_file_that_is_not_gguf(tmp_path: Path, own_cache: Path) -> None:  # noqa: ARG001
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"not a \.gguf"):
        find_model(str(tmp_path / "notes.txt"))
    (tmp_path / "fake.gguf").write_text("hello")
    with pytest.raises(InputError, match="is not a GGUF file"):
        find_model(str(tmp_path / "fake.gguf"))


def test_a_folder_without_config(tmp_path: Path, own_cache: Path) -> None:  # noqa: ARG001
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"no config\.json"):
        load_target(str(tmp_path), "float32", "cpu")


def test_a_list_of_end_of_sequence_ids_is_read(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert tiny.load(copy).config.eos_ids == {3, 5}


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (None, {}, {256}),  # the tokenizer's alone
        (5, None, {5, 256}),
        (5, {"eos_token_id": None}, {5, 256}),
        (5, {"eos_token_id": [7]}, {5, 7, 256}),
        ([5, 6], {"eos_token_id": 256}, {5, 6, 256}),
    ],
)
def test_every_file_that_names_an_end_of_sequence_is_asked(
    copy: Path, config: Any, settings: dict[str, Any] | None, expected: set[int]
) -> None:
    raw = json.loads((copy / "config.json").read_text()) | {"eos_token_id": config}
    (copy / "config.json").write_text(json.dumps(raw))
    (copy / "generation_config.json").unlink()
    if settings is not None:
        (copy / "generation_config.json").write_text(json.dumps(settings))
    assert tiny.load(copy).eos_ids == expected


def test_an_architectures_default_does_not_join_the_ids_that_a_file_names(copy: Path) -> None:
    raw = json.loads((copy / "config.json").read_text())
    del raw["eos_token_id"]
    (copy / "config.json").write_text(json.dumps(raw))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert tiny.load(copy).config.eos_ids == {9}


def test_an_end_of_sequence_that_is_no_id_is_reported_with_its_file(copy: Path) -> None:
    raw = json.loads((copy / "config.json").read_text()) | {"eos_token_id": [3, True]}
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"config\.json: cannot be used \("):
        tiny.load(copy)


def test_parameters_are_counted_from_headers(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    assert Checkpoint(copy).num_parameters() == total
    head = tensors["lm_head.weight"].numel()
    assert Checkpoint(copy).num_parameters(without=("lm_head.",)) == total - head


@pytest.mark.parametrize("name", ["cuda:9", "gpu", "cuda:x", "cpu:0", "cuda:²", "cuda:", "cuda:" + "9" * 5000])
def test_a_device_that_is_not_there_says_which_are(name: str) -> None:
    if torch.cuda.is_available() and name == "cuda:9" and torch.cuda.device_count() > 9:
        pytest.skip("this machine has ten GPUs")
    with pytest.raises(InputError, match=r"--devices .* Allowed: cpu"):
        find_device(name)


def test_an_unknown_dtype() -> None:
    with pytest.raises(InputError, match=r"--dtype int8: not supported\. Allowed: bfloat16, float32, float16"):
        load_target("smollm2", "int8", "cpu")


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),  # Qwen's way
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),  # DeepSeek's
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "linear", "factor": 2.5}, 640),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            256,
        ),
    ],
)
def test_a_factor_widens_the_context_unless_the_config_states_the_whole(
    copy: Path, rope: dict[str, object], expected: int
) -> None:
    edit_config(copy, rope_parameters={"rope_theta": 10000.0, **rope})
    assert load_target(str(copy), "float32", "cpu").config.max_positions == expected


def test_a_factor_under_the_key_of_older_configs_widens_the_context_too(copy: Path) -> None:
    path = copy / "config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"]
    path.write_text(json.dumps({**raw, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    assert load_target(str(copy), "float32", "cpu").config.max_positions == 512


def test_a_factor_for_some_layers_only_widens_nothing(tmp_path: Path, own_cache: Path) -> None:  # noqa: ARG001
    model = tiny.make_model(tmp_path / "gemma", "gemma3_text")
    rope = {"rope_theta": 1e4, "rope_type": "linear", "factor": 8.0}
    edit_config(
        model,
        rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    )
    assert load_target(str(model), "float32", "cpu").config.max_positions == 256
