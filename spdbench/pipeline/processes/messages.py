"""The messages of a controller and its stages: one short header, and rows of numbers behind it.

    controller -> stage 0 -> stage 1 -> ...     PROMPT, BATCH, SPANS, STOP: in order, each stage passes on what it got
    controller -> every stage                   the newest root, so that stale nodes are dropped before their work
    every stage -> controller                   READY, RESULT, SPANS, FAILED
    last stage -> controller                    HEAD after RESULT, where it computes one part of the output head

No message repeats what its receiver knows: a stage runs its own layers, keeps account of its own cache, and the next
receiver follows from the order of the stages. Nodes have ids that are never used again, in no request; the prompt has
one as well, below those of its nodes.

Shapes: S rows, M model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from spdbench.pipeline.schedule import Node


class Kind(IntEnum):
    """What a message is about."""

    PROMPT = 0
    BATCH = 1
    SPANS = 2
    STOP = 3
    READY = 4
    RESULT = 5
    FAILED = 6
    HEAD = 7


class Header(NamedTuple):
    """`batch` is the id of a batch's first node, or of the prompt; `root` that of the newest root when it was sent.
    `cycle` is the receiving stage's. `num_rows` are rows of a prompt, or nodes of a batch, which are listed in front of
    the rows. `value` is the cache's capacity (PROMPT), or -1. `flag` asks for a RESULT from stages that owe none
    (BATCH), says that the argmax of the logits is enough (PROMPT), or that a neighbour seems to be at fault (FAILED).
    `at_ns` is when the sender was done, on the clock that all processes share."""

    kind: int
    batch: int = 0
    root: int = 0
    cycle: int = 0
    num_rows: int = 0
    value: int = -1
    flag: int = 0
    at_ns: int = 0


_LAYOUT = Struct("<8q")


def pack(header: Header, payload: bytes = b"") -> bytes:
    return _LAYOUT.pack(*header) + payload


def unpack(message: bytes) -> tuple[Header, bytes]:
    return Header._make(_LAYOUT.unpack_from(message)), message[_LAYOUT.size :]


_NODE = Struct("<4q")
NODE_BYTES = _NODE.size


def pack_nodes(nodes: Sequence[Node]) -> bytes:
    """A table with a line a node; the first node of a sequence has the prompt as its parent."""
    return b"".join(_NODE.pack(node.id, node.parent, node.token_id, node.position) for node in nodes)


def unpack_nodes(table: bytes) -> list[Node]:
    return [Node(*line) for line in _NODE.iter_unpack(table)]


def to_bytes(tensor: Tensor) -> bytes:
    """A tensor's numbers, in order."""
    data: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data


def from_bytes(payload: bytes, dtype: torch.dtype, *shape: int) -> Tensor:
    """A new tensor of these numbers."""
    if not payload:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(payload), dtype=dtype).view(shape)
