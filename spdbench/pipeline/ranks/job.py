"""A torchrun job as one of its ranks sees it: who it is, where each rank listens, and how ranks connect.

Every rank but 0 listens on a port and publishes it, with a few facts on its machine, in the job's store. Rank 0 reads
all of them before it does anything else. A connection is a TCP connection on which both ends have proved, by
`multiprocessing`'s HMAC handshake, that they know the key that rank 0 put into the store. The store itself is open to
everyone who reaches its port, as that of any torchrun job.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, NamedTuple

from spdbench.errors import InputError
from spdbench.processors import usable_processors

JOIN_S = 60.0
"""How long ranks wait for each other at the start."""
RETRY_S = 0.2
LOOK_EVERY_S = 0.05
HANDSHAKE_S = 10.0
"""How long the other end of a new connection may take to prove that it belongs to the job."""
NUM_PINGS = 32

KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 4, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 20_000}
"""A peer whose machine or network has gone counts as gone after 20 s of silence (Linux: tcp(7))."""


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs. `node` counts the job's torchrun agents, `machine` is equal for ranks that share a clock and
    see each other's processes."""

    rank: int
    node: int
    local_rank: int
    machine: str
    host: str
    port: int
    cores: tuple[int, ...]
    num_gpus: int

    @property
    def name(self) -> str:
        """Without the host's name, since it goes into results."""
        return f"rank {self.rank} on node {self.node}"


class Purpose(NamedTuple):
    """What a new connection is for: `session` or `watch` of rank 0, `inbox` or `reports` of the stage `stage_id`."""

    kind: str
    stage_id: str = ""


@dataclass(frozen=True)
class Job:
    """This process's place in a torchrun job, as torchrun's variables give it."""

    rank: int
    local_rank: int
    world_size: int
    node: int
    address: str
    port: int
    agent_has_store: bool
    num_local: int
    run_id: str

    @property
    def spans_nodes(self) -> bool:
        return self.num_local < self.world_size


def job_of_environment() -> Job | None:
    """The job that this process belongs to; None if torchrun did not start it."""
    found = os.environ
    if "TORCHELASTIC_RUN_ID" not in found:
        return None
    try:
        return Job(
            int(found["RANK"]),
            int(found["LOCAL_RANK"]),
            int(found["WORLD_SIZE"]),
            int(found.get("GROUP_RANK", 0)),
            found["MASTER_ADDR"],
            int(found["MASTER_PORT"]),
            found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            int(found.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"])),
            f"{found['TORCHELASTIC_RUN_ID']}/{found.get('TORCHELASTIC_RESTART_COUNT', 0)}",
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"TORCHELASTIC_RUN_ID is set, but not all of torchrun's variables are ({error})") from None


class JobStore:
    """The job's key-value store, which the ranks use once, to find each other."""

    def __init__(self, job: Job, limit_s: float) -> None:
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        is_master = job.rank == 0 and not job.agent_has_store
        try:
            if not is_master:
                _wait_for_port(job, limit_s)  # in silence, where TCPStore would warn of every try
            store = TCPStore(job.address, job.port, None, is_master, timedelta(seconds=limit_s), wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"rank {job.rank} on node {job.node} cannot reach rank 0's node at {job.address}:{job.port} within "
                f"{limit_s:g} s ({_reason(error)}). Check --master-addr (or --rdzv-endpoint), the firewall, and that "
                "torchrun runs on the other node."
            ) from None
        self._store = PrefixStore(f"spdbench/{job.run_id}", store)

    def publish(self, name: str, value: object) -> None:
        self._store.set(name, json.dumps(value))

    def read(self, name: str, limit_s: float) -> Any:
        """What some rank published.

        Raises:
            TimeoutError: nobody did within `limit_s`.
        """
        deadline = time.monotonic() + limit_s
        while not self._store.check([name]):  # in silence, where `wait` would warn of its limit
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(LOOK_EVERY_S)
        return json.loads(self._store.get(name))


def _wait_for_port(job: Job, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((job.address, job.port), limit_s).close()
            return
        except OSError:
            if time.monotonic() + RETRY_S > deadline:
                raise
            time.sleep(RETRY_S)


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def new_key() -> str:
    """The secret that the ranks of one job share."""
    return secrets.token_hex(32)


def listen(job: Job) -> tuple[socket.socket, RankPlace]:
    """A listening socket, and the place that other ranks find it at: the address from which this machine reaches the
    store. Where that is a loopback address, the store is on this machine, and other nodes reach it by the store's
    name."""
    with socket.create_connection((job.address, job.port), HANDSHAKE_S) as towards:
        own, family = str(towards.getsockname()[0]), towards.family
    is_public = not ipaddress.ip_address(own.partition("%")[0]).is_loopback
    listener = socket.create_server((own if is_public or not job.spans_nodes else "", 0), family=family)
    host = own if is_public or not job.spans_nodes else job.address
    return listener, place_of(job, host, listener.getsockname()[1])


def place_of(job: Job, host: str = "", port: int = 0) -> RankPlace:
    """This rank's place, which listens at `host` and `port`; nobody connects to rank 0."""
    return RankPlace(
        rank=job.rank,
        node=job.node,
        local_rank=job.local_rank,
        machine=machine_id(),
        host=host,
        port=port,
        cores=tuple(usable_processors()),
        num_gpus=_num_gpus(),
    )


def machine_id() -> str:
    """Equal for processes with one monotonic clock that see each other's process ids (Linux; elsewhere by host)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def to_json(place: RankPlace) -> dict[str, Any]:
    return asdict(place)


def from_json(found: dict[str, Any]) -> RankPlace:
    return RankPlace(**{**found, "cores": tuple(found["cores"])})


def connect(place: RankPlace, key: bytes, purpose: Purpose, limit_s: float = HANDSHAKE_S) -> Connection:
    """A new connection to another rank.

    Raises:
        OSError: it cannot be reached, or does not know the key.
    """
    tcp = socket.create_connection((place.host, place.port), limit_s)
    connection = _proved(tcp, (answer_challenge, deliver_challenge), key)
    connection.send(purpose)
    return connection


def accept(listener: socket.socket, key: bytes) -> tuple[Connection, Purpose] | None:
    """The next connection; None where someone connected who is not of this job."""
    tcp, _ = listener.accept()
    try:
        connection = _proved(tcp, (deliver_challenge, answer_challenge), key)
        return connection, Purpose(*connection.recv())
    except (OSError, EOFError):
        return None


def _proved(tcp: socket.socket, handshake: Sequence[Callable[[Connection, bytes], None]], key: bytes) -> Connection:
    """The connection after the parts of its handshake. Messages leave at once, and a peer that has gone is noticed."""
    tcp.settimeout(None)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(HANDSHAKE_S))
    connection: Connection = Connection(tcp.detach())
    try:
        for part in handshake:
            part(connection, key)
    except Exception as error:  # AuthenticationError is no OSError
        connection.close()
        raise OSError(f"the handshake failed: {error or type(error).__name__}") from None
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(0))
    return connection


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), 0)


def clock_offset(ping: Callable[[], int]) -> tuple[int, int]:
    """How far another process's clock is ahead of ours in ns, and by how much that may be wrong.

    `ping` returns the other clock's reading. It was read between our two readings around the call, so their middle is
    wrong by half the time in between at most; the fastest of several pings counts (as in NTP, RFC 5905, section 8).
    """
    best: tuple[int, int] | None = None
    for _ in range(NUM_PINGS):
        before = time.perf_counter_ns()
        theirs = ping()
        after = time.perf_counter_ns()
        found = theirs - (before + after) // 2, (after - before + 1) // 2
        best = found if best is None or found[1] < best[1] else best
    assert best is not None
    return best


def close_quietly(*connections: Connection | None) -> None:
    for connection in connections:
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()
