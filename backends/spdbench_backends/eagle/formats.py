"""EAGLE heads as they lie on disk: SafeAILab's, SpecForge's, speculators' and our own layout.

Reading ends in one set of names, SafeAILab's with `layers.0.` for `midlayer.`, and one config; what a tensor means for
a target is `build`'s business. Strict about what it does not know: an EAGLE head with a tensor too few drafts
nonsense, and nothing else would tell.

Source: METHODS.md A.7. Must not know of targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from spdbench.errors import InputError, validated
from spdbench.models.checkpoints.weights import FLOATS, Checkpoint, sha256_of_files
from spdbench_backends.drafter_files import load_tensors, read_config, require_version

Layout = Literal["safeailab", "specforge", "speculators", "spdbench"]

PREFIXES = ("model.", "draft_model.")
RENAMED = {"midlayer.": "layers.0.", "fusion_fc.": "fc.", "transformer.": "layers.0."}
NOT_THE_HEADS = ("verifier_lm_head.", "verifier_norm.")
REFUSED = {
    "embedding_layernorm.": "a norm on the embedding",
    "pre_lm_head_layernorm.": "a norm before the head in EAGLE-1",
    "mask_hidden": "parallel drafting",
}
INDICES = ("d2t", "t2d")
"""Tensors of whole numbers or truth values; all others are floating-point."""

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""What speculators calls a target of each family."""


class EagleConfig(BaseModel):
    """What of a head's config matters, under one set of names. Sizes that it leaves out are told by the tensors."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    num_attention_heads: int | None = Field(None, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=2)
    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    num_hidden_layers: int | None = Field(None, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    draft_vocab_size: int | None = Field(None, ge=1)
    target_hidden_size: int | None = Field(None, ge=1)
    max_position_embeddings: int = Field(2048, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    hidden_act: Literal["silu"] = "silu"
    rope_theta: float = Field(10000.0, gt=0, allow_inf_nan=False)
    rope_scaling: dict[str, Any] | None = None
    """Rotary positions that are not the plain ones, as transformers writes them."""
    sliding_window: int | None = Field(None, ge=1)
    target_family: str | None = None
    aux_ids: tuple[int, ...] | None = Field(None, strict=False)
    bias: bool | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool | None = None
    fc_norm: bool | None = None
    norm_output: bool = False
    draft_token_ids: tuple[int, ...] | None = Field(None, strict=False, min_length=1)
    trained_tokens: int | None = Field(None, ge=0)
    acceptance_by_position: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((), strict=False)


@dataclass(frozen=True)
class EagleFile:
    """A head as read. `extra` are keys of our own folders that say where it comes from."""

    path: Path
    layout: Layout
    config: EagleConfig
    tensors: Mapping[str, Tensor]
    sha256: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained_tokens(self) -> int | None:
        return self.config.trained_tokens

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        return self.config.acceptance_by_position

    @property
    def is_eagle3(self) -> bool:
        """Told by what layer 0 reads: embedding beside feature in EAGLE-3, what `fc` made of both in EAGLE-1/2."""
        fc, query = self.tensors.get("fc.weight"), self.tensors.get("layers.0.self_attn.q_proj.weight")
        if fc is not None and query is not None and fc.dim() == query.dim() == 2:
            width, inputs = fc.shape[0], query.shape[1]
            if inputs in (width, 2 * width):
                return inputs == 2 * width
        return "layers.0.hidden_norm.weight" in self.tensors

    def error(self, text: str) -> InputError:
        return InputError(f"{self.path}: {text}")


def read_eagle(path: Path) -> EagleFile:
    """The head in a folder, whatever its layout.

    Raises:
        InputError: no head, damaged, or of a kind that is not read.
    """
    raw = read_config(path)
    method = raw.get("method")
    if method is not None and method not in ("eagle3", "eagle"):
        raise InputError(f"{path}: is a drafter for '{method}', not for eagle")
    layout = _layout(raw)
    if layout == "spdbench":
        require_version(path, raw)
    config = validated(EagleConfig, _flat(raw, layout, path), f"{path}/config.json: ")
    weights = Checkpoint(path)
    tensors: dict[str, Tensor] = {}
    for part in weights.files:
        for name, tensor in _named(load_tensors(part), part).items():
            if name in tensors:
                raise InputError(f"{part}: two tensors are called {name}")
            tensors[name] = tensor
    known = {*EagleConfig.model_fields, "method", "version", "aux_hidden_states", "rope_parameters"}
    extra = {key: value for key, value in raw.items() if key not in known} if layout == "spdbench" else {}
    file = EagleFile(path, layout, config, tensors, sha256_of_files(weights.files), extra)
    claimed = _claimed_version(raw)
    if claimed is not None and claimed != (3 if file.is_eagle3 else 1):
        has, says = ("EAGLE-3", "EAGLE-1") if file.is_eagle3 else ("EAGLE-1", "EAGLE-3")
        raise file.error(f"its config says {says}, but its tensors are those of {has}")
    return file


def _architectures(raw: Mapping[str, Any]) -> list[str]:
    found = raw.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []


def _layout(raw: Mapping[str, Any]) -> Layout:
    if "method" in raw:
        return "spdbench"
    if "speculators_model_type" in raw or "speculators_config" in raw:
        return "speculators"
    if any("Eagle3" in name for name in _architectures(raw)):
        return "specforge"
    return "safeailab"


def _claimed_version(raw: Mapping[str, Any]) -> int | None:
    """1 or 3 where the config says so; EAGLE-2 is 1 with another tree."""
    named = raw.get("method", raw.get("speculators_model_type"))
    if named in ("eagle", "eagle3"):
        return 3 if named == "eagle3" else 1
    return 3 if any("Eagle3" in name for name in _architectures(raw)) else None


def _flat(raw: Mapping[str, Any], layout: Layout, path: Path) -> dict[str, Any]:
    """The keys that `EagleConfig` knows, from wherever the layout keeps them."""

    def mapping(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
        found = parent.get(key)
        if found is not None and not isinstance(found, dict):
            raise InputError(f"{path}/config.json: {key} is not a mapping")
        return found or {}

    nested = mapping(raw, "eagle_config")
    outer = {key: value for key, value in {**nested, **raw}.items() if value is not None}
    if outer.get("use_aux_hidden_state") is False:
        raise InputError(f"{path}/config.json: use_aux_hidden_state is false, which is not supported")
    flat = {**mapping(raw, "model"), **mapping(raw, "transformer_layer_config"), **outer}
    flat["bias"] = outer.get("bias", outer.get("fusion_bias"))
    if layout == "spdbench":
        flat["aux_ids"] = raw.get("aux_hidden_states")
    else:
        flat["aux_ids"] = outer.get("eagle_aux_hidden_state_layer_ids")
        flat.setdefault("target_family", _family(mapping(mapping(raw, "speculators_config"), "verifier")))
        if layout != "speculators" or flat.get("use_sliding_window") is False:
            flat["sliding_window"] = None  # those heads' authors run none, whatever a copied config says
    rope = mapping(flat, "rope_parameters") or mapping(flat, "rope_scaling")
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{path}/config.json: rotary positions by layer or of part of a head are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    flat["rope_theta"] = rope.get("rope_theta", flat.get("rope_theta"))
    flat["rope_scaling"] = None if kind == "default" else {**rope, "rope_type": kind}
    return {key: flat[key] for key in EagleConfig.model_fields if flat.get(key) is not None}


def _family(verifier: Mapping[str, Any]) -> str | None:
    """The family of the target that a speculators config names, where it is one of ours."""
    named = _architectures(verifier)
    return next((family for family, name in FAMILIES.items() if name in named), None)


def _named(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under one set of names, checked; those of the target that some writers add are left out."""
    found: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = original
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
            name = name.removeprefix(prefix)
        if name.startswith(NOT_THE_HEADS) or name.endswith(".inv_freq"):
            continue
        for refused, what in REFUSED.items():
            if name.startswith(refused):
                raise InputError(f"{file}: tensor {original} belongs to {what}, which is not supported")
        for old, new in RENAMED.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        if name in found:
            raise InputError(f"{file}: two tensors are called {name}")
        if tensor.layout != torch.strided:
            raise InputError(f"{file}: tensor {original} is not dense")
        if (tensor.dtype in FLOATS) == (name in INDICES):
            wanted = "expected whole numbers" if name in INDICES else "only unquantised weights are supported"
            raise InputError(f"{file}: tensor {original} is {tensor.dtype}; {wanted}")
        if name not in INDICES and not bool(tensor.isfinite().all()):
            raise InputError(f"{file}: tensor {original} holds values that are not finite")
        found[name] = tensor
    return found
