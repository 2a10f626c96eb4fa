"""Models with recurrent layers: against transformers, against the definition, and after going back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu, softplus

from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.models import layer_ops
from spdbench.models.checkpoints.config import RecurrentSizes
from spdbench.models.checkpoints.hybrid_tensors import rotary_order
from spdbench.models.cpu.cpu_ops import CpuOps
from spdbench.models.decoder import Decoder
from spdbench.models.delta_net import DeltaNet, delta_net
from spdbench.models.kv_cache import HybridCache
from spdbench.models.layer_ops import has_cpu_kernels
from tests import tiny
from tests.unit.models.rollback_mistakes import MISTAKES

PROMPT = tuple(range(7, 20))
LONG_PROMPT = tuple((7 + 31 * i) % 262 for i in range(150))
CHUNK = (50, 61, 62, 63, 64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=tiny.HYBRIDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("hybrid"), request.param, seed=3)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return tiny.load(folder).own_decoder


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT, PROMPT[:1]], ids=["token by token", "in blocks", "one token"])
def test_hidden_states_are_those_of_transformers(folder: Path, decoder: Decoder, prompt: tuple[int, ...]) -> None:
    with torch.inference_mode():
        hidden, states = decoder.forward(
            decoder.embed(decoder.ids(prompt)), 0, decoder.new_cache(len(prompt)), hidden_indices=range(7)
        )
        found = reference(folder)(torch.tensor([prompt]), output_hidden_states=True)
    for index in range(6):
        torch.testing.assert_close(states[index], found.hidden_states[index][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decoder.logits(hidden), found.logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT])
def test_greedy_output_equals_transformers_generate(folder: Path, decoder: Decoder, prompt: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = reference(folder).generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    expected = ids[0, len(prompt) :].tolist()
    assert len(set(expected)) > 5, "a model that repeats itself proves little"
    assert list(decode(decoder, tiny.greedy(prompt, 40))) == expected


def test_low_precision_is_close_to_transformers(folder: Path) -> None:
    decoder = tiny.load(folder, "bfloat16").own_decoder
    with torch.inference_mode():
        hidden, _ = decoder.forward(decoder.embed(decoder.ids(PROMPT)), 0, decoder.new_cache(len(PROMPT)))
        found = decoder.logits(hidden).float()
        exact = reference(folder)(torch.tensor([PROMPT])).logits[0]
        low = reference(folder, torch.bfloat16)(torch.tensor([PROMPT])).logits[0].float()
    assert (found - exact).norm() < 1.5 * (low - exact).norm()


def test_a_model_that_also_reads_images_is_read_by_its_text_part(folder: Path, tmp_path: Path) -> None:
    nested = Path(tmp_path / "nested")
    nested.mkdir()
    for path in folder.iterdir():
        (nested / path.name).write_bytes(path.read_bytes())
    target, plain = tiny.load(tiny.nest(nested)), tiny.load(folder)
    request = tiny.greedy(PROMPT, 20)
    assert list(decode(target.own_decoder, request)) == list(decode(plain.own_decoder, request))
    assert target.config.family == plain.config.family == json.loads((nested / "config.json").read_text())["model_type"]
    assert target.num_parameters == plain.num_parameters


def test_tied_embeddings_may_be_named_within_the_text_part(tmp_path: Path) -> None:
    tied = tiny.make_model(tmp_path / "tied", "qwen3_5_text", seed=3, tie_word_embeddings=True)
    expected = list(decode(tiny.load(tied).own_decoder, tiny.greedy(PROMPT, 20)))
    assert list(decode(tiny.load(tiny.nest(tied)).own_decoder, tiny.greedy(PROMPT, 20))) == expected


def test_experts_in_one_tensor_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    """The published files hold them as one; transformers writes them one by one."""
    folder = tiny.make_model(tmp_path, "qwen3_5_moe_text", seed=3)
    request = tiny.greedy(PROMPT, 20)
    before = list(decode(tiny.load(folder).own_decoder, request))
    tensors = load_file(folder / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    together = "experts.gate_up_proj" in "".join(tensors)
    for layer in range(6):
        prefix = f"model.layers.{layer}.mlp.experts."
        if together:  # then one by one is what is left to try
            for expert, (both, down) in enumerate(
                zip(tensors[prefix + "gate_up_proj"], tensors[prefix + "down_proj"], strict=True)
            ):
                gate, up = both.chunk(2)
                fused |= {
                    f"{prefix}{expert}.gate_proj.weight": gate.clone(),
                    f"{prefix}{expert}.up_proj.weight": up.clone(),
                    f"{prefix}{expert}.down_proj.weight": down.clone(),
                }
            continue
        each = [[tensors[f"{prefix}{e}.{p}_proj.weight"] for p in ("gate", "up", "down")] for e in range(6)]
        fused[prefix + "gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in each])
        fused[prefix + "down_proj"] = torch.stack([down for *_, down in each])
    save_file(fused, folder / "model.safetensors", {"format": "pt"})
    assert fused.keys() != tensors.keys()
    assert list(decode(tiny.load(folder).own_decoder, request)) == before


def test_layer_ranges_in_turn_equal_one_forward(decoder: Decoder) -> None:
    """The first range has no layer of attention."""
    hidden = decoder.embed(decoder.ids(PROMPT))
    whole, _ = decoder.forward(hidden, 0, decoder.new_cache(len(PROMPT)))
    for layers in (range(2), range(2, 3), range(3, 6)):
        hidden, _ = decoder.forward(hidden, 0, decoder.new_cache(len(PROMPT), layers), layers)
    torch.testing.assert_close(hidden, whole, rtol=0, atol=0)


@torch.inference_mode()
def states_after(decoder: Decoder, prompt: Sequence[int], chunks: Sequence[Sequence[int]]) -> list[Tensor]:
    """All that a cache remembers of the prompt and the chunks: the recurrent states, and the valid keys and values."""
    cache = decoder.new_cache(len(prompt) + 64)
    for ids in (prompt, *chunks):
        decoder.forward(decoder.embed(decoder.ids(ids)), cache.length, cache)
    return remembered(cache)


def remembered(cache: Any) -> list[Tensor]:
    assert isinstance(cache, HybridCache)
    found = [part[cache.slot(0)].clone() for layer in (0, 1, 3, 4) for part in cache.states(layer)]
    return found + [part.clone() for layer in (2, 5) for part in tiny.rows(cache, layer)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.fixture
def exact() -> None:
    if not has_cpu_kernels(torch.float32, CPU):
        pytest.skip("numba is not installed: torch's own sums make no promise of the same bits")


@torch.inference_mode()
def went_back(decoder: Decoder, prompt: Sequence[int], kept: int, chunks: Sequence[Sequence[int]]) -> list[Tensor]:
    """What is remembered after chunks of which only the first `kept` tokens stay."""
    cache = decoder.new_cache(len(prompt) + 64, num_snapshots=sum(map(len, chunks)))
    decoder.forward(decoder.embed(decoder.ids(prompt)), 0, cache)
    for ids in chunks:
        decoder.forward(decoder.embed(decoder.ids(ids)), cache.length, cache)
    cache.rollback(len(prompt) + kept)
    return remembered(cache)


ONE_BY_ONE = tuple((token,) for token in CHUNK)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT, PROMPT[:1]], ids=["short", "long", "one token"])
@pytest.mark.parametrize("chunks", [(CHUNK,), ONE_BY_ONE, (CHUNK[:2], CHUNK[2:])], ids=["a chain", "alone", "two"])
def test_after_going_back_every_bit_is_as_if_nothing_had_been_drafted(
    decoder: Decoder, prompt: tuple[int, ...], chunks: tuple[tuple[int, ...], ...]
) -> None:
    for kept in range(len(CHUNK) + 1):
        expected = states_after(decoder, prompt, ONE_BY_ONE[:kept])
        assert same(went_back(decoder, prompt, kept, chunks), expected)


@pytest.mark.usefixtures("exact")
def test_going_back_again_and_again(decoder: Decoder) -> None:
    """The ring turns many times; each time the tokens behind the mark are others."""
    cache, ids = decoder.new_cache(200, num_snapshots=3), list(PROMPT)
    with torch.inference_mode():
        decoder.forward(decoder.embed(decoder.ids(ids)), 0, cache)
        for turn in range(20):
            wrong = [(turn * 7 + i) % 262 for i in range(1 + turn % 3)]
            decoder.forward(decoder.embed(decoder.ids(wrong)), cache.length, cache)
            cache.keep(len(ids), [0] if turn % 2 else [])
            ids += wrong[:1] if turn % 2 else []
    expected = states_after(decoder, PROMPT, [[token] for token in ids[len(PROMPT) :]])
    assert same(remembered(cache), expected)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_show_in_the_states(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[HybridCache, int], None]
) -> None:
    monkeypatch.setattr(HybridCache, "rollback", mistake)
    for kept in range(1, len(CHUNK)):
        expected = states_after(decoder, PROMPT, ONE_BY_ONE[:kept])
        assert not same(went_back(decoder, PROMPT, kept, (CHUNK,)), expected)


SIZES = RecurrentSizes(frozenset({0}), num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=6, window=3)


def new_cache(num_snapshots: int, dtype: torch.dtype = torch.float32) -> HybridCache:
    return HybridCache([], [0], SIZES, 1, 2, 300, num_snapshots, dtype, CPU)


def new_net(seed: int = 0) -> DeltaNet:
    torch.manual_seed(seed)
    return DeltaNet(
        sizes=SIZES,
        conv_WC=torch.randn(4, SIZES.channels),
        decay_H=-torch.rand(4),
        time_bias_H=torch.randn(4),
        norm_E=torch.randn(6),
        norm_eps=1e-6,
    )


def by_definition(net: DeltaNet, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The gated delta rule, number by number where that can be: outputs `[S, H E]` and the last state `[H, D, E]`."""
    mixed, gates, strengths, steps = torch.split(projected.double(), [SIZES.channels, 24, 4, 4], dim=-1)
    state, outputs = torch.zeros(4, 8, 6, dtype=torch.float64), []
    for s in range(len(projected)):
        seen = [mixed[t] if t >= 0 else torch.zeros(SIZES.channels) for t in range(s - 3, s + 1)]
        row = silu(sum(x * w for x, w in zip(seen, net.conv_WC.double(), strict=True)))
        out = []
        for h in range(4):
            k = h // 2
            query, key, value = row[8 * k : 8 * k + 8], row[16 + 8 * k : 24 + 8 * k], row[32 + 6 * h : 38 + 6 * h]
            query, key = (part / (part.square().sum() + 1e-6).sqrt() for part in (query, key))
            rate = softplus(steps[s, h] + net.time_bias_H[h])
            state[h] *= torch.exp(net.decay_H[h] * rate)
            state[h] += torch.outer(key, (value - key @ state[h]) * strengths[s, h].sigmoid())
            read = (query / 8**0.5) @ state[h]
            normed = read / (read.square().mean() + 1e-6).sqrt() * net.norm_E
            out.append(normed * silu(gates[s, 6 * h : 6 * h + 6]))
        outputs.append(torch.cat(out))
    return torch.stack(outputs), state


@pytest.mark.parametrize("num_rows", [1, 2, 64, 65, 130])
def test_rows_are_those_of_the_definition(num_rows: int) -> None:
    net, cache = new_net(), new_cache(2)
    projected = torch.randn(num_rows, SIZES.channels + 24 + 8)
    expected, state = by_definition(net, projected)
    found = delta_net(net, projected, cache, 0)
    cache.advance(num_rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.states(0)[1][cache.slot(0)].double(), state, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_agrees_with_the_reference(dtype: torch.dtype) -> None:
    net, ops = new_net(), CpuOps(layer_ops.Geometry(1, 1, 2, 1e-6), dtype)
    near, far = new_cache(4, dtype), new_cache(4, dtype)
    near_enough = 1e-4 if dtype == torch.float32 else 0.03
    for num_rows in (3, 1, 5, 20):
        projected = torch.randn(num_rows, SIZES.channels + 24 + 8).to(dtype)
        found, expected = ops.delta_net(net, projected, near, 0), delta_net(net, projected, far, 0)
        torch.testing.assert_close(found, expected, rtol=near_enough, atol=near_enough)
        for cache in (near, far):
            cache.advance(num_rows)
        for parts in zip(near.states(0), far.states(0), strict=True):
            torch.testing.assert_close(*parts, rtol=near_enough, atol=near_enough)


def test_a_cache_says_that_it_does_not_go_back_as_far_as_that() -> None:
    cache = new_cache(2)
    for num_rows in (5, 1):
        cache.claim(num_rows, every_state=True)
        cache.advance(num_rows)
    cache.rollback(7)
    cache.rollback(4)
    with pytest.raises(IndexError, match="a cache of 4 tokens holds recurrent states back to 4, not to 3: it keeps 2"):
        cache.rollback(3)
    cache.rollback(0)
    assert cache.length == 0


def test_a_cancelled_pass_takes_the_oldest_snapshot_with_it() -> None:
    cache = new_cache(2)
    cache.claim(5, every_state=True)
    cache.advance(5)
    cache.claim(1, every_state=True)  # and the pass ends before the cache is advanced
    cache.rollback(4)
    with pytest.raises(IndexError, match="back to 4"):
        cache.rollback(3)


def test_after_a_prompt_in_blocks_only_its_last_state_is_there() -> None:
    cache = new_cache(4)
    delta_net(new_net(), torch.randn(100, SIZES.channels + 24 + 8), cache, 0)
    cache.advance(100)
    with pytest.raises(IndexError, match="back to 100"):
        cache.rollback(99)


def test_a_new_sequence_in_an_old_cache_starts_from_zeros() -> None:
    net, cache = new_net(), new_cache(0)
    projected = torch.randn(7, SIZES.channels + 24 + 8)
    first = delta_net(net, projected, cache, 0)
    cache.advance(7)
    cache.rollback(0)
    torch.testing.assert_close(delta_net(net, projected, cache, 0), first, rtol=0, atol=0)


def test_branches_and_full_caches_are_refused(decoder: Decoder) -> None:
    cache = decoder.new_cache(6, range(2), 3)
    hidden = decoder.embed(decoder.ids(PROMPT))
    decoder.forward(hidden[:4], 0, cache, range(2))
    with pytest.raises(NotImplementedError, match="no branch"):
        cache.keep(0, [0, 2])
    with pytest.raises(IndexError, match="cannot hold 8"):
        decoder.forward(hidden[:4], 4, cache, range(2))
    assert not decoder.takes_trees


def test_snapshots_have_a_price(decoder: Decoder) -> None:
    one = 3 * (2 * 2 * 8 + 4 * 6) * 4 + 4 * 8 * 6 * 4
    assert decoder.snapshot_bytes(range(6)) == 4 * one
    assert decoder.snapshot_bytes(range(2, 4)) == one
    assert decoder.snapshot_bytes(range(2, 3)) == 0


def test_pairs_that_are_rotated_lie_half_a_head_apart() -> None:
    order = rotary_order(8, 4)
    assert sorted(order) == list(range(8))
    assert [(order[i], order[i + 4]) for i in range(2)] == [(0, 2), (1, 3)]
    assert rotary_order(8, 8) == list(range(8))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"linear_num_value_heads": 3}, "linear_num_value_heads is 3, expected a multiple of the 2"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim is 0, expected at least 1"),
        (
            {"layer_types": ["full_attention"] * 5 + ["sliding_attention"]},
            "layer_types is .* expected linear_attention",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.1}},
            "rotates 0 of the 8",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}},
            "rotates 12 of the 8",
        ),
    ],
)
def test_configs_that_cannot_be(folder: Path, tmp_path: Path, change: dict[str, Any], why: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=why):
        tiny.load(tmp_path)


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.linear_attn.conv1d.weight"
    save_file({**tensors, name: tensors[name][:, :, :3].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"linear_attn.conv1d.weight has shape \[56, 1, 3\], expected \[56, 1, 4\]"):
        tiny.load(tmp_path).decoder  # noqa: B018
