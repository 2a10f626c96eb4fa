"""EAGLE's head against the method written out in plain torch, and its trees against the same tokens in a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from spdbench.models.attention_context import TreeRows
from spdbench.models.decoder import Decoder
from spdbench_backends.eagle.build import build_eagle, random_eagle
from spdbench_backends.eagle.formats import EagleFile
from spdbench_backends.eagle.head import EagleModule
from tests import tiny
from tests.unit.draft_verify.eagle_files import eagle3_shapes

EPS = 1e-6
HEADS, KV, SIZE = 4, 2, 8


def loud(file: EagleFile, **config: Any) -> EagleFile:
    """The head with weights large enough to tell things apart, and norms that are not all ones."""
    generator = torch.Generator().manual_seed(9)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in file.tensors.items()}
    tensors |= {name: 1 + tensor for name, tensor in tensors.items() if tensor.dim() == 1}
    return replace(file, tensors=tensors, config=file.config.model_copy(update=config))


def rotated(x_SHD: Tensor, positions: Tensor) -> Tensor:
    angles = torch.outer(positions.double(), 10_000.0 ** -(torch.arange(0, SIZE, 2) / SIZE))
    cos, sin = torch.cat([angles.cos()] * 2, -1)[:, None], torch.cat([angles.sin()] * 2, -1)[:, None]
    low, high = x_SHD.chunk(2, dim=-1)
    return x_SHD * cos + torch.cat((-high, low), dim=-1) * sin


def reference(file: EagleFile, target: Decoder, inputs: list[Tensor], ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and state of the last of some rows, each with its own feature of draft width or of target width; in
    float64, so that what is compared with it has all of the tolerance for its own rounding."""
    weights = {name: tensor.double() for name, tensor in file.tensors.items()}
    config, eagle3 = file.config, file.is_eagle3
    assert target.embeddings_VM is not None
    assert target.head is not None
    targets_head = target.head.plain().double()

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, x.shape[-1:], weights[name], EPS)

    features = []
    for feature in (each.double() for each in inputs):
        if eagle3 and feature.shape[-1] == weights["fc.weight"].shape[1]:
            if "fc_norm.0.weight" in weights:
                feature = torch.cat(
                    [norm(c, f"fc_norm.{i}.weight") for i, c in enumerate(feature.chunk(3, dim=-1))], -1
                )
            if "input_norm.weight" in weights:
                feature = norm(feature, "input_norm.weight")
            feature = linear(feature, weights["fc.weight"])
        features.append(feature)
    feature_SM, embedded_SM = (
        torch.stack(features),
        weights.get("embed_tokens.weight", target.embeddings_VM)[ids].double(),
    )
    p = "layers.0."
    if eagle3:
        normed = norm(feature_SM, p + "hidden_norm.weight")
        x = torch.cat((norm(embedded_SM, p + "input_layernorm.weight"), normed), dim=-1)
        residual = normed if config.norm_before_residual else feature_SM
    else:
        residual = x = linear(
            torch.cat((embedded_SM, feature_SM), dim=-1), weights["fc.weight"], weights.get("fc.bias")
        )
    for index in range(2 if "layers.1.mlp.up_proj.weight" in weights else 1):
        p = f"layers.{index}."
        if index:
            x = norm(residual, p + "input_layernorm.weight")
        q, k, v = (
            linear(x, weights[f"{p}self_attn.{n}_proj.weight"], weights.get(f"{p}self_attn.{n}_proj.bias")).view(
                len(ids), -1, SIZE
            )
            for n in "qkv"
        )
        if p + "self_attn.q_norm.weight" in weights:
            q, k = norm(q, p + "self_attn.q_norm.weight"), norm(k, p + "self_attn.k_norm.weight")
        positions = torch.arange(len(ids))
        q, k = rotated(q, positions), rotated(k, positions)
        k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
        scores = torch.einsum("shd,thd->hst", q, k) / SIZE**0.5
        scores = scores.masked_fill(~torch.ones(len(ids), len(ids)).tril().bool(), -torch.inf)
        mixed = torch.einsum("hst,thd->shd", scores.softmax(-1), v).flatten(1)
        hidden = residual + linear(mixed, weights[p + "self_attn.o_proj.weight"])
        y = norm(hidden, p + "post_attention_layernorm.weight")
        gated = silu(linear(y, weights[p + "mlp.gate_proj.weight"])) * linear(y, weights[p + "mlp.up_proj.weight"])
        residual = hidden + linear(gated, weights[p + "mlp.down_proj.weight"])
    last = residual[-1:]
    if not eagle3:
        return linear(last, targets_head), last
    out = norm(last, "norm.weight")
    return linear(out, weights.get("lm_head.weight", targets_head)), out if config.norm_output else last


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest number: sums are rounded on that scale."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=1e-5)


def variants() -> list[Any]:
    extra = {"fc_norms": {f"fc_norm.{i}.weight": (32,) for i in range(3)}, "input_norm": {"input_norm.weight": (96,)}}
    second = {
        **{f"layers.1.self_attn.{n}_proj.weight": (r, 32) for n, r in (("q", 32), ("k", 16), ("v", 16), ("o", 32))},
        **{f"layers.1.mlp.{n}_proj.weight": s for n, s in (("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48)))},
        "layers.1.input_layernorm.weight": (32,),
        "layers.1.post_attention_layernorm.weight": (32,),
    }
    whole = {"embed_tokens.weight": (262, 16), "lm_head.weight": (262, 16)}
    wide = {"embed_tokens.weight": (262, 48), "lm_head.weight": (262, 48)}
    return [
        pytest.param(3, {}, {}, id="eagle3"),
        pytest.param(1, {}, {}, id="eagle1"),
        pytest.param(1, {"fc.bias": (32,)}, {}, id="eagle1-bias"),
        pytest.param(3, extra["fc_norms"], {}, id="fc_norm"),
        pytest.param(3, extra["input_norm"], {}, id="norm_before_fc"),
        pytest.param(3, {}, {"norm_before_residual": True}, id="norm_before_residual"),
        pytest.param(3, {}, {"norm_output": True}, id="norm_output"),
        pytest.param(3, second, {}, id="two-layers"),
        pytest.param(1, second, {}, id="eagle1-two-layers"),
        pytest.param(3, {"lm_head.weight": (262, 32)}, {}, id="own-head"),
        pytest.param(3, {f"layers.0.self_attn.{n}_norm.weight": (SIZE,) for n in "qk"}, {}, id="head-norms"),
        pytest.param(
            3,
            {f"layers.0.self_attn.{n}_proj.bias": (r,) for n, r in zip("qkv", (32, 16, 16), strict=True)},
            {},
            id="biases",
        ),
        pytest.param(
            3, second | extra["fc_norms"], {"norm_output": True, "norm_before_residual": True}, id="everything"
        ),
        pytest.param(3, eagle3_shapes(width=16) | whole, {"target_hidden_size": 32}, id="narrow"),
        pytest.param(3, eagle3_shapes(width=48) | wide, {"target_hidden_size": 32, "norm_output": True}, id="wide"),
        pytest.param(
            3,
            eagle3_shapes(num_aux=2) | {"lm_head.weight": (262, 32)},
            {"aux_hidden_states": (1, 5)},
            id="two-features",
        ),
    ]


@pytest.mark.parametrize(("version", "more", "config"), variants())
def test_committed_rows_and_trees_equal_the_method_written_out(
    decoder: Decoder, version: Any, more: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    plain = random_eagle(decoder, 3, version)
    width = more.get("fc.weight", (32,))[0]
    sizes = {"hidden_size": width}
    file = loud(
        replace(plain, tensors={**plain.tensors, **{n: torch.zeros(s) for n, s in more.items()}}), **sizes, **config
    )
    module = EagleModule(build_eagle(file, decoder), 64)
    features = list(
        torch.randn(
            7, file.tensors["fc.weight"].shape[1] if version == 3 else 32, generator=torch.Generator().manual_seed(1)
        )
    )
    ids = [5, 6, 7, 8, 9, 10, 11]
    with torch.inference_mode():
        module.extend(torch.stack(features[:3]), torch.tensor(ids[:3]))
        logits, state = module.extend(torch.stack(features[3:]), torch.tensor(ids[3:]))
        expected, fed = reference(file, decoder, features, ids)
        assert_close(logits, expected)
        assert_close(state, fed)
        alone = EagleModule(module.weights, 64)
        for feature, token in zip(features, ids, strict=True):
            one_by_one, _ = alone.extend(feature[None], torch.tensor([token]))
        assert_close(one_by_one, expected)
        # two children of the newest token, then a child of the second
        level = TreeRows(torch.tensor([0, 0]), torch.eye(2).bool())
        logits, states = module.extend_tree(state.expand(2, -1), torch.tensor([20, 21]), level)
        for row, token in enumerate((20, 21)):
            expected, child = reference(file, decoder, [*features, fed[0]], [*ids, token])
            assert_close(logits[row : row + 1], expected)
        deeper = TreeRows(torch.tensor([1]), torch.tensor([[False, True, True]]))
        logits, _ = module.extend_tree(states[1:], torch.tensor([22]), deeper)
        expected, _ = reference(file, decoder, [*features, fed[0], child[0]], [*ids, 21, 22])
        assert_close(logits, expected)
        # the tree is forgotten when committed rows arrive
        logits, _ = module.extend(torch.stack(features[:1]), torch.tensor([30]))
        expected, _ = reference(file, decoder, [*features, features[0]], [*ids, 30])
        assert_close(logits, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_have_the_bits_of_steps_that_are_not(tiny_model: Path, dtype: str) -> None:
    decoder = tiny.load(tiny_model, dtype).own_decoder
    weights = build_eagle(loud(random_eagle(decoder, 3, 3)), decoder)
    recorded, plain = EagleModule(weights, 64), EagleModule(weights, 64)
    assert recorded._recorded is not None
    plain._recorded = None
    features = torch.randn(9, weights.fc.plain().shape[1], generator=torch.Generator().manual_seed(2)).to(weights.dtype)
    wide = TreeRows(torch.tensor([0, 0]), torch.eye(2).bool())
    deeper = TreeRows(torch.tensor([1]), torch.tensor([[False, True, True]]))

    def run(module: EagleModule) -> list[torch.Tensor]:
        found = []
        for begin, end in ((0, 5), (5, 7), (7, 9)):
            logits, states = module.extend(features[begin:end], torch.arange(begin, end))
            found += [logits.clone(), states.clone()]
            logits, states = module.extend_tree(states.expand(2, -1), torch.tensor([20, 21]), wide)
            found += [logits.clone(), states.clone()]
            logits, states = module.extend_tree(states[1:], torch.tensor([22]), deeper)
            found += [logits.clone(), states.clone()]
        return found

    with torch.inference_mode():
        for one, other in zip(run(recorded), run(plain), strict=True):
            assert torch.equal(one, other)
    assert set(recorded._recorded) == {(5, None), (2, None), (2, 2), (1, 3)}
