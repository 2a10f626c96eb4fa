"""EAGLE heads on disk: SafeAILab's, SpecForge's, speculators' and our own layout.

Reading ends in one set of names, SafeAILab's with `layers.0.` for `midlayer.`, and one config; what a tensor means for
a target is the business of `build`. Source: published heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from spdbench.errors import InputError
from spdbench.models.checkpoints.config_checks import require_computed
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench_backends.drafter_files.folder import (
    FOLDER_VERSION,
    DrafterConfig,
    DrafterFile,
    checked_config,
    read_config,
    read_tensors,
    require_version,
    write_folder,
)

Layout = Literal["safeailab", "specforge", "speculators", "spdbench"]

PREFIXES = ("model.", "draft_model.")
RENAMED = {"midlayer.": "layers.0.", "fusion_fc.": "fc.", "transformer.": "layers.0."}
NOT_THE_HEADS = ("verifier_lm_head.", "verifier_norm.")
UNSUPPORTED = {
    "embedding_layernorm.": "a norm on the embedding",
    "pre_lm_head_layernorm.": "a norm before the head in EAGLE-1",
    "mask_hidden": "parallel drafting",
}

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""What speculators calls a target of each family."""

LLAMA_KEYS = {
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_theta",
}  # fmt: skip
"""The fields of `EagleConfig` that describe a Llama layer."""

TARGET_KEYS = ("target_model_name_or_path", "base_model_name_or_path", "model_id")
"""Where configs of published layouts name the target, if they do."""
AUX_KEYS = {"eagle_aux_hidden_state_layer_ids", "aux_hidden_states", "use_aux_hidden_state", "num_aux_hidden_states"}
ABOUT_AUX = re.compile(
    r"aux_(?:\w+_)?(?:hidden|layers?|states?|convention)|(?:aux|eagle|target|capture|feature)\w*_layer_ids"
)
"""Names of keys that say which layers a head reads, or how these are counted; only `AUX_KEYS` are understood."""
CHAIN = 3
"""How many tokens a speculators config proposes to draft; a server may choose another number."""


class EagleConfig(DrafterConfig):
    """Sizes that a config leaves out are found in the tensors. `aux_hidden_states` are the layers that the head reads,
    counted as the layout counts them; `rope_scaling` describes rotary positions other than the plain ones, as
    transformers does."""

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
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = Field(None, ge=1)
    target_family: str | None = None
    target_id: str | None = None
    target_sha256: str | None = None
    aux_hidden_states: tuple[int, ...] | None = None
    bias: bool | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool | None = None
    fc_norm: bool | None = None
    norm_output: bool = False
    draft_token_ids: tuple[int, ...] | None = Field(None, min_length=1)
    acceptance_by_position: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()


@dataclass(frozen=True)
class EagleFile(DrafterFile[EagleConfig]):
    @property
    def is_eagle3(self) -> bool:
        """Layer 0 reads an embedding and a feature in EAGLE-3, and what `fc` made of both in EAGLE-1/2."""
        fc, query = self.tensors.get("fc.weight"), self.tensors.get("layers.0.self_attn.q_proj.weight")
        if fc is not None and query is not None and fc.dim() == query.dim() == 2:
            width, inputs = fc.shape[0], query.shape[1]
            if inputs in (width, 2 * width):
                return inputs == 2 * width
        return "layers.0.hidden_norm.weight" in self.tensors


def read_eagle(path: Path) -> EagleFile:
    """The head in a folder, whatever its layout.

    Raises:
        InputError: no head, damaged, or of a kind that is not read.
    """
    raw = read_config(path, "eagle", "eagle3")
    layout = _layout(raw)
    if layout == "spdbench":
        require_version(path, raw, FOLDER_VERSION)
    config = checked_config(EagleConfig, _flat(raw, layout, path), path)
    files = Checkpoint(path).files
    file = EagleFile(path, layout, config, read_tensors(files, _our_name), sha256_of_files(files))
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
    return "specforge" if any("Eagle3" in name for name in _architectures(raw)) else "safeailab"


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

    outer = {key: value for key, value in {**mapping(raw, "eagle_config"), **raw}.items() if value is not None}
    if outer.get("use_aux_hidden_state") is False:
        raise InputError(f"{path}/config.json: use_aux_hidden_state is false, which is not supported")
    flat = {**mapping(raw, "model"), **mapping(raw, "transformer_layer_config"), **outer}
    for key in flat:
        if ABOUT_AUX.search(key) and key not in AUX_KEYS:
            raise InputError(
                f"{path}/config.json: {key} is not known. Which layers a head reads is read from "
                "eagle_aux_hidden_state_layer_ids, and -o eagle.aux_convention says how they are counted."
            )
    require_computed(path, flat)
    flat["bias"] = outer.get("bias", outer.get("fusion_bias"))
    if layout != "spdbench":
        flat["aux_hidden_states"] = outer.get("eagle_aux_hidden_state_layer_ids") or None  # an empty list names none
        verifier = _architectures(mapping(mapping(raw, "speculators_config"), "verifier"))
        flat.setdefault("target_family", next((family for family, name in FAMILIES.items() if name in verifier), None))
        named = mapping(mapping(raw, "speculators_config"), "verifier").get("name_or_path")
        flat.update({"target_id": named or next((outer[key] for key in TARGET_KEYS if key in outer), None)})
        if layout != "speculators" or flat.get("use_sliding_window") is False:
            flat["sliding_window"] = None  # those heads' authors run none, whatever a copied config says
    else:
        flat.update(
            {f"target_{key}": outer.get(f"target_{key}", outer.get(f"model_{key}")) for key in ("id", "sha256")}
        )
    for key in ("target_id", "target_sha256"):  # of other types they are no reason to refuse a head
        flat[key] = flat[key] if isinstance(flat.get(key), str) else None
    rope = mapping(flat, "rope_parameters") or mapping(flat, "rope_scaling")
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{path}/config.json: rotary positions by layer or of part of a head are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    flat["rope_theta"] = rope.get("rope_theta", flat.get("rope_theta"))
    flat["rope_scaling"] = None if kind == "default" else {**rope, "rope_type": kind}
    return {key: value for key, value in flat.items() if value is not None}


def _our_name(name: str) -> str | None:
    """None for tensors of the target, which some writers add.

    Raises:
        ValueError: the tensor belongs to something that is not supported.
    """
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    if name.startswith(NOT_THE_HEADS) or name.endswith(".inv_freq"):
        return None
    for start, what in UNSUPPORTED.items():
        if name.startswith(start):
            raise ValueError(f"belongs to {what}, which is not supported")
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def write_eagle(file: EagleFile, directory: Path, layout: Layout) -> Path:
    """Writes an EAGLE-3 head of one layer, as it is trained, into `directory`, which it returns.

    `file` is in our own terms: its config lists hidden states. Published layouts need `lm_head.weight`, and a draft
    vocabulary as `d2t` and `t2d`.
    """
    midlayer = layout in ("safeailab", "specforge")
    tensors = {
        name.replace("layers.0.", "midlayer.", 1) if midlayer else name: tensor for name, tensor in file.tensors.items()
    }
    name = "pytorch_model.bin" if layout == "safeailab" else "model.safetensors"
    return write_folder(directory, {**file.extra, **_written_config(file, layout)}, tensors, name)


def _written_config(file: EagleFile, layout: Layout) -> dict[str, Any]:
    """Complete: readers have defaults of their own for keys that are missing."""
    config = file.config
    if layout == "spdbench":
        return {"method": "eagle3", "version": FOLDER_VERSION, **config.model_dump(mode="json", exclude_none=True)}
    llama = {
        "model_type": "llama",
        **config.model_dump(mode="json", include=LLAMA_KEYS),
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    }
    draft = {"draft_vocab_size": len(file.tensors["lm_head.weight"])}
    aux, key = list(config.aux_hidden_states or ()), "eagle_aux_hidden_state_layer_ids"
    if layout == "speculators":
        family = FAMILIES.get(config.target_family or "")
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": CHAIN}],
                "verifier": {"name_or_path": file.extra.get("model_id"), "architectures": [family] if family else []},
            },
            "transformer_layer_config": llama,
            **draft,
            **dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), False),
            key: aux,
        }
    nested: dict[str, Any] = {key: [index - 1 for index in aux]}  # SGLang, which serves these, counts layers' outputs
    if layout == "safeailab":
        return {"architectures": ["LlamaForCausalLM"], **llama, **draft, "eagle_config": nested}
    nested["use_aux_hidden_state"] = True
    return {"architectures": ["LlamaForCausalLMEagle3"], **llama, **draft, "eagle_config": nested}
