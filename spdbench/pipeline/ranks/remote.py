"""Rank 0's side of a torchrun job: the other ranks, and the stages on them.

Every stage has a rank of its own, and these are always the last ranks of the job: all but rank 0, or all of them where
rank 0 runs the first stage itself.

Shapes: none; what is sent are plain objects, and `worker` messages once a stage runs.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from spdbench.errors import InputError
from spdbench.pipeline.processes.stage_faults import StageHandle
from spdbench.pipeline.processes.worker import StageSpec
from spdbench.pipeline.ranks.host import GOODBYE, PING, Ended, Question, Started, StartStage
from spdbench.pipeline.ranks.job import (
    JOIN_S,
    Job,
    JobStore,
    Purpose,
    RankPlace,
    clock_offset,
    close_quietly,
    connect,
    from_json,
    machine_id,
    new_key,
    place_of,
)
from spdbench.processors import add_worker, elsewhere, remove_worker

ANSWER_S = 3.0
"""How long another rank may take to answer a question about a stage."""
START_S = 60.0
"""How long it may take to start a stage's process."""
LOST = 256
"""The exit code of a process that cannot be asked for it: not one that a process can have."""


class Ranks:
    """All ranks of a job, rank 0 first. The others are reached by a connection each; `offsets` are those of their
    clocks to ours in ns, with how much they may be wrong."""

    def __init__(self, places: Sequence[RankPlace], sessions: Sequence[Connection], key: bytes) -> None:
        self.places = tuple(places)
        self._sessions = tuple(sessions)
        self._key = key
        self._num_pipelines = 0
        here = machine_id()
        self.is_here = True, *(place.machine == here for place in self.places[1:])
        found = [
            (0, 0) if is_here else clock_offset(lambda session=session: _ping(session))  # type: ignore[misc]
            for session, is_here in zip(self._sessions, self.is_here[1:], strict=True)
        ]
        self.offsets = (0, 0), *found

    def require_stages(self, count: int, label: str, *, first_is_here: bool) -> None:
        """Raises `InputError` unless there is a rank for each of the `count` stages of backend `label`: `first_is_here`
        says that rank 0 runs the first one, otherwise it runs none."""
        world, needed = len(self.places), count + (not first_is_here)
        if world == needed:
            return
        rank_0s = "measures and runs the first one" if first_is_here else "measures"
        fitting = world - (not first_is_here)
        others = f", or stages={fitting}" if fitting > first_is_here else ""
        if world == count > 1:
            others += f", or {label}.drafting=first_stage, with which rank 0 runs the first one"
        raise InputError(
            f"-o {label}.executor=torchrun: {count} stages need {needed} ranks, as rank 0 {rank_0s} and every other "
            f"rank runs one, but torchrun started {world}. Give --nnodes and --nproc_per_node whose product is "
            f"{needed}{others}."
        )

    def threads(self, num_stages: int, threads: int) -> tuple[int, int]:
        """The threads of a stage, where each machine has `threads`; and how many stages run on rank 0's machine."""
        machines = Counter(place.machine for place in self.places[-num_stages:])
        return max(1, threads // max(machines.values())), machines[self.places[0].machine]

    def place(self, specs: Sequence[StageSpec], devices: Sequence[str], threads: int) -> list[StageSpec]:
        """Stages as those that rank 0 would run by itself, on their ranks: each with its rank's device, and with its
        share of `threads` and cores among the stages on its machine."""
        places, by_machine = self.places[-len(specs) :], dict[str, list[int]]()
        for index, place in enumerate(places):
            by_machine.setdefault(place.machine, []).append(index)
        each, _ = self.threads(len(specs), threads)
        found = []
        for spec, place, (offset, _) in zip(specs, places, self.offsets[-len(specs) :], strict=True):
            together = by_machine[place.machine]
            first = together.index(spec.index) * each
            pinned = spec.cores is not None and len(together) * each <= len(place.cores)
            found.append(
                replace(
                    spec,
                    device=_device_of(place, devices),
                    threads=each,
                    cores=frozenset(place.cores[first : first + each]) if pinned else None,
                    group_host=places[0].host,
                    clock_offset_ns=offset,
                )
            )
        return found

    def devices(self, devices: Sequence[str], num_stages: int) -> list[str]:
        """What each stage runs on, under the names that results have."""
        return [
            device if is_here else elsewhere(device, place.node)
            for place, is_here in zip(self.places[-num_stages:], self.is_here[-num_stages:], strict=True)
            for device in [_device_of(place, devices)]
        ]

    def describe(self, num_stages: int) -> dict[str, str]:
        """What a result says of the job."""
        nodes = ", ".join(str(place.node) for place in self.places[-num_stages:])
        found = {"nodes": f"{nodes} by stage"}
        if not all(self.is_here):
            offsets = ", ".join(
                f"{offset / 1e3:.0f} ± {error / 1e3:.0f}" for offset, error in self.offsets[-num_stages:]
            )
            found["clock_offsets_us"] = f"{offsets} by stage, estimated at the start"
        return found

    def start_stages(self, specs: Sequence[StageSpec], label: str, handles: list[StageHandle]) -> Connection:
        """`stages.StartStages` on other ranks, a stage on each; `specs` may be those of the last stages only.

        Raises:
            InputError: a rank cannot be reached, has no model, or cannot reach its neighbour.
        """
        self._num_pipelines += 1
        ids = [f"{label}/{self._num_pipelines}/{spec.index}" for spec in specs]
        places, is_here = self.places[-len(specs) :], self.is_here[-len(specs) :]
        to_first = self._connect(places[0], Purpose("inbox", ids[0]))
        following = zip([*places[1:], None], [*ids[1:], ""], strict=True)
        for spec, stage_id, place, here, (next_place, next_id) in zip(
            specs, ids, places, is_here, following, strict=True
        ):
            reports = self._connect(place, Purpose("reports", stage_id))
            watch = self._connect(place, Purpose("watch", stage_id))
            order = StartStage(stage_id, spec, next_place, next_id)
            process = RemoteProcess(watch, place, here)
            handles.append(StageHandle(label, spec, process, reports, reports, deque()))
            process.start(order)
        return to_first

    def lost(self) -> list[str]:
        """The names of ranks that have ended by themselves."""
        return [
            place.name for place, session in zip(self.places[1:], self._sessions, strict=True) if _has_ended(session)
        ]

    def close(self, exit_code: int = 0) -> None:
        """Ends the other ranks with the exit code of this one. May be called twice."""
        for session in self._sessions:
            with contextlib.suppress(OSError):
                session.send_bytes(b"%d" % exit_code)
        close_quietly(*self._sessions)

    def _connect(self, place: RankPlace, purpose: Purpose) -> Connection:
        try:
            return connect(place, self._key, purpose)
        except OSError as error:
            raise InputError(_unreachable(place, error)) from None


def _device_of(place: RankPlace, devices: Sequence[str]) -> str:
    """The rank's device: of several `devices` the one with its local rank, in turn; of one GPU named, or none, the
    node's GPU of that number."""
    if len(devices) > 1 or devices[0] == "cpu":
        return devices[place.local_rank % len(devices)]
    return f"cuda:{place.local_rank % max(1, place.num_gpus)}"


def _unreachable(place: RankPlace, error: BaseException) -> str:
    return (
        f"rank 0 cannot reach {place.name} at {place.host}:{place.port} ({error}). Nodes have to reach each other on "
        "any port."
    )


def _ping(session: Connection) -> int:
    session.send_bytes(PING)
    return int(session.recv_bytes())


def _has_ended(session: Connection) -> bool:
    """True if the other end is gone and did not say that it was ended by a signal for all ranks."""
    try:
        return session.poll(0) and session.recv() != GOODBYE
    except (EOFError, OSError):
        return True


def join(job: Job, limit_s: float = JOIN_S) -> Ranks:
    """All ranks of `job`, whose rank is 0.

    Raises:
        InputError: one of them is not there within `limit_s`, or cannot be reached.
    """
    store = JobStore(job, limit_s)
    key = new_key()
    store.publish("key", key)
    places, sessions = [place_of(job)], []
    try:
        for rank in range(1, job.world_size):
            try:
                place = from_json(store.read(f"rank/{rank}", limit_s))
            except TimeoutError:
                raise InputError(f"rank {rank} of {job.world_size} did not come within {limit_s:g} s") from None
            try:
                sessions.append(connect(place, bytes.fromhex(key), Purpose("session"), limit_s))
            except OSError as error:
                raise InputError(_unreachable(place, error)) from None
            places.append(place)
        return Ranks(places, sessions, bytes.fromhex(key))
    except BaseException:
        close_quietly(*sessions)
        raise


_joined: Ranks | None = None
"""The other ranks of this process's job. There is one job a process, and rank 0 joins it before anything else."""


def set_joined(ranks: Ranks | None) -> None:
    global _joined
    _joined = ranks


def joined_ranks(asked: str) -> Ranks:
    """The ranks of this process's job.

    Raises:
        InputError: torchrun did not start this process; names `asked`, what needs it.
    """
    if _joined is None:
        raise InputError(
            f"{asked}: torchrun has to start the run: torchrun --nproc_per_node=4 -m spdbench run ... (for 3 stages). "
            "Without it: executor=process."
        )
    return _joined


class RemoteProcess:
    """A stage's process that another rank hosts (`stage_faults.StageProcess`). Its host sends `Ended` by itself, and
    nothing else but answers."""

    def __init__(self, watch: Connection, place: RankPlace, is_here: bool) -> None:
        self._watch = watch
        self._place = place
        self._is_here = is_here
        self._exitcode: int | None = None
        self.pid: int | None = None

    def start(self, order: StartStage) -> None:
        found = self._ask(order, START_S)
        if not isinstance(found, Started):
            raise InputError(f"{self._place.name} gave no answer within {START_S:g} s when it had to start a stage")
        if found.problem:
            raise InputError(f"{self._place.name}: {found.problem}")
        self.pid = found.pid
        if self._is_here:
            add_worker(found.pid)

    @property
    def place(self) -> str:
        return f"{self._place.name}, "

    @property
    def sentinel(self) -> int:
        return self._watch.fileno()

    @property
    def exitcode(self) -> int | None:
        if self._exitcode is None:
            with contextlib.suppress(OSError):
                if self._watch.poll(0):
                    self._receive()
        return self._exitcode

    @property
    def is_lost(self) -> bool:
        return self.exitcode == LOST

    def kill(self) -> None:
        """By way of its host; if that has gone, the process has ended too."""
        if self._exitcode is None:
            with contextlib.suppress(OSError):
                self._watch.send(Question("end"))

    def print_stack(self) -> None:
        with contextlib.suppress(OSError):
            self._watch.send(Question("stack"))

    def read_stack(self) -> str:
        found = self._receive(ANSWER_S)
        return found if isinstance(found, str) else "  (its rank does not answer either: stopped, lost or cut off)"

    def usage(self) -> tuple[str, ...]:
        found = self._ask(Question("usage"), ANSWER_S)
        return found if isinstance(found, tuple) and not isinstance(found, Started | Ended) else ()

    def close(self) -> None:
        if self.pid is not None:
            remove_worker(self.pid)
        close_quietly(self._watch)

    def _ask(self, question: Any, limit_s: float) -> Any:
        try:
            self._watch.send(question)
        except OSError:
            return None
        return self._receive(limit_s)

    def _receive(self, limit_s: float = 0.0) -> Any:
        """What the host sends next; None if nothing comes, or if the process has ended."""
        try:
            if self._exitcode is not None or not self._watch.poll(limit_s):
                return None
            found = self._watch.recv()
        except (EOFError, OSError):
            self._exitcode = LOST
            return None
        if isinstance(found, Ended):
            self._exitcode = found.exitcode
            return None
        return found
