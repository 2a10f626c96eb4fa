"""Captured functions, rehearsed on a CPU: everything but the capture itself; the rest needs a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from spdbench.models.cuda.captured_function import (
    CapturedFunction,
    CudaGraphs,
    Readback,
    Upload,
    bucket_for,
    buckets,
)

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph is captured on a GPU only")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_buckets_are_powers_of_two_and_the_capacity() -> None:
    assert buckets(100) == (100,)
    assert buckets(256) == (256,)
    assert buckets(1500) == (256, 512, 1024, 1500)
    assert buckets(1500, at_least=300) == (512, 1024, 1500)
    assert [bucket_for(length, buckets(1500)) for length in (1, 256, 257, 1500)] == [256, 256, 512, 1500]


@torch.inference_mode()
def test_a_call_replays_the_bucket_of_its_length_over_the_inputs_it_is_given(device: torch.device) -> None:
    state = torch.zeros(1, device=device)

    def work(bucket: int, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state.add_(1)
        return given * bucket, given + state

    function = CapturedFunction(CudaGraphs(device), work, (torch.zeros(2, device=device),), (4, 8))
    state.zero_()
    (product, total), given = function(torch.ones(2, device=device), length=3), torch.full((2,), 5.0, device=device)
    assert (product.tolist(), total.tolist()) == ([4.0, 4.0], [2.0, 2.0])
    assert function(given, length=5)[0] is product, "results stay in place, whichever bucket gave them"
    given.zero_()
    assert (product.tolist(), total.tolist()) == ([40.0, 40.0], [7.0, 7.0])
    function.inputs[0].fill_(1.0)
    assert function(length=8)[0].tolist() == [8.0, 8.0]
    with pytest.raises(ValueError, match="argument"):
        function(given, given)


@torch.inference_mode()
def test_a_replay_reads_what_its_tensors_hold_now(device: torch.device) -> None:
    given, found = torch.zeros(3, device=device), torch.zeros(3, device=device)
    replay = CudaGraphs(device).capture(lambda: found.copy_(given * 2))  # type: ignore[arg-type]
    given.copy_(torch.tensor([1.0, 2.0, 3.0]))
    replay()
    assert found.tolist() == [2.0, 4.0, 6.0]


@torch.inference_mode()
def test_graphs_that_share_memory_do_not_disturb_each_other(device: torch.device) -> None:
    runner, given = CudaGraphs(device), torch.ones(1000, device=device)
    found = [torch.zeros(1000, device=device) for _ in range(4)]

    def work(index: int) -> Callable[[], None]:
        def add() -> None:
            found[index].copy_(given + torch.full_like(given, index) * given)

        return add

    replays = [runner.capture(work(index)) for index in range(4)]
    given.fill_(2.0)
    for index in (2, 0, 3, 1, 2):
        replays[index]()
    assert [float(each.sum()) for each in found] == [2000.0 * (1 + index) for index in range(4)]


@torch.inference_mode()
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_works_side_by_side_are_all_done_before_what_follows(device: torch.device, count: int) -> None:
    runner = CudaGraphs(device)
    parts, total = torch.zeros(5, 64, device=device), torch.zeros((), device=device)

    def work(index: int) -> Callable[[], None]:
        return lambda: parts[index].add_(index + 1.0)  # type: ignore[return-value]

    def together() -> None:
        runner.side_by_side([work(index) for index in range(count)])
        total.copy_(parts.sum())

    replay = runner.capture(together)
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

    monkeypatch.setattr("spdbench.models.cuda.captured_function.new_event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    upload = Upload(1, torch.long, CPU)
    upload._events = [Event() for _ in range(Upload.COPIES)]  # type: ignore[misc]
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
    CudaGraphs(torch.device("cuda")).capture(lambda: states.append(gc.isenabled()))
    assert states == [True, True, False]
    assert gc.isenabled()
