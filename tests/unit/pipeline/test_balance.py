"""Stages are cut by what was measured, with the head in the last and the drafter beside the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.stored_costs import StoredCosts
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.models.partition import Layout, PieceTimes, split_by_cost
from spdbench.pipeline import profiling
from spdbench.pipeline.profiling import measured_times
from spdbench.profiles.profile import parse_key
from spdbench_backends.spd import head
from spdbench_backends.spd.backend import SPD
from spdbench_backends.spd.pipelined import Pipelined
from spdbench_backends.spd.ppsd import PPSD
from tests import tiny


def balanced_stages(
    decoder: TargetDecoder, num_stages: int, threads: int, drafting_s: float = 0.0, stored: StoredCosts | None = None
) -> tuple[range, ...]:
    """As `-o stage_layers=auto` cuts a model whose drafter shares the first stage's processors."""
    times = PieceTimes(*measured_times(decoder, threads, stored), drafting_s, drafts_last=False, has_lane=False)
    return split_by_cost(times.layers_s, times.extras_s(Layout(), num_stages))


@pytest.mark.parametrize(
    ("head_s", "drafting_s", "counts"),
    [(0.0, 0.0, [3, 3]), (2.0, 0.0, [4, 2]), (9.0, 0.0, [5, 1]), (0.0, 4.0, [1, 5]), (2.0, 2.0, [3, 3])],
)
def test_the_cut_follows_the_times(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, head_s: float, drafting_s: float, counts: list[int]
) -> None:
    """A layer takes a second here."""
    asked = []

    def timed(work: Callable[[], Any], *, threads: int) -> float:
        work()
        asked.append(threads)
        return 6.0 if len(asked) == 1 else head_s

    monkeypatch.setattr(profiling, "median_seconds", timed)
    assert [len(stage) for stage in balanced_stages(decoder, 2, 5, drafting_s)] == counts
    assert asked == [5, 5]


def test_measured_for_real_all_layers_are_there(decoder: Decoder) -> None:
    stages = balanced_stages(decoder, 3, 1)
    assert [layer for stage in stages for layer in stage] == list(range(6))


def test_a_second_start_cuts_the_same_stages_by_the_stored_times(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is as fast as nothing at first, and would take all of the last stage's time later."""
    target, times = tiny.load(tiny_model), iter([6.0, 0.0, 6.0, 9.0])
    monkeypatch.setattr(profiling, "median_seconds", lambda *_, **__: next(times))
    stored = StoredCosts(target, 1)
    cuts = [balanced_stages(target.decoder, 2, 1, stored=stored) for _ in range(2)]
    assert cuts[0] == cuts[1]
    stored.forget()
    assert balanced_stages(target.decoder, 2, 1, stored=stored) != cuts[0]


def test_a_draft_of_spd_is_timed_once_for_a_number_of_stages(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny.load(tiny_model)
    times = iter([1.0, 2.0])

    def timed(work: Callable[[], object], *, threads: int, between: Callable[[], object]) -> float:  # noqa: ARG001
        with torch.inference_mode():
            between()
            work()
        return next(times)

    monkeypatch.setattr("spdbench_backends.spd.head.median_seconds", timed)

    def measure(stages: int) -> None:
        options = parse_options("spd", SPD.Options, {"stages": str(stages), "executor": "inline"})
        backend = SPD(options, BackendContext("spd", target, "random", ("cpu",), 1, 0))
        backend.load()
        backend.measure_costs()
        backend.close()

    for stages in (2, 3, 2):
        measure(stages)
    seconds = StoredCosts(target, 1).read().seconds
    assert {parse_key(key)[1]["stages"]: s for key, s in seconds.items() if key.startswith("draft ")} == {
        "2": 1.0,
        "3": 2.0,
    }


@pytest.mark.parametrize("method", [SPD, PPSD])
def test_after_a_profile_no_start_measures_whatever_it_has_to_choose(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, method: type[Pipelined]
) -> None:
    target, threads = tiny.load(tiny_model), 7

    def made(**options: str) -> Pipelined:
        read = parse_options("it", method.Options, {"stages": "3", **options})
        return method(read, BackendContext("it", target, "random", ("cpu",), threads, 0))

    profiled = made(executor="inline")
    profiled.load()
    profiled.measure_costs()
    profiled.close()
    for place in (profiling, head):
        monkeypatch.setattr(place, "median_seconds", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(method, "_start_pipeline", lambda _: None)  # processes, which have nothing to choose
    for options in ({"drafting": "auto", "head": "auto"}, {"head": "auto"}, {"stage_layers": "auto"}):
        chosen = made(executor="process", **options)
        chosen.load()
        shown = chosen.describe().chosen.get("layout", "")
        assert ("ms a cycle by measured parts" in shown) is ("head" in options)
        chosen.close()


def test_a_second_start_of_ppsd_lays_its_stages_out_by_the_stored_times(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, timed = tiny.load(tiny_model), list[float]()

    def slower_each_time(work: Callable[[], Any], *, threads: int) -> float:  # noqa: ARG001
        timed.append(10.0 ** len(timed))
        return timed[-1]

    monkeypatch.setattr(profiling, "median_seconds", slower_each_time)

    def start() -> tuple[int, ...]:
        options = parse_options("ppsd", PPSD.Options, {"stages": "3", "executor": "inline", "stage_layers": "auto"})
        backend = PPSD(options, BackendContext("ppsd", target, "random", ("cpu",), 1, 0))
        backend.load()
        layers = backend.describe().stage_layers
        backend.close()
        return layers

    first = start()
    assert len(timed) == 4  # a layer and the head, of the target and of the exit
    assert start() == first
    assert len(timed) == 4
    found = {key: s for key, s in StoredCosts(target, 1).read().seconds.items() if key.startswith("draft ")}
    assert found == {"draft drafter=random method=ppsd stages=3 threads=1": timed[2] + timed[3]}


def test_recurrent_layers_have_a_time_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a recurrent layer, of which there are four, takes three times as long as one of attention."""
    hybrid = tiny.load(tiny.make_model(tmp_path, "qwen3_5_text")).own_decoder
    asked = []

    def timed(work: Callable[[], Any], *, threads: int) -> float:  # noqa: ARG001
        work()
        asked.append(work)
        return {1: 12.0, 2: 2.0}.get(len(asked), 0.0)

    monkeypatch.setattr(profiling, "median_seconds", timed)
    assert [len(stage) for stage in balanced_stages(hybrid, 4, 1)] == [1, 2, 1, 2]
    assert len(asked) == 3
