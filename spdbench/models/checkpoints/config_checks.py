"""Values that a model's config can have: refused before they are used, with the key and what is expected."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from spdbench.errors import InputError

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
            "shared_expert_intermediate_size",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_conv_kernel_dim",
        ),
    ),
    2_000_000,
)
LIMITS = LAYERS | WIDTHS | {"head_dim": 65_536, "vocab_size": 20_000_000}
EPSILONS = ("_eps", "_epsilon")
NOT_COMPUTED = {
    "partial_rotary_factor": 1,
    "logit_scale": 1,
    "logits_scaling": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
"""Keys of layers that compute something else than ours, with the value that changes nothing, if there is one."""


def require_plausible(path: Path, raw: dict[str, Any]) -> None:
    """Refuses sizes of no model, which would take all memory before any tensor is read, also in nested configs.

    The limits are an order of magnitude above the largest models known.
    """
    for key, value in raw.items():
        if isinstance(value, dict):
            require_plausible(path, value)
        elif (limit := LIMITS.get(key)) and type(value) is int and not 0 <= value <= limit:
            raise InputError(f"{path}: {key} is {reprlib.repr(value)}, expected at most {limit}")
        elif key.endswith(EPSILONS) and type(value) in (int, float) and not 0 <= value < 1:
            raise InputError(f"{path}: {key} is {reprlib.repr(value)}, expected a number from 0 to 1")


def require_positive(directory: Path, standard: Any, keys: tuple[str, ...], least: int = 1) -> None:
    """Raises `InputError` for the first of `keys` whose value is no whole number, or less than `least`."""
    for key in keys:
        found = getattr(standard, key, None)
        if type(found) is not int or found < least:
            raise InputError(f"{directory}/config.json: {key} is {reprlib.repr(found)}, expected at least {least}")


def require_computed(directory: Path, raw: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Raises `InputError` for a key of other layers, unless it changes nothing or is one of those `known`: passed over,
    the model would compute something else."""
    for key, neutral in NOT_COMPUTED.items():
        value = raw.get(key)
        if key not in known and value is not None and value != neutral:
            raise InputError(f"{directory}/config.json: {key} is {value!r:.40}, which is not supported here")
