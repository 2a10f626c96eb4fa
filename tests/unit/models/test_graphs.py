"""Recorded steps, rehearsed on a CPU: everything but the capture itself; the rest needs a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from spdbench.models.cuda.graph import GraphRunner, Readback, Upload

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph is captured on a GPU only")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@torch.inference_mode()
def test_a_replay_reads_what_its_tensors_hold_now(device: torch.device) -> None:
    given, found = torch.zeros(3, device=device), torch.zeros(3, device=device)
    replay = GraphRunner(device).record(lambda: found.copy_(given * 2))  # type: ignore[arg-type]
    given.copy_(torch.tensor([1.0, 2.0, 3.0]))
    replay()
    assert found.tolist() == [2.0, 4.0, 6.0]


@torch.inference_mode()
def test_graphs_that_share_memory_do_not_disturb_each_other(device: torch.device) -> None:
    runner, given = GraphRunner(device), torch.ones(1000, device=device)
    found = [torch.zeros(1000, device=device) for _ in range(4)]

    def work(index: int) -> Callable[[], None]:
        def add() -> None:
            found[index].copy_(given + torch.full_like(given, index) * given)

        return add

    replays = [runner.record(work(index)) for index in range(4)]
    given.fill_(2.0)
    for index in (2, 0, 3, 1, 2):
        replays[index]()
    assert [float(each.sum()) for each in found] == [2000.0 * (1 + index) for index in range(4)]


@torch.inference_mode()
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_works_side_by_side_are_all_done_before_what_follows(device: torch.device, count: int) -> None:
    runner = GraphRunner(device)
    parts, total = torch.zeros(5, 64, device=device), torch.zeros((), device=device)

    def work(index: int) -> Callable[[], None]:
        return lambda: parts[index].add_(index + 1.0)  # type: ignore[return-value]

    def together() -> None:
        runner.side_by_side([work(index) for index in range(count)])
        total.copy_(parts.sum())

    replay = runner.record(together)
    parts.zero_()
    replay()
    replay()
    assert float(total) == 2 * 64 * sum(range(1, count + 1))


@torch.inference_mode()
def test_uploads_arrive_in_order(device: torch.device) -> None:
    upload, seen = Upload(2, torch.long, device), torch.zeros(10, 2, dtype=torch.long, device=device)
    for turn in range(10):
        upload.send([turn, turn * turn])
        seen[turn].copy_(upload.words)
    assert seen.tolist() == [[turn, turn * turn] for turn in range(10)]


@pytest.mark.parametrize("read", [True, False], ids=["read already", "still to be read"])
def test_an_upload_waits_only_for_what_the_device_has_not_read(monkeypatch: pytest.MonkeyPatch, read: bool) -> None:
    """With events that stand for a GPU's."""
    events: list[Event] = []

    class Event:
        def __init__(self) -> None:
            self.waits = 0
            events.append(self)

        def query(self) -> bool:
            return read

        def synchronize(self) -> None:
            self.waits += 1

        def record(self, _stream: object) -> None:
            pass

    monkeypatch.setattr("spdbench.models.cuda.graph.new_event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    upload = Upload(1, torch.long, CPU)
    upload._on_gpu, upload._events = True, [Event() for _ in range(Upload.COPIES)]  # type: ignore[misc]
    for turn in range(6):
        upload.send([turn])
    assert sum(event.waits for event in events) == (0 if read else 6)


@torch.inference_mode()
def test_a_ticket_is_worth_what_there_was_when_it_was_given(device: torch.device) -> None:
    number, readback = torch.zeros(1, dtype=torch.long, device=device), Readback(1, device)
    tickets = []
    for turn in range(3):
        number.fill_(turn)
        tickets.append(readback.start(number))
    assert [readback.read(ticket) for ticket in tickets] == [[0], [1], [2]]


@needs_gpu
@torch.inference_mode()
def test_no_garbage_is_collected_in_the_middle_of_a_capture() -> None:
    states: list[bool] = []
    GraphRunner(torch.device("cuda")).record(lambda: states.append(gc.isenabled()))
    assert states == [True, True, False]
    assert gc.isenabled()
