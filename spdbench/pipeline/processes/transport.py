"""How messages get from one process to the next.

Headers always go through a pipe, which wakes its reader within some ten microseconds. Rows go the same way behind
their header, or between devices through `torch.distributed` (NCCL between GPUs; gloo, by way of the host).

Shapes: S rows, M model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from spdbench.pipeline.processes.messages import Header, from_bytes, pack, to_bytes, unpack

RowTransport = Literal["pipe", "gloo", "nccl"]


@dataclass(frozen=True)
class StagePipes:
    """A stage's ends of its pipes: messages in and out, reports to the controller, `control` numbers from it (roots,
    and first the port of the process group's store), and where stacks are printed. The last stage has no `outbox`."""

    inbox: Connection
    outbox: Connection | None
    reports: Connection
    control: Connection
    stacks: Connection


class LinkClosedError(Exception):
    """The process at the other end has ended; the cause, if any, is the process group's error."""


class Link:
    """One direction between two processes: rows behind their header, through the host's memory."""

    def __init__(self, connection: Connection, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._connection = connection
        self._width = width
        self._dtype = dtype
        self._device = device

    def send(self, header: Header, rows_SM: Tensor | None = None, table: bytes = b"") -> None:
        """A message: its header, a `table` that belongs to it, and its rows."""
        self._write(header, table if rows_SM is None else table + to_bytes(rows_SM))

    def receive(self) -> tuple[Header, bytes]:
        """Waits for a message."""
        try:
            return unpack(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise LinkClosedError from None

    def rows(self, header: Header, payload: bytes) -> Tensor:
        """The rows that belong to a message just received, of whose `payload` the table is taken off: `[S, M]`."""
        return from_bytes(payload, self._dtype, header.num_rows, self._width).to(self._device)

    def _write(self, header: Header, payload: bytes) -> None:
        try:
            self._connection.send_bytes(pack(header, payload))
        except OSError:
            raise LinkClosedError from None


class DistributedLink(Link):
    """Headers through the pipe, rows from process group rank to rank."""

    def __init__(
        self, connection: Connection, width: int, dtype: torch.dtype, device: torch.device, peer: int, *, host: bool
    ) -> None:
        super().__init__(connection, width, dtype, device)
        self._peer = peer
        self._host = host
        place = torch.device("cpu") if host else device
        self._row = torch.empty(1, width, dtype=dtype, device=place)

    def send(self, header: Header, rows_SM: Tensor | None = None, table: bytes = b"") -> None:
        self._write(header, table)
        if rows_SM is not None:
            try:
                dist.send(rows_SM.cpu() if self._host else rows_SM.contiguous(), self._peer)
            except RuntimeError as error:
                raise LinkClosedError from error

    def rows(self, header: Header, payload: bytes) -> Tensor:  # noqa: ARG002 - rows come through the process group
        shape = (header.num_rows, self._width)
        buffer = self._row if header.num_rows == 1 else torch.empty(shape, dtype=self._dtype, device=self._row.device)
        try:
            dist.recv(buffer, self._peer)
        except RuntimeError as error:
            raise LinkClosedError from error
        return buffer.to(self._device)
