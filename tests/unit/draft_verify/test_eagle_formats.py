"""EAGLE heads on disk: every layout read, written and read again, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.decoder import Decoder
from spdbench_backends.eagle.belonging import foreign_target
from spdbench_backends.eagle.build import build_eagle, default_aux, random_eagle
from spdbench_backends.eagle.formats import EagleFile, Layout, read_eagle, write_eagle
from spdbench_backends.eagle.head import EagleModule, EagleWeights
from tests import tiny
from tests.unit.draft_verify import eagle_files
from tests.unit.draft_verify.eagle_files import IDS, VOCAB, WIDTH

pytestmark = pytest.mark.usefixtures("own_cache")

Change = Callable[[dict[str, Tensor]], object]


def altered(folder: Path, change: Change | None = None, **config: Any) -> Path:
    """The folder with its tensors and its config changed; a key that becomes None is taken out."""
    file = folder / "model.safetensors"
    if change is not None:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)
    raw = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


def build(decoder: Decoder, folder: Path, **options: Any) -> EagleWeights:
    return build_eagle(read_eagle(folder), decoder, **options)


def raw_config(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return raw


def drafts(weights: EagleWeights) -> Tensor:
    """Logits of the head for rows that are always the same: two heads that agree on them are the same head."""
    module = EagleModule(weights, 16)
    inputs = 3 * WIDTH if weights.is_eagle3 else WIDTH
    features = torch.randn(5, inputs, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        _, state = module.extend(features[:4], torch.tensor([3, 1, 4, 1]))
        again = features[4:] if weights.is_eagle3 else state
        return module.extend(again, torch.tensor([5]))[0].clone()


PUBLISHED = [eagle_files.safeailab, eagle_files.specforge, eagle_files.speculators]


@pytest.mark.parametrize(
    ("make", "layout"), list(zip(PUBLISHED, ("safeailab", "specforge", "speculators"), strict=True))
)
def test_published_eagle3_heads_are_read(
    decoder: Decoder, tmp_path: Path, make: Callable[[Path], Path], layout: Layout
) -> None:
    file = read_eagle(make(tmp_path))
    assert file.layout == layout
    assert file.sha256
    weights = build_eagle(file, decoder)
    assert weights.aux == default_aux(6) == (2, 3, 3)
    assert weights.vocabulary.listed == tuple(IDS)
    assert (weights.geometry.num_heads, weights.geometry.num_kv_heads, weights.geometry.head_dim) == (4, 2, 8)
    own_embeddings = make is eagle_files.speculators
    assert (weights.embeddings is not decoder.embeddings_VM) is own_embeddings
    assert weights.residual_normed is own_embeddings
    assert drafts(weights).shape == (1, len(IDS))


def test_published_eagle1_heads_are_one_head_by_three_names(decoder: Decoder, tmp_path: Path) -> None:
    makers = (eagle_files.eagle1, eagle_files.eagle1_of_vllm, eagle_files.eagle1_of_speculators)
    heads = [build(decoder, make(tmp_path / make.__name__)) for make in makers]
    for weights in heads:
        assert not weights.is_eagle3
        assert weights.norm is None
        assert weights.head is decoder.head
        assert weights.layers[0].input_norm is None
        assert drafts(weights).shape == (1, VOCAB)
        assert torch.equal(drafts(weights), drafts(heads[0]))


def own_head(decoder: Decoder, more: eagle_files.Shapes | None = None, **update: Any) -> EagleFile:
    """A head in our own terms that has everything that published layouts store."""
    tensors = eagle_files.tensors_of({**eagle_files.eagle3_shapes(), **(more or {})}) | eagle_files.vocabulary()
    file = random_eagle(decoder, 4)
    return replace(file, tensors=tensors, config=file.config.model_copy(update=update))


@pytest.mark.parametrize("layout", ["safeailab", "specforge", "speculators", "spdbench"])
def test_a_head_goes_there_and_back(decoder: Decoder, tmp_path: Path, layout: Layout) -> None:
    file = own_head(decoder, trained_tokens=7, acceptance_by_position=(0.5, 0.25))
    file = replace(file, extra={"trained_tokens": 7, "acceptance_by_position": [0.5, 0.25]})
    found = read_eagle(write_eagle(file, tmp_path, layout))
    assert (found.layout, found.config.trained_tokens) == (layout, 7)
    assert found.config.acceptance_by_position == (0.5, 0.25)
    assert found.tensors.keys() == file.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in file.tensors.items())
    again = build_eagle(found, decoder)
    assert again.aux == (2, 3, 3)
    assert torch.equal(drafts(again), drafts(build_eagle(file, decoder)))


HEAD_NORMS = {f"layers.0.self_attn.{name}_norm.weight": (8,) for name in "qk"}
SECOND_LAYER = {**eagle_files.layer("layers.1."), "layers.1.input_layernorm.weight": (WIDTH,)}


@pytest.mark.parametrize(
    ("make", "keys", "update", "more"),
    [
        (eagle_files.specforge, {"fc_norm": True}, {}, {f"fc_norm.{index}.weight": (WIDTH,) for index in range(3)}),
        (eagle_files.specforge, {}, {}, {"input_norm.weight": (3 * WIDTH,)}),
        (eagle_files.speculators, {}, {"norm_output": True, "norm_before_residual": True}, {}),
        (eagle_files.speculators, {}, {"sliding_window": 3}, {}),
        (eagle_files.speculators, {}, {"rope_theta": 500.0}, HEAD_NORMS),
        (eagle_files.speculators, {"num_hidden_layers": 2}, {}, SECOND_LAYER),
        (None, {}, {"norm_output": True, "norm_before_residual": True, "sliding_window": 3}, {}),
        (None, {}, {"norm_before_fc": True}, {"input_norm.weight": (96,)}),
        (None, {}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"fc.bias": (WIDTH,)}),
    ],
)
def test_variants_of_a_head_are_read(
    decoder: Decoder,
    tmp_path: Path,
    make: Callable[[Path], Path] | None,
    keys: dict[str, Any],
    update: dict[str, Any],
    more: eagle_files.Shapes,
) -> None:
    """Each on disk as its authors or we write it, against the same head put together in memory."""
    file = own_head(decoder, more, **update)
    if make is None:
        folder = write_eagle(file, tmp_path, "spdbench")
    else:
        config = {"norm_before_residual": False, **keys, **update}
        if make is eagle_files.speculators:
            config["transformer_layer_config"] = eagle_files.LLAMA | keys
        folder = altered(make(tmp_path), **config)
        save_file(dict(file.tensors), folder / "model.safetensors")
    found = read_eagle(folder)
    assert {key: getattr(found.config, key) for key in update} == update
    expected = drafts(build_eagle(file, decoder))
    assert torch.equal(drafts(build_eagle(found, decoder)), expected)
    assert not torch.equal(drafts(build_eagle(own_head(decoder), decoder)), expected)


def test_prefixes_of_serving_engines_are_understood(tmp_path: Path) -> None:
    folder = eagle_files.speculators(tmp_path)
    names = read_eagle(folder).tensors.keys()

    def prefix(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"draft_model.model.{name}"] = tensors.pop(name)
        tensors["verifier_norm.weight"] = torch.ones(WIDTH)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert read_eagle(altered(folder, prefix)).tensors.keys() == names


@pytest.mark.parametrize("name", ["d2t", "t2d"])
def test_a_head_with_one_map_drafts_as_with_both(decoder: Decoder, tmp_path: Path, name: str) -> None:
    folder = eagle_files.specforge(tmp_path)
    expected = drafts(build(decoder, folder))
    assert torch.equal(drafts(build(decoder, altered(folder, drop(name)))), expected)


@pytest.mark.parametrize("maps", [("d2t", "t2d"), ("d2t",)])
@pytest.mark.parametrize("offsets", [[0, 0, 0], [VOCAB, VOCAB + 5, 0]], ids=["zeros", "beyond"])
def test_maps_and_head_that_are_padded_draft_as_without_padding(
    decoder: Decoder, tmp_path: Path, maps: tuple[str, ...], offsets: list[int]
) -> None:
    def pad(tensors: dict[str, Tensor]) -> None:
        tensors["d2t"] = torch.cat([tensors["d2t"], torch.tensor(offsets)])
        tensors["t2d"] = torch.cat([tensors["t2d"], torch.zeros(10, dtype=torch.bool)])
        tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], torch.ones(3, WIDTH)])
        for name in {"d2t", "t2d"} - set(maps):
            del tensors[name]

    folder = eagle_files.specforge(tmp_path)
    expected = drafts(build(decoder, folder))
    for size in (len(IDS), len(IDS) + 3):
        assert torch.equal(drafts(build(decoder, altered(folder, pad, draft_vocab_size=size))), expected)
        folder = eagle_files.specforge(tmp_path / str(size))


def test_a_map_that_gives_a_draft_id_beyond_the_vocabulary_is_refused_by_name(decoder: Decoder, tmp_path: Path) -> None:
    def pad(tensors: dict[str, Tensor]) -> None:
        tensors["t2d"] = torch.cat([tensors["t2d"], torch.tensor([False, True])])

    with pytest.raises(InputError, match="tensor t2d gives token 263 a draft id, but the vocabulary has 262 tokens"):
        build(decoder, altered(eagle_files.specforge(tmp_path), pad))


def test_the_end_of_a_map_that_is_no_padding_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["d2t"][-1] -= 40  # a token that comes before, once more
        del tensors["t2d"]

    with pytest.raises(InputError, match="must hold ascending ids"):
        build(decoder, altered(eagle_files.specforge(tmp_path), change))


def test_a_head_that_fits_in_shape_only_is_noticed(decoder: Decoder, tmp_path: Path) -> None:
    def asked(folder: Path) -> str | None:
        return foreign_target(read_eagle(folder), decoder, "somebody/tiny-llama", "a" * 64)

    own = decoder.embeddings_VM
    assert own is not None
    other = torch.randn(own.shape, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    trained = own.float() + 0.2 * own.float().std() * torch.randn(own.shape, generator=torch.Generator().manual_seed(6))
    assert asked(eagle_files.specforge(tmp_path / "plain")) is None
    for name, table, expected in (("own", own, None), ("trained", trained, None), ("other", other, "not that of som")):
        folder = altered(eagle_files.specforge(tmp_path / name), put("embed_tokens.weight", table.clone()))
        assert expected in str(asked(folder)) if expected else asked(folder) is None
    for stated, expected in (("elsewhere/tiny-LLaMA/", None), ("meta/llama", "trained for meta/llama"), (5, None)):
        folder = eagle_files.specforge(tmp_path / str(stated).replace("/", " "))
        altered(folder, target_model_name_or_path=stated)
        assert expected in str(asked(folder)) if expected else asked(folder) is None


def padded(rows: Tensor, how: str, count: int = 26) -> Tensor:
    """An embedding with further rows: zeros, one vector in all of them, or numbers as they were drawn."""
    drawn = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(9)).to(rows.dtype)
    return torch.cat((rows, {"zeros": 0 * drawn, "mean": rows.mean(0).expand_as(drawn), "drawn": drawn}[how]))


@pytest.mark.parametrize("how", ["zeros", "mean", "drawn"])
def test_padded_rows_are_cut_off(decoder: Decoder, tmp_path: Path, how: str) -> None:
    own = decoder.embeddings_VM
    assert own is not None
    drawn = torch.randn(own.shape, generator=torch.Generator().manual_seed(5))
    table = own if how == "drawn" else drawn  # rows as drawn are padding only behind the target's own embedding
    plain = altered(eagle_files.specforge(tmp_path / "plain"), put("embed_tokens.weight", table.clone()))
    wide = eagle_files.specforge(tmp_path / "wide")
    altered(wide, put("embed_tokens.weight", padded(table, how)), vocab_size=VOCAB + 26)
    weights = build(decoder, wide)
    assert torch.equal(weights.embeddings, table.to(weights.dtype))
    assert torch.equal(drafts(weights), drafts(build(decoder, plain)))
    noted = foreign_target(read_eagle(wide), decoder, "somebody/tiny-llama", "a" * 64)
    assert (noted is None) is (how == "drawn")


def test_a_padded_head_of_the_whole_vocabulary_loses_the_same_rows(decoder: Decoder, tmp_path: Path) -> None:
    table = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(5))

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in ("d2t", "t2d"):
            del tensors[name]
        tensors["embed_tokens.weight"] = tensors["lm_head.weight"] = padded(table, "zeros")

    folder = eagle_files.specforge(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    widen(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    weights = build(decoder, altered(folder, None, vocab_size=VOCAB + 26, draft_vocab_size=VOCAB + 26))
    assert weights.vocabulary.size == VOCAB
    assert torch.equal(weights.head.plain(), table)


@pytest.mark.parametrize("count", [1, 26])
def test_more_rows_than_tokens_that_are_no_padding_are_refused(decoder: Decoder, tmp_path: Path, count: int) -> None:
    table = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(5))
    folder = altered(eagle_files.specforge(tmp_path), put("embed_tokens.weight", padded(table, "drawn", count)))
    with pytest.raises(InputError, match=rf"has {VOCAB + count} rows, .* {VOCAB} tokens. .* no padding: .*cosine"):
        build(decoder, folder)


def test_an_empty_list_of_auxiliary_layers_means_the_usual_ones(decoder: Decoder, tmp_path: Path) -> None:
    nested = {"eagle_aux_hidden_state_layer_ids": [], "use_aux_hidden_state": True}
    assert build(decoder, altered(eagle_files.specforge(tmp_path), eagle_config=nested)).aux == default_aux(6)


def test_a_head_of_the_whole_vocabulary_may_share_the_targets_output_head(decoder: Decoder, tmp_path: Path) -> None:
    def share(tensors: dict[str, Tensor]) -> None:
        for name in ("d2t", "t2d", "lm_head.weight"):
            del tensors[name]

    weights = build(decoder, altered(eagle_files.specforge(tmp_path), share, draft_vocab_size=VOCAB))
    assert weights.head is decoder.head


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


Q, K = "midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("extra.weight", torch.ones(2)), "unknown tensor extra.weight"),
        (put("layers.1.mlp.up_proj.weight", torch.ones(2)), "layers.1 makes it 2"),
        (put("midlayer.self_attn.q_proj.bias", torch.ones(32)), r"k_proj\.bias is missing"),
        (put("midlayer.self_attn.q_norm.weight", torch.ones(8)), r"k_norm\.weight is missing"),
        (put("fc_norm.1.weight", torch.ones(32)), r"fc_norm\.0\.weight is missing"),
        (drop("norm.weight"), "tensor norm.weight is missing"),
        (drop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (drop("fc.weight"), "tensor fc.weight is missing"),
        (drop(Q), r"tensor layers\.0\.self_attn\.q_proj\.weight is missing"),
        (drop("midlayer.hidden_norm.weight"), r"tensor layers\.0\.hidden_norm\.weight is missing"),
        (put("norm.weight", torch.ones(31)), r"norm.weight has shape \[31\], expected \[32\]"),
        (put(Q, torch.ones(32, 63)), r"q_proj\.weight has shape \[32, 63\], expected \[32, 64\]"),
        (put(Q, torch.ones(30, 64)), r"num_attention_heads is 4, but tensor layers.0.self_attn.q_proj.weight has 30"),
        (put(K, torch.ones(8, 64)), r"num_key_value_heads is 2, but tensor layers.0.self_attn.k_proj.weight makes"),
        (put(K, torch.ones(12, 64)), r"k_proj.weight has 12 rows, which makes no heads of 8"),
        (put("midlayer.mlp.gate_proj.weight", torch.ones(9, 32)), "intermediate_size is 48, but tensor layers.0.mlp.g"),
        (put("d2t", torch.zeros(len(IDS), dtype=torch.int64)), "d2t does not match t2d"),
        (
            lambda t: (t.pop("t2d"), t.update(d2t=t["d2t"] + VOCAB)),
            "the pair of d2t and t2d must hold ascending ids from 0 to 261",
        ),
        (lambda t: (t.pop("t2d"), t.update(d2t=torch.tensor(IDS))), "tensor d2t seems to hold token ids"),
        (lambda t: (t.pop("d2t"), t.pop("t2d")), "draft_vocab_size is 87, but the pair of d2t and t2d is missing"),
        (put("fc.weight", torch.ones(32, 95)), "fc.weight has 95 columns, expected a multiple of 32"),
        (put("fc.weight", torch.ones(32, 64)), "names 3 auxiliary layers, but fc.weight reads 2"),
        (put("fc.weight", torch.ones(96)), r"fc.weight has shape \[96\], expected a matrix"),
        (put("mask_hidden", torch.ones(32)), "parallel drafting"),
        (put("embedding_layernorm.weight", torch.ones(32)), "a norm on the embedding"),
        (put("layers.0.hidden_norm.weight", torch.ones(32)), "two tensors are called layers.0.hidden_norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(decoder: Decoder, tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(decoder, altered(eagle_files.specforge(tmp_path), change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, "config.hidden_size is 64, but tensor fc.weight makes it 32"),
        ({"target_hidden_size": 64}, "config.target_hidden_size is 64, but here it is 32: it was made for another"),
        ({"vocab_size": 99}, "config.vocab_size is 99, but here it is 262"),
        ({"target_family": "qwen3"}, "target family is qwen3, but here it is llama"),
        ({"num_attention_heads": 8}, "num_key_value_heads is 2, but tensor .*k_proj.weight makes it 4"),
        ({"head_dim": 16}, "num_attention_heads is 4, but tensor .*q_proj.weight makes it 2"),
        ({"num_attention_heads": None}, "neither num_attention_heads nor head_dim"),
        ({"num_attention_heads": "many"}, "num_attention_heads: Input should be a valid integer"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: Input should be a finite number"),
        ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu'"),
        ({"draft_vocab_size": 12}, "config.draft_vocab_size is 12, but its draft tokens are 87"),
        ({"fc_norm": True}, r"config.fc_norm is true, but tensor fc_norm\.0\.weight is missing"),
        ({"eagle_config": {"norm_before_fc": True}}, r"norm_before_fc is true, but tensor input_norm.weight is miss"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"aux_convention": "layer_output"}, "aux_convention is not known.*-o eagle.aux_convention says"),
        ({"eagle_config": {"aux_layer_ids": [1, 2, 2]}}, "aux_layer_ids is not known"),
        ({"eagle_aux_layers": [1, 2, 2]}, "eagle_aux_layers is not known"),
        ({"target_layer_ids": [1, 2, 2]}, "target_layer_ids is not known"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which is not supp"),
        ({"logits_scaling": 8}, "logits_scaling is 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"eagle_config": [1]}, "eagle_config is not a mapping"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "1"}},
            "aux_hidden_states: Input should be a valid array",
        ),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 5]}}, "-o eagle.aux_convention=hidden_states or"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3]}}, "names 2 auxiliary layers"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "of type longrope. Supported: default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "of type linear cannot be used"),
        ({"rope_scaling": {"type": "linear", "factor": -4.0}}, "of type linear cannot be used"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "of part of a head"),
        ({"speculators_model_type": "eagle"}, "its config says EAGLE-1, but its tensors are those of EAGLE-3"),
        ({"method": "eagle"}, "its config says EAGLE-1, but its tensors are those of EAGLE-3"),
        ({"method": "medusa"}, "a drafter for 'medusa', not for eagle"),
    ],
)
def test_configs_that_do_not_fit_are_named(
    decoder: Decoder, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(decoder, altered(eagle_files.specforge(tmp_path), **config))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (None, {"architectures": ["LlamaForCausalLMEagle3"]}, "says EAGLE-3, but its tensors are those of EAGLE-1"),
        (None, {"method": "eagle3"}, "says EAGLE-3, but its tensors are those of EAGLE-1"),
        (None, {"bias": True}, r"config.bias is true, but tensor fc\.bias is missing"),
        (put("fc.bias", torch.ones(32)), {"bias": False}, r"config.bias is false, but tensor fc\.bias is there"),
        (put("layers.0.input_layernorm.weight", torch.ones(32)), {}, "unknown tensor layers.0.input_layernorm.weight"),
        (put("norm.weight", torch.ones(32)), {}, "unknown tensor norm.weight"),
        (put("fc.weight", torch.ones(32, 96)), {}, "fc.weight has 96 columns, expected 64"),
        (lambda t: t.update(eagle_files.vocabulary()), {}, "a draft vocabulary .* EAGLE-1 does not know"),
        (put("embed_tokens.weight", torch.ones(99, 32)), {}, r"embed_tokens.weight has shape \[99, 32\], expected"),
    ],
)
def test_eagle1_heads_that_do_not_fit_are_named(
    decoder: Decoder, tmp_path: Path, change: Change | None, config: dict[str, Any], message: str
) -> None:
    plain = {"architectures": ["LlamaForCausalLM"], **eagle_files.LLAMA}
    folder = eagle_files.save(tmp_path, plain, eagle_files.tensors_of(eagle_files.eagle1_shapes()))
    with pytest.raises(InputError, match=message):
        build(decoder, altered(folder, change, **config))


def test_a_layer_of_an_endless_number_is_unknown(decoder: Decoder, tmp_path: Path) -> None:
    config = {"num_hidden_layers": None, "draft_vocab_size": len(IDS)}
    folder = altered(eagle_files.specforge(tmp_path), put("layers.999999999.x", torch.ones(1)), **config)
    with pytest.raises(InputError, match=r"tensor layers\.1\..* is missing"):
        build(decoder, folder)


def test_a_head_for_another_model_says_so(tmp_path: Path) -> None:
    folder = eagle_files.speculators(tmp_path / "head")

    def refusal(family: str, **changes: Any) -> str:
        name = "-".join([family, *changes])
        target = tiny.load(tiny.make_model(tmp_path / name, family, **changes)).own_decoder
        with pytest.raises(InputError) as refused:
            build(target, folder)
        return str(refused.value)

    assert "the hidden size of fc.weight is 32, but here it is 64" in refusal("llama", hidden_size=64)
    assert "config.vocab_size is 262, but here it is 300" in refusal("llama", vocab_size=300)
    assert "target family is llama, but here it is qwen3" in refusal("qwen3")


def test_sizes_come_from_tensors_where_the_config_says_nothing(decoder: Decoder, tmp_path: Path) -> None:
    folder = eagle_files.specforge(tmp_path)
    expected = drafts(build(decoder, folder))
    gone = dict.fromkeys(eagle_files.LLAMA.keys() - {"num_attention_heads", "model_type"}, None)
    assert torch.equal(drafts(build(decoder, altered(folder, draft_vocab_size=None, **gone))), expected)
    assert torch.equal(drafts(build(decoder, altered(folder, num_attention_heads=None, head_dim=8))), expected)


@pytest.mark.parametrize(
    ("ids", "convention", "expected"),
    [
        ([2, 3, 3], "auto", (2, 3, 3)),
        ([1, 2, 2], "auto", (2, 3, 3)),
        ([0, 1, 5], "hidden_states", (0, 1, 5)),
        ([0, 1, 5], "layer_output", (1, 2, 6)),
        ([1, 2, 2], "hidden_states", (1, 2, 2)),
    ],
)
@pytest.mark.parametrize("place", ["nested", "top"])
def test_auxiliary_layers_are_counted_in_two_ways(
    decoder: Decoder, tmp_path: Path, ids: list[int], convention: str, expected: tuple[int, ...], place: str
) -> None:
    key = {"eagle_aux_hidden_state_layer_ids": ids}
    folder = altered(eagle_files.specforge(tmp_path), **({"eagle_config": key} if place == "nested" else key))
    assert build(decoder, folder, aux_convention=convention).aux == expected


def test_auxiliary_layers_that_the_target_does_not_have_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    nested = {"eagle_aux_hidden_state_layer_ids": [0, 1, 6]}
    folder = altered(eagle_files.specforge(tmp_path), eagle_config=nested)
    assert build(decoder, folder, aux_convention="hidden_states").aux == (0, 1, 6)
    with pytest.raises(InputError, match=r"layers \[0, 1, 6\], but the target has 6 layers"):
        build(decoder, folder, aux_convention="layer_output")


def test_written_ids_count_what_the_layout_counts(decoder: Decoder, tmp_path: Path) -> None:
    file = own_head(decoder, aux_hidden_states=(2, 4, 5))
    assert raw_config(write_eagle(file, tmp_path / "own", "spdbench"))["aux_hidden_states"] == [2, 4, 5]
    assert build(decoder, tmp_path / "own").aux == (2, 4, 5)
    for layout in ("safeailab", "specforge"):
        nested = raw_config(write_eagle(file, tmp_path / layout, layout))["eagle_config"]
        assert nested["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
        assert build(decoder, tmp_path / layout, aux_convention="layer_output").aux == (2, 4, 5)
    top = raw_config(write_eagle(file, tmp_path / "t", "speculators"))
    assert top["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]


def test_the_rotary_base_can_be_overridden(decoder: Decoder, tmp_path: Path) -> None:
    folder = altered(eagle_files.specforge(tmp_path), rope_theta=1e6)
    (own, _), (other, _) = (build(decoder, folder, rope_theta=theta).rotary.tables(9) for theta in (None, 1e4))
    assert own[5, 0] == other[5, 0]
    assert not torch.equal(own[5], other[5])
    absent, _ = build(decoder, altered(folder, rope_theta=None)).rotary.tables(9)
    assert torch.equal(absent, other)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=["linear", "llama3", "yarn"],
)
def test_scaled_rotary_positions_are_those_of_a_target(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Described alike, a head and a model turn alike; the old keys say the same, and a base given by hand is plain."""
    parameters = {**rope, "rope_theta": 1e5}
    target = tiny.load(tiny.make_model(tmp_path / "model", rope_parameters=parameters)).own_decoder
    folder = altered(eagle_files.specforge(tmp_path / "head"), max_position_embeddings=256, rope_parameters=parameters)
    expected, _ = target.rotary.tables(40)
    assert torch.equal(build(target, folder).rotary.tables(40)[0], expected)
    altered(folder, rope_parameters=None, rope_scaling=rope, rope_theta=1e5)
    assert torch.equal(build(target, folder).rotary.tables(40)[0], expected)
    plain, _ = build(target, folder, rope_theta=1e5).rotary.tables(40)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize(("make", "fed"), [(eagle_files.specforge, False), (eagle_files.speculators, True)])
def test_norm_output_means_two_things(
    decoder: Decoder, tmp_path: Path, make: Callable[[Path], Path], fed: bool
) -> None:
    folder = altered(make(tmp_path / "head"), norm_output=True)
    assert build(decoder, folder).feed_normed is fed
    assert build(decoder, folder, norm_output="feed").feed_normed
    assert not build(decoder, folder, norm_output="ignore").feed_normed
    assert build(decoder, write_eagle(own_head(decoder, norm_output=True), tmp_path / "own", "spdbench")).feed_normed


def test_a_window_that_a_config_switches_off_is_off(decoder: Decoder, tmp_path: Path) -> None:
    inner = {**eagle_files.LLAMA, "sliding_window": 4}
    folder = altered(eagle_files.speculators(tmp_path), transformer_layer_config=inner)
    assert build(decoder, folder).layers[0].window == 4
    altered(folder, transformer_layer_config={**inner, "use_sliding_window": False})
    assert build(decoder, folder).layers[0].window is None
    assert build(decoder, altered(eagle_files.specforge(tmp_path), sliding_window=4)).layers[0].window is None


def own_folder(decoder: Decoder, **update: Any) -> EagleFile:
    file = random_eagle(decoder, 4)
    return replace(file, config=file.config.model_copy(update=update), extra={"model_sha256": "ab", "note": "x"})


def test_our_own_folder_takes_head_rows_from_the_target(decoder: Decoder, tmp_path: Path) -> None:
    file = own_folder(decoder, draft_token_ids=tuple(IDS), trained_tokens=7)
    found = read_eagle(write_eagle(file, tmp_path, "spdbench"))
    assert (raw_config(tmp_path)["method"], raw_config(tmp_path)["version"]) == ("eagle3", 1)
    assert found.config.trained_tokens == 7
    assert raw_config(tmp_path)["model_sha256"] == "ab"
    assert read_eagle(write_eagle(found, tmp_path, "spdbench")).config == found.config
    weights = build_eagle(found, decoder)
    assert decoder.head is not None
    assert torch.equal(weights.head.plain(), decoder.head.plain()[IDS])


def test_a_draft_vocabulary_is_named_once(decoder: Decoder) -> None:
    file = own_folder(decoder, draft_token_ids=tuple(IDS))
    both = replace(file, tensors={**file.tensors, **eagle_files.vocabulary()})
    with pytest.raises(InputError, match="unknown tensor d2t"):
        build_eagle(both, decoder)


def test_a_random_head_is_the_same_for_the_same_seed(decoder: Decoder) -> None:
    first, same, other = (random_eagle(decoder, seed) for seed in (1, 1, 2))
    assert torch.equal(same.tensors["fc.weight"], first.tensors["fc.weight"])
    assert not torch.equal(other.tensors["fc.weight"], first.tensors["fc.weight"])
    assert build_eagle(first, decoder).head is decoder.head
    assert not build_eagle(random_eagle(decoder, 1, version=1), decoder).is_eagle3
