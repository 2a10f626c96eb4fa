"""What published EAGLE heads leave open: which features, which rotary positions, what is fed back.

Each answer is the user's where given, else the file's, else what the method's authors do. Source: METHODS.md A.1 and
A.7. Must not know of tensors.
"""

from __future__ import annotations

from typing import Literal

from spdbench.models.checkpoints.config import ROPE_TYPES
from spdbench.models.decoder import Decoder
from spdbench.models.hf.library import scaled_frequencies
from spdbench.models.rotary import Rotary, plain_frequencies
from spdbench_backends.eagle.formats import EagleFile

AuxConvention = Literal["auto", "hidden_states", "layer_output"]
NormOutput = Literal["auto", "feed", "ignore"]


def default_aux(num_layers: int) -> tuple[int, ...]:
    """The hidden states that EAGLE-3 reads unless a head says otherwise: near the first layer, the middle, the last."""
    return (2, num_layers // 2, num_layers - 3)


def aux_states(file: EagleFile, num_aux: int, num_layers: int, convention: AuxConvention) -> tuple[int, ...]:
    """The target's hidden states that the head reads; METHODS.md A.7 on why their ids are told in two ways.

    Raises:
        InputError: they are not told, or could mean either.
    """
    ids, standard = file.config.aux_ids, default_aux(num_layers)
    if ids is None:
        if num_aux != len(standard):
            raise file.error(f"reads {num_aux} auxiliary features, and its config does not say which")
        ids, convention = standard, "hidden_states"
    if len(ids) != num_aux:
        raise file.error(f"config names {len(ids)} auxiliary layers, but fc.weight reads {num_aux}")
    if file.layout == "spdbench":
        convention = "hidden_states"
    if convention == "auto":
        if ids not in (standard, tuple(index - 1 for index in standard)):
            raise file.error(
                f"config names the auxiliary layers {list(ids)}, which may count hidden states or layers' outputs; "
                "say -o eagle.aux_convention=hidden_states or layer_output (try both: the right one drafts better)"
            )
        convention = "hidden_states" if ids == standard else "layer_output"
    found = ids if convention == "hidden_states" else tuple(index + 1 for index in ids)
    if not all(0 <= index <= num_layers for index in found):
        raise file.error(f"config names the auxiliary layers {list(ids)}, but the target has {num_layers} layers")
    return found


def rotary_of(file: EagleFile, head_dim: int, theta: float | None, target: Decoder) -> Rotary:
    """The head's rotary positions; plain ones with base `theta` where it is given.

    Raises:
        InputError: of a kind that is not computed here, or described wrongly.
    """
    config = file.config
    if theta is None and config.rope_scaling is not None:
        kind = config.rope_scaling["rope_type"]
        if kind not in ROPE_TYPES:
            raise file.error(
                f"config's rotary positions are of type {kind}. Supported: {', '.join(ROPE_TYPES)}; "
                "-o eagle.rope_theta=BASE takes plain ones"
            )
        try:
            parameters = {**config.rope_scaling, "rope_theta": config.rope_theta}
            scaled = scaled_frequencies(parameters, head_dim, config.max_position_embeddings)
        except ValueError as error:
            raise file.error(f"config's rotary positions of type {kind} cannot be used ({error})") from None
        return Rotary(*scaled, target.dtype, target.device)
    plain = plain_frequencies(config.rope_theta if theta is None else theta, head_dim)
    return Rotary(plain, 1.0, target.dtype, target.device)


def feeds_back_normed(file: EagleFile, meaning: NormOutput = "auto") -> bool:
    """True if a row is fed what left the final norm: what `norm_output` means but to SpecForge, where it names the norm
    that every head has."""
    if meaning == "auto":
        return file.config.norm_output and file.layout != "specforge"
    return meaning == "feed"
