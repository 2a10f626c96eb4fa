"""EAGLE heads on disk: SafeAILab's, SpecForge's, speculators' and our own layout, in and out.

Reading ends in one set of names, SafeAILab's with `layers.0.` for `midlayer.`, and one config; what a tensor means for
a target is `build`'s business. Strict about what it does not know: an EAGLE head with a tensor too few drafts
nonsense, and nothing else would tell.

Source: METHODS.md A.7. Must not know of targets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.checkpoint import sha256_of_files

Layout = Literal["safeailab", "specforge", "speculators", "spdbench"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREFIXES = ("model.", "draft_model.")
RENAMED = {"midlayer.": "layers.0.", "fusion_fc.": "fc.", "transformer.": "layers.0."}
NOT_THE_HEADS = ("verifier_lm_head.", "verifier_norm.")
REFUSED = {
    "embedding_layernorm.": "a norm on the embedding",
    "pre_lm_head_layernorm.": "a norm before the head in EAGLE-1",
    "mask_hidden": "parallel drafting",
}


class EagleConfig(BaseModel):
    """What of a head's config matters, under one set of names."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=2)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    draft_vocab_size: int | None = Field(None, ge=1)
    target_hidden_size: int | None = Field(None, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    rope_type: str = "default"
    sliding_window: int | None = None
    target_family: str | None = None
    aux_ids: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_output: bool = False
    draft_token_ids: tuple[int, ...] | None = None
    trained_tokens: int | None = Field(None, ge=0)
    acceptance_by_position: tuple[float, ...] = ()


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
        return "layers.0.hidden_norm.weight" in self.tensors


def read_eagle(path: Path) -> EagleFile:
    """The head in a folder, whatever its layout.

    Raises:
        InputError: no head, damaged, or of a kind that is not read.
    """
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: is not a drafter folder, it has no config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}/config.json: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}/config.json: is not a mapping")
    method = raw.get("method")
    if method is not None and method not in ("eagle3", "eagle"):
        raise InputError(f"{path}: is a drafter for '{method}', not for eagle")
    layout = _layout(raw)
    file = next((path / name for name in WEIGHTS if (path / name).exists()), None)
    if file is None:
        raise InputError(f"{path}: has no weights ({' or '.join(WEIGHTS)})")
    try:
        config = EagleConfig.model_validate(_flat(raw, layout))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}/config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return EagleFile(path, layout, config, _named(_load(file), file), sha256_of_files([file]))


def _layout(raw: Mapping[str, Any]) -> Layout:
    if "method" in raw:
        return "spdbench"
    if "speculators_model_type" in raw or "speculators_config" in raw:
        return "speculators"
    if any("Eagle3" in str(name) for name in raw.get("architectures") or ()):
        return "specforge"
    return "safeailab"


def _flat(raw: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The keys that `EagleConfig` knows, from wherever the layout keeps them."""
    inner = raw.get("transformer_layer_config") or (raw.get("model") if isinstance(raw.get("model"), dict) else None)
    flat = {**(inner or {}), **raw}
    nested = raw.get("eagle_config") or {}
    aux = raw.get("eagle_aux_hidden_state_layer_ids", nested.get("eagle_aux_hidden_state_layer_ids"))
    rope = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    flat["rope_theta"] = rope.get("rope_theta", flat.get("rope_theta") or 10000.0)
    flat["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    flat["aux_ids"] = raw.get("aux_hidden_states") if layout == "spdbench" else aux
    return {key: value for key, value in flat.items() if value is not None}


def _load(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # both libraries raise types of their own, and torch's message advises what must not be done
        raise InputError(
            f"{file}: cannot be read as weights: it is damaged, or holds more than plain tensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(f"{file}: is not a mapping from names to tensors")
    return content


def _named(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors under one set of names; those of the target that some writers add are left out."""
    found: dict[str, Tensor] = {}
    for original, tensor in tensors.items():
        name = original
        for prefix in PREFIXES:
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
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{file}: tensor {original} holds values that are not finite")
        found[name] = tensor
    return found


def write_eagle(file: EagleFile, directory: Path, layout: Layout) -> Path:
    """Writes the head in a published layout or our own; reading it gives the same tensors. Returns `directory`."""
    if layout != "safeailab" and layout != "spdbench" and not file.is_eagle3:
        raise InputError(f"an EAGLE-1 head cannot be written as {layout}; only as safeailab or spdbench")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in file.tensors.items()}
    if layout in ("safeailab", "specforge") and file.is_eagle3:
        tensors = {
            "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name: tensor
            for name, tensor in tensors.items()
        }
    (directory / "config.json").write_text(json.dumps(_written(file, layout), indent=1), encoding="utf-8")
    if layout == "safeailab":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")
    return directory


def _written(file: EagleFile, layout: Layout) -> dict[str, Any]:
    config = file.config
    own = {"rope_type", "target_family", "aux_ids", "trained_tokens", "acceptance_by_position", "draft_token_ids"}
    flat = config.model_dump(mode="json", exclude=own, exclude_none=True)
    if config.rope_type != "default":
        flat["rope_parameters"] = {"rope_type": config.rope_type, "rope_theta": flat.pop("rope_theta")}
    aux = None if config.aux_ids is None else list(config.aux_ids)
    if layout == "safeailab":
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **flat} | (
            {} if aux is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": aux}}
        )
    if layout == "specforge":
        return {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **flat} | (
            {} if aux is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": aux}}
        )
    if layout == "speculators":
        top = {"draft_vocab_size", "norm_before_residual", "norm_output", "target_hidden_size"}
        outer = {key: value for key, value in flat.items() if key in top}
        inner = {key: value for key, value in flat.items() if key not in top}
        written = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": {"model_type": "llama", **inner},
            **outer,
        }
        return written if aux is None else {**written, "eagle_aux_hidden_state_layer_ids": aux}
    kept = config.model_dump(mode="json", include=own - {"aux_ids"}, exclude_none=True)
    written = {"method": "eagle3" if file.is_eagle3 else "eagle", **flat, **kept, **file.extra}
    return written if aux is None else {**written, "aux_hidden_states": aux}
