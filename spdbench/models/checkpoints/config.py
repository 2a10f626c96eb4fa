"""The part of a model's config that spdbench uses: sizes, attention windows, experts, recurrent layers. Reads
`config.json`; no torch.

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
from spdbench.input_files import read_json
from spdbench.models.checkpoints.config_checks import require_computed, require_plausible, require_positive

HYBRIDS = ("qwen3_5", "qwen3_5_moe")
"""Families with recurrent layers next to attention; a text model's `model_type` has `_text` behind these names."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", *HYBRIDS)
MIXTURES = frozenset({"qwen3_moe", "qwen3_5_moe"})
WINDOWED = frozenset({"mistral", "qwen2", "qwen3", "qwen3_moe"})
"""Families whose layers may attend to a window."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
WIDENED = ("linear", "yarn")
"""Types of rotary positions whose `factor` makes room for as many times the positions that were trained; configs with
others (llama3, longrope) state the whole. Beyond the trained length the positions of `dynamic` depend on how long the
sequence was at each forward, and in earlier requests, so that no two ways of decoding agree: it is not widened."""
UNLIMITED = 2**31 - 1
"""Positions of a model whose config gives no limit, as for those without learned or rotary positions."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: which layers have one, and how tokens are routed. `shared_size` is the width of an expert
    that every token passes as well; 0 if there is none."""

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool
    layers: frozenset[int]
    shared_size: int = 0

    def parameters(self, hidden_size: int) -> int:
        """Of all experts in all layers that a router chooses from: three matrices each."""
        return len(self.layers) * self.count * 3 * hidden_size * self.intermediate_size


@dataclass(frozen=True)
class RecurrentSizes:
    """Which layers are recurrent (gated delta nets), and how their tensors are cut into heads. `window` is how many
    earlier inputs their convolution reads."""

    layers: frozenset[int]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    window: int

    @property
    def channels(self) -> int:
        """Columns of queries, keys and values together, which pass the convolution."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def values(self) -> int:
        """Columns of the values of all heads."""
        return self.num_value_heads * self.value_dim

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of a layer's state: a window in numbers of `itemsize` bytes, and matrices in float32."""
        return self.window * self.channels * itemsize + 4 * self.values * self.key_dim


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
    """All that our own layers need. `windows[i]` is layer i's sliding window in tokens, or None. Of each head the first
    `rotary_dim` numbers are rotated by position. Where all layers are mixtures, `intermediate_size` is the width that a
    token passes in one, for drafters that need a width. A model with recurrent layers also has gates on attention's
    output, and norms whose weights are stored as their difference from one."""

    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    experts: Experts | None
    rotary_dim: int
    recurrent: RecurrentSizes | None = None

    @property
    def is_dense(self) -> bool:
        """True without experts and recurrent layers."""
        return self.experts is None and self.recurrent is None


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
    require_plausible(path, raw)
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
    text = standard.get_text_config(decoder=True)
    family = family_of(standard)
    if family not in FAMILIES:
        raise ForeignModelError(f"architecture {family!r}")
    if text.hidden_act != "silu":
        raise ForeignModelError(f"hidden_act {text.hidden_act!r}")
    rope = text.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise ForeignModelError(f"rope_type {rope!r}")
    raw = read_raw_config(directory)
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict):
            require_computed(directory, part, ("partial_rotary_factor",) if family in HYBRIDS else ())
    experts = _experts(directory, text)
    require_positive(directory, text, ("num_attention_heads",))
    if experts is None or not experts.shared_size:
        require_positive(directory, text, ("intermediate_size",))
    heads = text.num_attention_heads
    kv_heads = text.num_key_value_heads or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    share = text.rope_parameters.get("partial_rotary_factor", 1.0) if family in HYBRIDS else 1.0
    rotary_dim = int(head_dim * share)
    if heads % kv_heads or head_dim % 2 or head_dim < 2:
        raise InputError(
            f"{directory}/config.json: num_attention_heads is {heads}, num_key_value_heads {kv_heads} and head_dim "
            f"{head_dim}, expected a multiple of the second and an even head_dim"
        )
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise InputError(
            f"{directory}/config.json: partial_rotary_factor is {share}, which rotates {rotary_dim} of the {head_dim} "
            "numbers of a head; expected an even number of them"
        )
    return ModelConfig(
        **vars(sizes(directory, standard)),
        intermediate_size=_dense_width(text, experts),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=text.rms_norm_eps,
        tied=bool(standard.tie_word_embeddings or text.tie_word_embeddings),  # either part of a nested config says so
        qk_norm=family in ("qwen3", "qwen3_moe", *HYBRIDS),
        windows=_windows(directory, text),
        experts=experts,
        rotary_dim=rotary_dim,
        recurrent=_recurrent(directory, text) if family in HYBRIDS else None,
    )


def family_of(standard: Any) -> str:
    """The architecture of a config: its `model_type`, the same for a hybrid model's text part as for all of it."""
    return canonical_family(str(standard.model_type))


def canonical_family(model_type: str) -> str:
    """One name for the architectures whose configs have two."""
    return next((family for family in HYBRIDS if model_type == f"{family}_text"), model_type)


def sizes(directory: Path, standard: Any) -> Sizes:
    """The sizes of a model of any architecture.

    Raises:
        InputError: the config cannot be that of a decoder-only model.
    """
    text = standard.get_text_config(decoder=True)
    require_positive(directory, text, ("num_hidden_layers", "hidden_size", "vocab_size"))
    if getattr(text, "max_position_embeddings", None) is not None:
        require_positive(directory, text, ("max_position_embeddings",))
    return Sizes(
        family=family_of(standard),
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


def _windows(directory: Path, standard: Any) -> tuple[int | None, ...]:
    """By layer. Families without windows ignore the key, which their configs may have."""
    layers = int(standard.num_hidden_layers)
    window = getattr(standard, "sliding_window", None) if standard.model_type in WINDOWED else None
    kinds = getattr(standard, "layer_types", None)
    if window is None:
        return (None,) * layers
    require_positive(directory, standard, ("sliding_window",))
    if kinds is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _experts(directory: Path, text: Any) -> Experts | None:
    if canonical_family(text.model_type) not in MIXTURES:
        return None
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    step = getattr(text, "decoder_sparse_step", 1)
    require_positive(directory, text, ("num_experts",), least=0)
    require_positive(directory, text, ("num_experts_per_tok", "moe_intermediate_size"))
    if step != 1:
        require_positive(directory, text, ("decoder_sparse_step",))
    count, per_token, dense = text.num_experts, text.num_experts_per_tok, getattr(text, "mlp_only_layers", None) or []
    if count and per_token > count:
        raise InputError(f"{directory}/config.json: num_experts_per_tok is {per_token}, expected at most {count}")
    if not isinstance(dense, list):
        raise InputError(f"{directory}/config.json: mlp_only_layers is {reprlib.repr(dense)}, expected a list")
    sparse = {
        layer for layer in range(text.num_hidden_layers) if layer not in dense and count > 0 and (layer + 1) % step == 0
    }
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=text.moe_intermediate_size,
        normalise=bool(getattr(text, "norm_topk_prob", True)),
        layers=frozenset(sparse),
        shared_size=shared,
    )


def _dense_width(text: Any, experts: Experts | None) -> int:
    if experts is not None and getattr(text, "intermediate_size", None) is None:
        return experts.per_token * experts.intermediate_size + experts.shared_size
    return int(text.intermediate_size)


def _recurrent(directory: Path, text: Any) -> RecurrentSizes:
    sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    require_positive(directory, text, tuple(f"linear_{size}" for size in sizes))
    key_heads, value_heads = text.linear_num_key_heads, text.linear_num_value_heads
    if value_heads % key_heads:
        raise InputError(
            f"{directory}/config.json: linear_num_value_heads is {value_heads}, expected a multiple of the "
            f"{key_heads} of linear_num_key_heads"
        )
    kinds = text.layer_types
    if len(kinds) != text.num_hidden_layers or not set(kinds) <= {"linear_attention", "full_attention"}:
        raise InputError(
            f"{directory}/config.json: layer_types is {reprlib.repr(kinds)}, expected linear_attention or "
            f"full_attention for each of the {text.num_hidden_layers} layers"
        )
    return RecurrentSizes(
        layers=frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention"),
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_dim=text.linear_key_head_dim,
        value_dim=text.linear_value_head_dim,
        window=text.linear_conv_kernel_dim - 1,
    )


def _eos_ids(directory: Path, standard: Any) -> frozenset[int]:
    """The end-of-sequence ids that the model's settings name, its generation settings and its config: any of them ends
    an answer. The architecture's default counts only where neither file names one.
    """
    path = directory / "generation_config.json"
    settings = read_json(path) if os.path.lexists(path) else {}
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
