"""The part of a model's config that spdbench uses: sizes, attention windows, experts. Reads `config.json`; no torch.

The families here share one architecture (RMSNorm, rotary positions, grouped-query attention, SwiGLU) and differ in the
fields of `ModelConfig`; of any other model only its `Sizes` are known.
"""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdbench.errors import InputError
from spdbench.models.checkpoints.folders import read_json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
WINDOWED = frozenset(FAMILIES) - {"llama"}
"""Families whose layers may attend to a window."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
WIDENED = ("dynamic", "linear", "yarn")
"""Types of rotary positions whose `factor` makes room for as many times the positions that were trained; configs with
others (llama3, longrope) state the whole."""
LAYERS = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 5_000)
WIDTHS = dict.fromkeys(
    (
        *("hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"),
        *(
            "num_attention_heads",
            "n_head",
            "num_key_value_heads",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
        ),
    ),
    2_000_000,
)
LIMITS = LAYERS | WIDTHS | {"head_dim": 65_536, "vocab_size": 20_000_000}
EPSILONS = ("_eps", "_epsilon")
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
    if not os.path.exists(path):
        raise InputError(f"{directory}: not a model folder, it has no config.json")
    raw = read_json(path)
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(family, str):
        raise InputError(f"{path}: names no architecture (model_type is {family!r})")
    _require_plausible(path, raw)
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
    kv_heads = standard.num_key_value_heads or heads
    head_dim = getattr(standard, "head_dim", None) or standard.hidden_size // heads
    if heads % kv_heads or head_dim % 2 or head_dim < 2:
        raise InputError(
            f"{directory}/config.json: num_attention_heads is {heads}, num_key_value_heads {kv_heads} and head_dim "
            f"{head_dim}, expected a multiple of the second and an even head_dim"
        )
    return ModelConfig(
        **vars(sizes(directory, standard)),
        intermediate_size=standard.intermediate_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=standard.rms_norm_eps,
        tied=bool(standard.tie_word_embeddings),
        qk_norm=standard.model_type in ("qwen3", "qwen3_moe"),
        windows=_windows(directory, standard),
        experts=_experts(directory, standard),
    )


def sizes(directory: Path, standard: Any) -> Sizes:
    """The sizes of a model of any architecture.

    Raises:
        InputError: the config cannot be that of a decoder-only model.
    """
    text = standard.get_text_config(decoder=True)
    _require_positive(directory, text, ("num_hidden_layers", "hidden_size", "vocab_size"))
    if getattr(text, "max_position_embeddings", None) is not None:
        _require_positive(directory, text, ("max_position_embeddings",))
    return Sizes(
        family=standard.model_type,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_positions=_max_positions(text),
        eos_ids=_eos_ids(directory, text),
    )


def _max_positions(standard: Any) -> int:
    """The longest sequence in tokens. Where a factor widens the positions, some configs state the trained length
    (Qwen's with YaRN) and some the whole (DeepSeek's). Gemma 3 has a factor for some of its layers and states the
    whole.
    """
    stated = getattr(standard, "max_position_embeddings", None) or UNLIMITED
    rope = getattr(standard, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    factor, trained = rope.get("factor"), rope.get("original_max_position_embeddings") or stated
    if rope.get("rope_type") not in WIDENED or not isinstance(factor, int | float) or type(trained) is not int:
        return int(stated)
    return max(stated, int(min(trained * factor, UNLIMITED))) if factor > 0 else int(stated)


def _require_plausible(path: Path, raw: dict[str, Any]) -> None:
    """Refuses sizes of no model, which would take all memory before any tensor is read, also in nested configs.

    The limits are an order of magnitude above the largest models known.
    """
    for key, value in raw.items():
        if isinstance(value, dict):
            _require_plausible(path, value)
        elif (limit := LIMITS.get(key)) and type(value) is int and not 0 <= value <= limit:
            raise InputError(f"{path}: {key} is {reprlib.repr(value)}, expected at most {limit}")
        elif key.endswith(EPSILONS) and type(value) in (int, float) and not 0 <= value < 1:
            raise InputError(f"{path}: {key} is {reprlib.repr(value)}, expected a number from 0 to 1")


def _require_positive(directory: Path, standard: Any, keys: tuple[str, ...], least: int = 1) -> None:
    for key in keys:
        found = getattr(standard, key, None)
        if type(found) is not int or found < least:
            raise InputError(f"{directory}/config.json: {key} is {reprlib.repr(found)}, expected at least {least}")


def _windows(directory: Path, standard: Any) -> tuple[int | None, ...]:
    """By layer. Families without windows ignore the key, which their configs may have."""
    layers = int(standard.num_hidden_layers)
    window = getattr(standard, "sliding_window", None) if standard.model_type in WINDOWED else None
    kinds = getattr(standard, "layer_types", None)
    if window is None:
        return (None,) * layers
    _require_positive(directory, standard, ("sliding_window",))
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _experts(directory: Path, standard: Any) -> Experts | None:
    if standard.model_type != "qwen3_moe":
        return None
    _require_positive(directory, standard, ("num_experts",), least=0)
    _require_positive(directory, standard, ("num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"))
    count, per_token, dense = standard.num_experts, standard.num_experts_per_tok, standard.mlp_only_layers or []
    if count and per_token > count:
        raise InputError(f"{directory}/config.json: num_experts_per_tok is {per_token}, expected at most {count}")
    if not isinstance(dense, list):
        raise InputError(f"{directory}/config.json: mlp_only_layers is {reprlib.repr(dense)}, expected a list")
    sparse = {
        layer
        for layer in range(standard.num_hidden_layers)
        if layer not in dense and count > 0 and (layer + 1) % standard.decoder_sparse_step == 0
    }
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=standard.moe_intermediate_size,
        normalise=bool(standard.norm_topk_prob),
        layers=frozenset(sparse),
    )


def _eos_ids(directory: Path, standard: Any) -> frozenset[int]:
    """The end-of-sequence ids that the model's settings name, its generation settings and its config: any of them ends
    an answer. The architecture's default counts only where neither file names one.
    """
    path = directory / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    if not isinstance(settings, dict):
        raise InputError(f"{path}: cannot be used (expected an object)")
    raw = read_raw_config(directory)
    parts = [part for part in (raw, raw.get("text_config")) if isinstance(part, dict)]
    ids = _ids(path, settings.get("eos_token_id"))
    for part in parts:
        ids |= _ids(directory / "config.json", part.get("eos_token_id"))
    ids = ids or _ids(directory / "config.json", getattr(standard, "eos_token_id", None))
    return frozenset(token for token in ids if 0 <= token < standard.vocab_size)  # others are never generated


def _ids(source: Path, value: Any) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and -1 <= token < UNLIMITED for token in ids):
        raise InputError(
            f"{source}: cannot be used (eos_token_id is {reprlib.repr(value)}, expected a token id or a list of them)"
        )
    return frozenset(ids)
