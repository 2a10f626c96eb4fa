"""A drafter's tensors and its vocabulary, checked against a target.

Strict: a drafter with a tensor too few or misread drafts nonsense, and only its low acceptance would show it. An
unknown, missing or misshapen tensor is therefore an error that names it.

Shapes: M model width, U draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.models.checkpoints.layer_tensors import SCALE, ExpectedTensors, Shape
from spdbench.models.checkpoints.weights import FLOATS
from spdbench.models.cpu.linear import Linear, can_pack, linear, row_scales
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import NormWeight
from spdbench.models.torch_utils import require_finite
from spdbench_backends.drafter_files.folder import DrafterFile

WHOLE_NUMBERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


class TargetTensors(Mapping[str, Tensor]):
    """The tensors of a file as `target` computes with them: each a copy on its device and in its dtype.

    A copy, since what was read may be a mapped file, whose pages could be dropped in the middle of a measurement; made
    when it is asked for, so that no drafter is held twice. Where the file has matrices in 8 bits, their scales are
    tensors as well, in float32, and the rows of the target's head that it drafts from are copied in 8 bits.

    Raises:
        InputError: a tensor is missing, unknown, misshapen, quantised or not finite.
    """

    def __init__(self, file: DrafterFile[Any], expected: ExpectedTensors, target: Decoder) -> None:
        shapes = expected.present(file.tensors)
        scales = {name + SCALE: shape[:1] for name, shape in shapes.items() if name + SCALE in file.tensors}
        self._target, self._tensors = target, {name: file.tensors[name] for name in shapes if name in file.tensors}
        # A matrix that was cut after it was read no longer fits its scales.
        fitting = {name: file.tensors[name] for name, shape in scales.items() if file.tensors[name].shape == shape}
        self._tensors |= fitting
        self._in_8_bits = bool(fitting)
        for name, shape in shapes.items():
            tensor = file.tensors.get(name)
            if tensor is None:
                raise file.error(f"tensor {name} is missing")
            if not is_plain(tensor):
                raise file.error(f"tensor {name} is {_kind(tensor)}; only unquantised weights are supported")
            if tuple(tensor.shape) != shape:
                raise file.error(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
            require_finite(str(file.path), name, tensor)
        if left := file.tensors.keys() - shapes.keys() - scales.keys():
            raise file.error(f"unknown tensor {min(left)} ({len(left)} in all)")

    def __getitem__(self, name: str) -> Tensor:
        dtype = torch.float32 if name.endswith(SCALE) else self._target.dtype
        return self._tensors[name].to(self._target.device, dtype, copy=True)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def norm(self, name: str) -> NormWeight | None:
        """The norm of that name, if the drafter has it."""
        return NormWeight(self[name]) if name in self else None

    def linear(self, prefix: str) -> Linear:
        """`PREFIXweight`, with `PREFIXbias` where there is one."""
        weight = prefix + "weight"
        return linear(self[weight], self.get(prefix + "bias"), self.get(weight + SCALE))

    def head(self, name: str, vocabulary: DraftVocabulary) -> Linear:
        """The drafter's own rows of the output head, or the target's rows of the draft vocabulary."""
        return self.linear(name.removesuffix("weight")) if name in self else self.target_head(vocabulary)

    def target_head(self, vocabulary: DraftVocabulary) -> Linear:
        """The target's head, cut to the draft vocabulary."""
        target, ids_U = self._target, vocabulary.token_ids_U
        assert target.head is not None
        in_8_bits = self._in_8_bits and can_pack(target.dtype, target.device) and target.dtype == torch.bfloat16
        if ids_U is None and not in_8_bits:
            return target.head
        rows_UM = target.head.plain() if ids_U is None else target.head.plain()[ids_U]
        return linear(rows_UM, None, row_scales(rows_UM) if in_8_bits else None)


def is_plain(tensor: Tensor) -> bool:
    """True for a dense tensor of unquantised numbers."""
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.dtype in FLOATS


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype) if tensor.layout == torch.strided and not tensor.is_meta else "not dense"


def require_target(
    file: DrafterFile[Any], *claims: tuple[str, object, object], remedy: str = ": it was made for another model"
) -> None:
    """Compares what a drafter was made for with what is here: (name, its value or None if unknown, value here).

    Raises:
        InputError: two differ.
    """
    for name, found, expected in claims:
        if found is not None and found != expected:
            raise file.error(f"{name} is {found}, but here it is {expected}{remedy}")


def draft_vocabulary(
    file: DrafterFile[Any],
    ids: Sequence[int] | None,
    target: Decoder,
    *,
    size: int | None = None,
    source: str = "config.draft_token_ids",
    ascending: bool = True,
) -> DraftVocabulary:
    """The draft vocabulary `ids` on the target's device; the whole vocabulary where they are None.

    `size` is what the config says of it, `source` the part of the file that lists `ids`.

    Raises:
        InputError: `ids` are none of the target's, out of order or not unique, or not as many as `size` says.
    """
    vocab_size = target.config.vocab_size
    if ids is not None:
        ordered = sorted(set(ids))
        fits = ordered and ordered[0] >= 0 and ordered[-1] < vocab_size and len(ordered) == len(ids)
        if not fits or (ascending and list(ids) != ordered):
            order = "ascending ids" if ascending else "ids"
            raise file.error(f"{source} must hold {order} from 0 to {vocab_size - 1}, each of them once")
    if size not in (None, vocab_size if ids is None else len(ids)):
        lack = f"{source} is missing" if ids is None else f"its draft tokens are {len(ids)}"
        raise file.error(f"config.draft_vocab_size is {size}, but {lack}")
    return DraftVocabulary(vocab_size, None if ids is None else torch.tensor(ids, device=target.device))


def mapped_ids(file: DrafterFile[Any], vocab_size: int) -> list[int] | None:
    """Token ids that a pair of tensors lists: `d2t`, by how much a draft id falls short of its token id, and `t2d`,
    which tokens have one. Each follows from the other, so one is enough. None where the file has neither.

    Writers pad both, as they pad vocabularies: `t2d` beyond the vocabulary, for tokens without a draft id, and the end
    of `d2t` with offsets of 0 or with tokens beyond the vocabulary. The padding is omitted.

    Raises:
        InputError: one of the two is misshapen, or they disagree.
    """
    offsets, member = file.tensors.get("d2t"), file.tensors.get("t2d")
    if offsets is None and member is None:
        return None
    for name, tensor, shape in (("t2d", member, vocab_size), ("d2t", offsets, None)):
        if tensor is None:
            continue
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in WHOLE_NUMBERS:
            raise file.error(f"tensor {name} is {_kind(tensor)}; expected whole numbers")
        padded = tensor is member and tensor.dim() == 1 and len(tensor) > vocab_size
        if padded and bool(tensor[vocab_size:].any()):
            first = vocab_size + int(tensor[vocab_size:].bool().nonzero()[0])
            raise file.error(f"tensor t2d gives token {first} a draft id, but the vocabulary has {vocab_size} tokens")
        if not padded and list(tensor.shape) != [tensor.numel() if shape is None else shape]:
            raise file.error(f"tensor {name} has shape {list(tensor.shape)}, expected {[shape or tensor.numel()]}")
        if not tensor.numel():
            raise file.error(f"tensor {name} names no draft token")
    if offsets is not None and member is None and _holds_ids(offsets.long().cpu(), vocab_size):
        raise file.error("tensor d2t seems to hold token ids, and not how far each is from its draft id; add t2d")
    found = None if offsets is None else _without_padding(offsets.long().cpu(), vocab_size, member)
    known = found if member is None else member[:vocab_size].bool().nonzero()[:, 0]
    assert known is not None
    if found is not None and not torch.equal(found, known):
        raise file.error(
            f"d2t does not match t2d: the one names {len(found)} draft tokens, the other {len(known)}, and not the "
            "same ones"
        )
    ids: list[int] = known.tolist()
    return ids


def _holds_ids(offsets_U: Tensor, vocab_size: int) -> bool:
    """True for numbers that are ascending ids of the vocabulary, and as offsets would lead beyond it."""
    is_ascending = bool((offsets_U.diff() > 0).all())
    return is_ascending and int(offsets_U[-1]) < vocab_size <= int(offsets_U[-1]) + len(offsets_U) - 1


def _without_padding(offsets_U: Tensor, vocab_size: int, member_V: Tensor | None) -> Tensor:
    """The token ids that `d2t` lists, without the padding at its end; all of them where the rest is no padding.

    Ids ascend, so that an offset of 0 after a greater one is no draft token. Where `t2d` is there, it says how many
    there are.
    """
    found_U = offsets_U + torch.arange(len(offsets_U))
    if member_V is None:
        ascending_U = (found_U < vocab_size) & (found_U > functional.pad(found_U[:-1], (1, 0), value=-1))
        count = int(ascending_U.long().cumprod(0).sum())
    else:
        count = int(member_V[:vocab_size].bool().sum())
    is_padding = (offsets_U[count:] == 0) | (found_U[count:] >= vocab_size)
    return found_U[:count] if count and bool(is_padding.all()) else found_U


def vocabulary_maps(ids_U: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """The pair `d2t` and `t2d` that `mapped_ids` reads."""
    member = torch.zeros(vocab_size, dtype=torch.bool)
    member[ids_U] = True
    return {"d2t": ids_U - torch.arange(len(ids_U)), "t2d": member}


def random_tensors(shapes: Mapping[str, Shape], seed: int) -> dict[str, Tensor]:
    """Matrices drawn from N(0, 0.02²) in the order of `shapes`, biases of zeros, norms of ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: Shape) -> Tensor:
        if len(shape) > 1:
            return torch.randn(shape, generator=generator) * 0.02
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)

    return {name: draw(name, shape) for name, shape in shapes.items()}
