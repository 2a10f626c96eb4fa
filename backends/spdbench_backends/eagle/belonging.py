"""Whether an EAGLE head belongs to a target, by the embedding that it carries, which says more than names.

Shapes: M draft width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from spdbench.models.decoder import Decoder
from spdbench_backends.drafter_files.tensors import is_plain
from spdbench_backends.eagle.formats import EagleFile

ALIKE = 0.9
"""Cosine of two embeddings of one model, or of models trained from it; those of two models have one near 0."""
COMPARED_ROWS = 1000


def without_padding(file: EagleFile, target: Decoder) -> EagleFile:
    """The head without rows beyond the target's vocabulary in its embedding, its output head and its config's number.

    Checkpoints round the number of rows up, to sizes that multiply fast. Rows beyond the vocabulary are padding where
    they hold one vector, as zeros are, or where the rows before them are the target's own embedding.

    Raises:
        InputError: the embedding has more rows than the target has tokens, and they are no padding.
    """
    tensors, vocab_size = dict(file.tensors), target.config.vocab_size
    own_VM = tensors.get("embed_tokens.weight")
    if own_VM is None or own_VM.dim() != 2 or len(own_VM) <= vocab_size or not is_plain(own_VM):
        return file
    num_rows, surplus = len(own_VM), own_VM[vocab_size:]
    alike = _alike(own_VM, target.embeddings_VM)
    of_one = bool((surplus == (surplus[0] if len(surplus) > 1 else 0)).all())
    if not of_one and (alike is None or alike < ALIKE):
        of_own = "" if alike is None else f", and those before them are not the target's (cosine {alike:.2f})"
        raise file.error(
            f"tensor embed_tokens.weight has {num_rows} rows, but the target's vocabulary has {vocab_size} tokens. The "
            f"rows beyond it ({len(surplus)}) are no padding: they hold numbers that differ{of_own}. It was "
            "made for another vocabulary."
        )
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in tensors and tensors[name].dim() == 2 and len(tensors[name]) == num_rows:
            tensors[name] = tensors[name][:vocab_size]
    cut = {key: vocab_size for key in ("vocab_size", "draft_vocab_size") if getattr(file.config, key) == num_rows}
    return replace(file, tensors=tensors, config=file.config.model_copy(update=cut))


def foreign_target(file: EagleFile, target: Decoder, identity: str, sha256: str) -> str | None:
    """Why a head that fits `target` in shape seems to be made for another model; None where nothing says so.

    Heads carry the embedding of the model that they were trained for, so it says more than names, which differ for one
    model. A model that was trained further keeps nearly the same embedding.
    """
    own_VM, of_target_VM, config = file.tensors.get("embed_tokens.weight"), target.embeddings_VM, file.config
    alike = None if own_VM is None or len(own_VM) < target.config.vocab_size else _alike(own_VM, of_target_VM)
    if alike is not None:
        return None if alike >= ALIKE else f"its embedding is not that of {identity} (cosine {alike:.2f})"
    if config.target_sha256 is not None:
        of = config.target_id or "an unnamed model"
        return None if config.target_sha256 == sha256 else f"its config names other weights as its target's, of {of}"
    stated = (config.target_id or identity).rstrip("/").rpartition("/")[2]
    if stated.lower() == identity.rpartition("/")[2].lower():
        return None
    return f"its config says that it was trained for {config.target_id}, and the model here is {identity}"


def _alike(own_VM: Tensor, target_VM: Tensor | None) -> float | None:
    """The cosine of a head's embedding and the target's, by some rows that both have; None for other widths."""
    if target_VM is None or own_VM.dim() != 2 or own_VM.shape[1:] != target_VM.shape[1:]:
        return None
    rows = min(len(own_VM), len(target_VM))
    some = slice(0, rows, max(1, rows // COMPARED_ROWS))
    own, expected = (table_VM[some].float().cpu().flatten() for table_VM in (own_VM, target_VM))
    return float(functional.cosine_similarity(own, expected, dim=0))
