"""The paper's drafter (arXiv 2605.30852), written down plainly: a draft from a published file's tensors, in float64.

It shares no code with the drafter that it checks: names, shapes, norms, rotary positions, rows and their cache are all
here once more, one row after the other and with the whole cache as lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

Row = tuple[int, int]
"""A position, and the depth that it is read at."""


def layer_shapes(config: Mapping[str, Any], index: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a draft layer, by the table of section 3."""
    width, heads, kv, size = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    doubled = 2 if config["model_type"].startswith("qwen3_5") else 1
    prefix = f"spec_layers.{index}."
    return {
        prefix + "self_attn.q_proj.weight": (doubled * heads * size, width),
        prefix + "self_attn.k_proj.weight": (kv * size, width),
        prefix + "self_attn.v_proj.weight": (kv * size, width),
        prefix + "self_attn.o_proj.weight": (width, heads * size),
        prefix + "self_attn.q_norm.weight": (size,),
        prefix + "self_attn.k_norm.weight": (size,),
        prefix + "mlp.gate_proj.weight": (ffn, width),
        prefix + "mlp.up_proj.weight": (ffn, width),
        prefix + "mlp.down_proj.weight": (width, ffn),
        prefix + "input_layernorm.weight": (width,),
        prefix + "post_attention_layernorm.weight": (width,),
    }


class Transcription:
    """One sequence's drafts by the head in `file` for the model in `folder`. `features[p]` are the hidden states that
    exist of position p, by index; the caller keeps them."""

    def __init__(self, file: Path, folder: Path, features: Mapping[int, Mapping[int, Tensor]]) -> None:
        content = torch.load(file, weights_only=True)
        self.head: Any = content["config"]
        self.tensors: dict[str, Tensor] = {name: tensor.double() for name, tensor in content["state_dict"].items()}
        self.base = json.loads((folder / "config.json").read_text())
        self.final_norm: Tensor = load_file(folder / "model.safetensors")["model.norm.weight"].double()
        self.eps = float(self.base["rms_norm_eps"])
        self.hybrid = self.base["model_type"].startswith("qwen3_5")
        self.features = features
        self.num_stages = self.head["num_stages"]
        self.num_layers = self.base["num_hidden_layers"]
        self.cache: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(self.head["num_spec_layers"])]
        self.evicted: int | None = None

    def start(self, prompt_length: int) -> None:
        """Rows of positions 0 to s0 - n, all at depth n."""
        rows = [(p, self.num_stages) for p in range(max(0, prompt_length - self.num_stages + 1))]
        if rows:
            self._run(rows)

    def rejected(self, length: int) -> None:
        self.evicted = None
        self._crop(length)

    def logits(self, newest: int) -> Tensor:
        """Draft logits over the draft vocabulary for the token behind position `newest`."""
        n = self.num_stages
        rows = [] if self.evicted is None else [(newest - n, n)]
        rows += [(p, newest - p) for p in range(max(0, newest - n + 1), newest + 1)]
        if self.head.get("trained_with_use_deepest"):
            cap = n if self.evicted is None else n - 1
            first = 0 if self.evicted is None else 1
            rows[first:-1] = [(p, self._deepest(p, cap)) for p, _ in rows[first:-1]]
        self._crop(rows[0][0])
        return self.tensors["lm_head.weight"] @ self._norm(self._run(rows), self.final_norm)

    def _crop(self, length: int) -> None:
        for layer in self.cache:
            del layer[length:]

    def _deepest(self, position: int, cap: int) -> int:
        exist = self.features[position]
        anchors = self.head["aggr_feature_bound"]
        return max(d for d in range(cap + 1) if all(a in exist for a in anchors[: self._row_type(d) + 1]))

    def _row_type(self, depth: int) -> int:
        """f(d), of the layers that a token of this depth has passed."""
        listed = self.head.get("stage_layers") or [self.num_layers // self.num_stages] * self.num_stages
        counts = [int(part) for part in listed.split(";")] if isinstance(listed, str) else listed
        anchors = self.head["aggr_feature_bound"]
        return max(i for i, anchor in enumerate(anchors) if anchor <= min(self.num_layers, sum(counts[:depth])))

    def _state(self, position: int, indices: Sequence[int]) -> Tensor:
        return torch.cat([self.features[position][index].double() for index in indices])

    def _run(self, rows: Sequence[Row]) -> Tensor:
        """The last layer's output for the last row; all rows stay in the cache."""
        if self.head["version"] == 10:
            return self._run_grouped(rows)
        anchors = self.head["aggr_feature_bound"]
        hidden: list[Tensor] = []
        for position, depth in rows:
            kind = self._row_type(depth)
            hidden.append(self.tensors[f"aggr_projs.{kind}.weight"] @ self._state(position, anchors[: kind + 1]))
        for layer in range(len(self.cache)):
            hidden = self._layer(layer, rows, hidden)
        return hidden[-1]

    def _run_grouped(self, rows: Sequence[Row]) -> Tensor:
        n, groups = self.num_stages, self.head["shallow_hidden_layer_indices"]
        roles = {n + 1: list(range(n, -1, -1)), n: list(range(n - 1, -1, -1))}.get(len(rows), [n] * len(rows))
        if any(depth == 0 for _, depth in rows):  # a cycle
            assert roles == [depth for _, depth in rows]
        base = []
        for (position, depth), _ in zip(rows, roles, strict=True):
            if depth == 0:
                base.append(self.tensors["g0_proj.weight"] @ self._state(position, [0]))
            else:
                group = groups[n - depth]
                base.append(self.tensors[f"stage_projs.{n - depth}.weight"] @ self._state(position, group))
        carried = base[-1]
        for layer in range(len(self.cache)):
            hidden = [
                carried
                if depth == 0
                else self.tensors[f"fixed_stage_per_layer_projs.{layer}.{n - depth}.weight"] @ features
                for (_, depth), features in zip(rows, base, strict=True)
            ]
            carried = self._layer(layer, rows, hidden)[-1]
        return carried

    def _layer(self, index: int, rows: Sequence[Row], hidden: Sequence[Tensor]) -> list[Tensor]:
        prefix, size = f"spec_layers.{index}.", self.base["head_dim"]
        heads, kv = self.base["num_attention_heads"], self.base["num_key_value_heads"]

        def weight(name: str) -> Tensor:
            return self.tensors[prefix + name + ".weight"]

        out = []
        for (position, _), x in zip(rows, hidden, strict=True):
            normed = self._norm(x, weight("input_layernorm"))
            queries = (weight("self_attn.q_proj") @ normed).view(heads, -1)
            keys = (weight("self_attn.k_proj") @ normed).view(kv, size)
            values = (weight("self_attn.v_proj") @ normed).view(kv, size)
            gates = queries[:, size:].sigmoid() if self.hybrid else torch.ones(heads, size)
            queries = self._rotated(self._norm(queries[:, :size], weight("self_attn.q_norm")), position)
            keys = self._rotated(self._norm(keys, weight("self_attn.k_norm")), position)
            assert len(self.cache[index]) == position
            self.cache[index].append((position, keys, values))
            attended = []
            for h in range(heads):
                k = h // (heads // kv)
                scores = torch.stack([queries[h] @ past[k] / size**0.5 for _, past, _ in self.cache[index]])
                shares = scores.softmax(dim=0)
                mixed = sum(share * past[k] for share, (_, _, past) in zip(shares, self.cache[index], strict=True))
                attended.append(mixed * gates[h])
            y = x + weight("self_attn.o_proj") @ torch.cat(attended)
            normed = self._norm(y, weight("post_attention_layernorm"))
            inner = silu(weight("mlp.gate_proj") @ normed) * (weight("mlp.up_proj") @ normed)
            out.append(y + weight("mlp.down_proj") @ inner)
        return out

    def _norm(self, x: Tensor, w: Tensor) -> Tensor:
        scale = 1 + w if self.hybrid else w
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * scale

    def _rotated(self, heads: Tensor, position: int) -> Tensor:
        rope = self.base["rope_parameters"]
        size = int(heads.shape[-1] * rope.get("partial_rotary_factor", 1.0)) if self.hybrid else heads.shape[-1]
        half, out = size // 2, heads.clone()
        for i in range(half):
            angle = torch.tensor(position * rope["rope_theta"] ** (-2 * i / size), dtype=torch.float64)
            low, high = heads[:, i], heads[:, half + i]
            out[:, i] = low * angle.cos() - high * angle.sin()
            out[:, half + i] = high * angle.cos() + low * angle.sin()
        return out


Published = Callable[[Path, Path], Path]


def write_head(
    file: Path,
    folder: Path,
    version: int,
    *,
    num_stages: int = 3,
    num_spec_layers: int = 2,
    ffn: int | None = None,
    ids: Sequence[int] = tuple(range(0, 262, 2)),
    seed: int = 5,
    **config: Any,
) -> Path:
    """A published file with random tensors for the model in `folder`."""
    base = json.loads((folder / "config.json").read_text())
    width, layers = base["hidden_size"], base["num_hidden_layers"]
    full: dict[str, Any] = {
        "version": version,
        "hidden_size": width,
        "vocab_size": base["vocab_size"],
        "draft_vocab_size": len(ids),
        "draft_token_ids": list(ids),
        "num_stages": num_stages,
        "num_spec_layers": num_spec_layers,
        "model_type": base["model_type"],
        **config,
    }
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (len(ids), width)}
    for index in range(num_spec_layers):
        shapes |= layer_shapes(base, index, ffn or base["intermediate_size"])
    if version == 10:
        per_stage = layers // num_stages
        groups = [[0, per_stage], [0, per_stage, 2 * per_stage]]
        groups += [[0, i * per_stage // 3, 2 * (i * per_stage // 3), i * per_stage] for i in range(3, num_stages + 1)]
        groups = [[min(index, layers - 2) for index in group] for group in groups[:num_stages]]
        full.setdefault("shallow_hidden_layer_indices", groups[::-1])
        shapes["g0_proj.weight"] = (width, width)
        for i, group in enumerate(groups[::-1]):
            shapes[f"stage_projs.{i}.weight"] = (width, len(group) * width)
            for layer in range(num_spec_layers):
                shapes[f"fixed_stage_per_layer_projs.{layer}.{i}.weight"] = (width, width)
    else:
        full.setdefault("aggr_feature_bound", [0, 2, 5, 6])
        full["num_aggr_types"] = len(full["aggr_feature_bound"])
        for i in range(len(full["aggr_feature_bound"])):
            shapes[f"aggr_projs.{i}.weight"] = (width, (i + 1) * width)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    torch.save({"state_dict": state, "config": full}, file)
    return file
