"""A layer over tensors that stay in place gives the eager layer's results, whatever the bucket and the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.decoding.autoregressive import CapturedDecoding
from spdbench.decoding.tree import from_paths
from spdbench.models.attention_context import TreeRows
from spdbench.models.cuda.captured_decoder import CapturedDecoder
from spdbench.models.cuda.captured_layers import CapturedLayers, captured_layer
from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import KVCache
from tests import tiny

PROMPT = tuple(range(30, 41))
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return tiny.load(tiny.make_model(tmp_path_factory.mktemp("static") / request.param, request.param)).own_decoder


def prefilled(decoder: Decoder, cache: KVCache) -> None:
    decoder.forward(decoder.embed(decoder.ids(PROMPT)), 0, cache)


@torch.inference_mode()
def test_one_row_at_any_length_gives_the_eager_logits(family: Decoder) -> None:
    decoding, cache = CapturedDecoding(family, 40), family.new_cache(40)
    decoding.prefill(PROMPT)
    prefilled(family, cache)
    decoding.token_1.fill_(7)
    token = 7
    for length in range(len(PROMPT) + 1, 40):
        logits_1V = decoding.step(length)
        hidden_SM, _ = family.forward(family.embed(family.ids((token,))), cache.length, cache)
        expected = family.logits(hidden_SM)
        torch.testing.assert_close(logits_1V, expected, rtol=1e-4, atol=1e-4)
        token = int(decoding.token_1)
        assert token == int(expected.argmax())
        assert int(decoding.position_1) == length


@pytest.mark.parametrize("shape", ["chain", "tree"])
@torch.inference_mode()
def test_rows_of_chains_and_trees_give_the_eager_rows_and_states(family: Decoder, shape: str) -> None:
    tree: TreeRows | None = None
    ids = [5, 9, 11, 12, 13]
    if shape == "tree":
        tree = from_paths([(0,), (1,), (0, 0), (1, 0)]).rows
    captured, cache = CapturedDecoder(family, (5,), 60, hidden_indices=(0, 2, 6)), family.new_cache(60)
    own_cache = captured.new_cache(60)
    assert isinstance(own_cache, KVCache)
    prefilled(family, own_cache)
    prefilled(family, cache)
    for _ in range(3):
        rows_SM = family.embed(family.ids(ids))
        expected, states = family.forward(rows_SM, cache.length, cache, hidden_indices=(0, 2, 6), tree=tree)
        logits = family.logits(expected)
        found, seen = captured.forward(rows_SM, own_cache.length, own_cache, hidden_indices=(0, 2, 6), tree=tree)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(captured.logits(found), logits, rtol=1e-4, atol=1e-4)
        for index in (0, 2, 6):
            torch.testing.assert_close(seen[index], states[index], rtol=1e-4, atol=1e-4)
        for each in (cache, own_cache):
            each.keep(each.length - 5, (0, 1, 3) if shape == "tree" else (0, 1))
        ids = [token + 3 for token in ids]


@torch.inference_mode()
def test_what_was_not_captured_takes_the_eager_path_into_the_same_cache(decoder: Decoder) -> None:
    captured = CapturedDecoder(decoder, (1,), 60)
    cache, plain = captured.new_cache(30), decoder.new_cache(30)
    for count in (4, 1, 3, 1, 1):
        rows_SM = decoder.embed(decoder.ids(range(count)))
        found, _ = captured.forward(rows_SM, cache.length, cache)  # type: ignore[arg-type]
        expected, _ = decoder.forward(rows_SM, plain.length, plain)
        torch.testing.assert_close(captured.logits(found), decoder.logits(expected), rtol=1e-4, atol=1e-4)
    assert cache.length == plain.length == 10
    assert captured.new_cache(61) is not cache
    assert captured.new_cache(60) is cache
    assert cache.length == 0


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that took the eager path."""
    counts: list[int] = []
    forward = Decoder.forward

    def noted(self: Decoder, hidden_SM: torch.Tensor, *more: Any, **named: Any) -> Any:
        counts.append(len(hidden_SM))
        return forward(self, hidden_SM, *more, **named)

    monkeypatch.setattr(Decoder, "forward", noted)
    return counts


@torch.inference_mode()
def test_a_chain_is_filled_up_to_what_was_captured(decoder: Decoder, eager: list[int]) -> None:
    captured = CapturedDecoder(decoder, (1, 4), 12, hidden_indices=(2,))
    cache, plain = captured.new_cache(12), decoder.new_cache(12)
    for count in (2, 3, 1, 2, 4):
        rows_SM = decoder.embed(decoder.ids(range(count)))
        found, states = captured.forward(rows_SM, cache.length, cache, hidden_indices=(2,))  # type: ignore[arg-type]
        assert eager == []
        expected, theirs = decoder.forward(rows_SM, plain.length, plain, hidden_indices=(2,))
        eager.clear()
        assert len(found) == len(states[2]) == count
        torch.testing.assert_close(captured.logits(found), decoder.logits(expected), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states[2], theirs[2], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_cannot_be_filled_up_takes_the_eager_path(decoder: Decoder, eager: list[int]) -> None:
    """A tree, whose rows are seen by what it says, and a chain that would then reach past the cache."""
    captured = CapturedDecoder(decoder, (1, 4), 12)
    cache = captured.new_cache(12)
    tree = from_paths([(0,), (1,)]).rows
    captured.forward(decoder.embed(decoder.ids(range(3))), 0, cache, tree=tree)  # type: ignore[arg-type]
    cache.advance(6)  # type: ignore[attr-defined]
    captured.forward(decoder.embed(decoder.ids(range(2))), 9, cache)  # type: ignore[arg-type]
    assert eager == [3, 2]


@torch.inference_mode()
def test_a_stages_layers_can_be_captured_by_themselves(tiny_model: Path) -> None:
    """As a stage in a process of its own does on a GPU."""
    target = tiny.load(tiny_model)
    whole = target.own_decoder
    for layers in (range(2), range(2, 5), range(5, 6)):
        part = target.load_layers(layers)
        assert isinstance(part, Decoder)
        captured, plain = CapturedDecoder(part, (1,), 40, hidden_indices=(3, 6)), whole.new_cache(30, layers)
        cache, hidden_indices = captured.new_cache(30, layers), [index for index in (3, 6) if index - 1 in layers]
        rows_SM = torch.randn(9, whole.config.hidden_size, generator=torch.Generator().manual_seed(1))
        for some_SM in (rows_SM[:5], rows_SM[5:6], rows_SM[6:7], rows_SM[7:8]):
            found, states = captured.forward(some_SM, cache.length, cache, layers, hidden_indices)  # type: ignore[arg-type]
            expected, theirs = whole.forward(some_SM, plain.length, plain, layers, hidden_indices)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            for index in hidden_indices:
                torch.testing.assert_close(states[index], theirs[index], rtol=1e-4, atol=1e-4)
        if part.head is not None:
            torch.testing.assert_close(captured.logits(found), whole.logits(expected), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_layer_can_be_traced_as_a_whole(decoder: Decoder) -> None:
    """What `compiled` asks of torch.compile; the code for a GPU is made where there is one."""
    from spdbench.models.cpu.linear import PlainLinear
    from spdbench.models.layers import LayerWeights

    def plain(weights: LayerWeights) -> LayerWeights:
        """As a GPU has them; packed weights are a CPU's."""
        assert weights.gate_up is not None
        assert weights.down is not None
        return LayerWeights(
            weights.input_norm,
            PlainLinear(weights.qkv.plain().clone()),
            weights.head_norms,
            PlainLinear(weights.out.plain().clone()),
            weights.post_norm,
            PlainLinear(weights.gate_up.plain().clone()),
            PlainLinear(weights.down.plain().clone()),
            None,
            None,
        )

    cache = decoder.new_cache(16)
    layers = CapturedLayers(decoder.weights, decoder.geometry, decoder.rotary, cache)
    context = layers.chain(torch.tensor([3]), 16)
    rows_SM = torch.randn(1, decoder.config.hidden_size)
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: object) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    traced = torch.compile(captured_layer, backend=backend, fullgraph=True, dynamic=False)
    for layer in range(3):
        keys, values = cache.slots(layer)
        angles = context.cos_S1D, context.sin_S1D
        inputs = (
            *(plain(decoder.weights[layer]), layers._ops, rows_SM, rows_SM, keys, values, context.slots_S, angles),
            *(context.mask_RB[None], False),
        )
        torch.testing.assert_close(traced(*inputs), captured_layer(*inputs))
    assert graphs == 1, "every layer is the same code"
