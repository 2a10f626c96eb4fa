"""The part of a model's config that spdbench uses: sizes, attention windows, experts. Reads `config.json`; no torch.

The families here share one architecture (RMSNorm, rotary positions, grouped-query attention, SwiGLU) and differ in the
fields of `ModelConfig`; of any other model only its `Sizes` are known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdbench.errors import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
WINDOWED = frozenset(FAMILIES) - {"llama"}
"""Families whose layers may attend to a window."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
UNLIMITED = 2**31 - 1
"""Positions of a model whose config gives no limit, as for those without learned or rotary positions."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: which layers have one, and how tokens are routed."""

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool
    layers: frozenset[int]


class ForeignModelError(Exception):
    """A valid config of a model that our own layers do not support; the message says what in it they do not."""


@dataclass(frozen=True)
class Sizes:
    """What the config of every decoder-only model gives."""

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class ModelConfig(Sizes):
    """All that our own layers need. `windows[i]` is layer i's sliding window in tokens, or None."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    experts: Experts | None


def read_raw_config(directory: Path) -> dict[str, Any]:
    """`config.json` as it is; checks only that it names an architecture and no quantisation.

    Raises:
        InputError: no config there, not JSON, or one of quantised weights.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{directory}: not a model folder, it has no config.json") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(family, str):
        raise InputError(f"{path}: names no architecture (model_type is {family!r})")
    method = raw.get("quantization_config")
    if method:
        name = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise InputError(
            f"{path}: quantised weights ({name}) are not supported. Use the unquantised model, or a GGUF file."
        )
    return dict(raw)


def model_config(directory: Path, standard: Any) -> ModelConfig:
    """The config of the model in `directory`; `standard` is transformers' object for it, in which all families
    use the same names.

    Raises:
        ForeignModelError: the model uses something that our layers do not compute (family, activation, rotary
            positions).
        InputError: the config cannot be that of a model.
    """
    if standard.model_type not in FAMILIES:
        raise ForeignModelError(f"architecture {standard.model_type!r}")
    if standard.hidden_act != "silu":
        raise ForeignModelError(f"hidden_act {standard.hidden_act!r}")
    rope = standard.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise ForeignModelError(f"rope_type {rope!r}")
    _require_positive(directory, standard, ("intermediate_size", "num_attention_heads"))
    heads = standard.num_attention_heads
    return ModelConfig(
        **vars(sizes(directory, standard)),
        intermediate_size=standard.intermediate_size,
        num_heads=heads,
        num_kv_heads=standard.num_key_value_heads or heads,
        head_dim=getattr(standard, "head_dim", None) or standard.hidden_size // heads,
        norm_eps=standard.rms_norm_eps,
        tied=bool(standard.tie_word_embeddings),
        qk_norm=standard.model_type in ("qwen3", "qwen3_moe"),
        windows=_windows(standard),
        experts=_experts(standard),
    )


def sizes(directory: Path, standard: Any) -> Sizes:
    """The sizes of a model of any architecture.

    Raises:
        InputError: the config cannot be that of a decoder-only model.
    """
    text = standard.get_text_config(decoder=True)
    _require_positive(directory, text, ("num_hidden_layers", "hidden_size", "vocab_size"))
    return Sizes(
        family=standard.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None) or UNLIMITED,
        eos_ids=_eos_ids(directory, text),
    )


def _require_positive(directory: Path, standard: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        found = getattr(standard, key, None)
        if not isinstance(found, int) or found < 1:
            raise InputError(f"{directory}/config.json: {key} is {found!r}, expected at least 1")


def _windows(standard: Any) -> tuple[int | None, ...]:
    """By layer. Families without windows ignore the key, which their configs may have."""
    layers = int(standard.num_hidden_layers)
    window = getattr(standard, "sliding_window", None) if standard.model_type in WINDOWED else None
    kinds = getattr(standard, "layer_types", None)
    if window is None:
        return (None,) * layers
    if kinds is None:
        return (int(window),) * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _experts(standard: Any) -> Experts | None:
    if standard.model_type != "qwen3_moe":
        return None
    count = standard.num_experts
    sparse = {
        layer
        for layer in range(standard.num_hidden_layers)
        if layer not in standard.mlp_only_layers and count > 0 and (layer + 1) % standard.decoder_sparse_step == 0
    }
    return Experts(
        count=count,
        per_token=standard.num_experts_per_tok,
        intermediate_size=standard.moe_intermediate_size,
        normalise=bool(standard.norm_topk_prob),
        layers=frozenset(sparse),
    )


def _eos_ids(directory: Path, standard: Any) -> frozenset[int]:
    """The end-of-sequence ids, the only generation settings of a model that are used: one id or a list."""
    path = directory / "generation_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = settings.get("eos_token_id", getattr(standard, "eos_token_id", None))
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in ids):
            raise TypeError(f"eos_token_id is {found!r}, expected a whole number or a list of them")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be used ({error})") from None
    return frozenset(ids)
