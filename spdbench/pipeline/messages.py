"""The messages of a controller and its stages: one short header, and rows of numbers behind it.

    controller -> stage 0 -> stage 1 -> ...     PROMPT, NODE, SPANS, STOP: in order, each stage passes on what it got
    controller -> every stage                   the newest epoch, so that stale nodes are dropped before their work
    every stage -> controller                   READY, RESULT, SPANS, FAILED

No message repeats what its receiver knows: a stage runs its own layers, a node's position is where its cache is rolled
back to, and the next receiver follows from the order of the stages.

Shapes: S rows, M model width.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor


class Kind(IntEnum):
    """What a message is about."""

    PROMPT = 0
    NODE = 1
    SPANS = 2
    STOP = 3
    READY = 4
    RESULT = 5
    FAILED = 6


class Header(NamedTuple):
    """`epoch` counts restarts of the sequence: nodes of older epochs are stale. `cycle` is the receiving stage's.
    `value` is a token id (NODE to stage 0, RESULT of a greedy head), the cache's capacity (PROMPT), or -1. `flag` asks
    for a RESULT from stages that owe none (NODE), says that the argmax of the logits is enough (PROMPT), or that a
    neighbour seems to be at fault (FAILED). `at_ns` is when the sender was done, on the clock that all processes
    share."""

    kind: int
    epoch: int = 0
    cycle: int = 0
    position: int = 0
    num_rows: int = 0
    value: int = -1
    flag: int = 0
    at_ns: int = 0


_LAYOUT = Struct("<8q")


def pack(header: Header, payload: bytes = b"") -> bytes:
    return _LAYOUT.pack(*header) + payload


def unpack(message: bytes) -> tuple[Header, bytes]:
    return Header._make(_LAYOUT.unpack_from(message)), message[_LAYOUT.size :]


def to_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers, in order."""
    data: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data


def from_bytes(payload: bytes, dtype: torch.dtype, *shape: int) -> Tensor:
    """A new tensor of these numbers."""
    if not payload:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(payload), dtype=dtype).view(shape)
