"""What `benchmarks.gate` does on purpose, and how it counts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from time import perf_counter_ns

import pytest

from benchmarks.gate import Checked, goals, slowdown
from benchmarks.shared.gate_backends import RejectingOptions, RejectingSPD, SlowerSPD, slowed
from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.verify import DraftVerdict
from spdbench.types import Step
from spdbench_backends.spd.backend import SPD
from tests import tiny


def test_slowed_work_is_the_same_work_and_takes_its_share_longer() -> None:
    busy_ns, began = 2_000_000, perf_counter_ns()

    def work() -> str:
        until = perf_counter_ns() + busy_ns
        while perf_counter_ns() < until:
            pass
        return "done"

    assert slowed(work, share=2.0) == "done"
    assert perf_counter_ns() - began >= 3 * busy_ns


@pytest.mark.whole_machine
def test_stages_in_processes_of_their_own_take_their_share_longer(tiny_model: Path) -> None:
    target, request = tiny.load(tiny_model), tiny.greedy((1, 2, 3), 12)

    def stages_ns(share: str) -> int:
        options = {"stages": "2", "executor": "process", "slower_by": share}
        context = BackendContext("spd", target, "oracle:1", ("cpu",), 1, 0)
        backend = SlowerSPD(parse_options("spd", SlowerSPD.Options, options), context)
        backend.load()
        try:
            list(backend.generate(request))
            spans = [span for span in backend.spans() if span.kind == "target"]
            return sum(span.end_ns - span.start_ns for span in spans)
        finally:
            backend.close()

    assert stages_ns("4") > 2 * stages_ns("0")


def test_one_accepted_draft_in_so_many_is_rejected_and_the_token_stays() -> None:
    backend = RejectingSPD.__new__(RejectingSPD)
    backend._options = RejectingOptions(every=4, first=2)
    answers = iter([True, False] * 12)
    verify = backend._rejecting(lambda logits, _: DraftVerdict(next(answers), int(logits)))
    found = [verify(position, ()) for position in range(24)]
    accepted = [verdict.accepted for verdict in found[::2]]
    assert [at + 1 for at, kept in enumerate(accepted) if not kept] == [2, 6, 10]
    assert [verdict.token_id for verdict in found] == list(range(24))
    assert not any(verdict.accepted for verdict in found[1::2])


def test_worse_backends_give_spds_ids_and_the_rejecting_one_takes_more_cycles(tiny_model: Path) -> None:
    target, request = tiny.load(tiny_model), tiny.greedy((1, 2, 3), 30)

    def cycles(cls: type[SPD], **options: str) -> list[Step]:
        words = {"stages": "3", "executor": "inline", **options}
        backend = cls(
            parse_options("spd", cls.Options, words), BackendContext("spd", target, "oracle:0.9", ("cpu",), 1, 0)
        )
        backend.load()
        try:
            return list(backend.generate(request))
        finally:
            backend.close()

    plain, slower = cycles(SPD), cycles(SlowerSPD, slower_by="0.1")
    rejecting = cycles(RejectingSPD, every="50", first="3")
    assert slower == plain
    assert ids(rejecting) == ids(plain)
    assert len(rejecting) > len(plain)


def ids(found: list[Step]) -> list[int]:
    return [token for step in found for token in step.token_ids]


@pytest.mark.parametrize(
    ("same", "slower", "met"),
    [
        ({0: 17, 3: 3}, {1: 18, 3: 2}, [True, True, True]),
        ({0: 16, 3: 4}, {1: 18, 3: 2}, [True, False, True]),
        ({0: 19, 1: 1}, {1: 17, 0: 3}, [False, True, False]),
    ],
)
def test_goals_of_twenty_rounds(same: dict[int, int], slower: dict[int, int], met: list[bool]) -> None:
    counts = {"same": Counter(same), "slower": Counter(slower), "rejecting": Counter({1: 20})}
    assert [goal.met for goal in goals(counts, 20)] == [*met, True]


def test_an_outcome_is_told_with_the_change_and_its_interval() -> None:
    assert str(Checked(1, 0.9, (0.85, 0.95), 0.05)) == "REGRESSION 0.900 [0.850, 0.950]"
    assert str(Checked(0)) == "pass"


def test_how_slow_the_slower_code_was_is_told_by_its_own_round() -> None:
    sides = [{"same": {"change": same}, "slower": {"change": slower}} for same, slower in ((1.1, 0.99), (0.9, 0.81))]
    assert slowdown(sides) == pytest.approx(0.9)
    assert math.isnan(slowdown([{"same": {"change": None}, "slower": {"change": 0.9}}]))
