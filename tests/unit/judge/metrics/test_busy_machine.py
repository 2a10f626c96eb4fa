"""`busy_machine`: who took the machine's time while requests were measured, and how much."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.results.machine_load import MachineLoad, SetAside
from spdbench.render.table import render
from tests.builders import make_load, make_result, make_run


def of(*loads: MachineLoad | None, **more: Any) -> LoadedResult:
    return load(make_result(make_run(prompt=f"p{i}", machine=each, **more) for i, each in enumerate(loads)), "v.json")


def reasons(result: LoadedResult) -> list[str]:
    return [flag.reason for flag in result.flags if flag.name == "busy_machine"]


def test_the_flag_says_who_and_how_much() -> None:
    found = of(make_load(0.5, who=["python", "cc1"]), make_load(0.1, who=["cc1"]), make_load(0.0))
    assert reasons(found) == [
        "other processes (cc1, python) took 20% of the time in which requests were measured; 2 of 3 requests were "
        "disturbed"
    ]


def test_the_remedy_names_programs_by_their_number_and_says_of_what_their_share_is() -> None:
    many = [["spdbench (pid 7)", "cc1 (pid 8)"], ["spdbench (pid 7)", "cc1 (pid 9)"]]
    [flag] = [each for each in of(*(make_load(0.5, who=who) for who in many)).flags if each.name == "busy_machine"]
    assert flag.remedy == ("another spdbench (pid 7), cc1 (several) took 50% of all cores: end them, or --remeasure 2")


def test_every_cause_is_named_the_largest_first() -> None:
    parts = {"steal": 0.2, "throttled": 0.1, "hot": 0.03, "memory": 0.04, "gpu": 0.3}
    [reason] = reasons(of(make_load(0.001, **parts)))
    words = ("GPU took 30%", "(steal) took 20%", "(throttling) took 10%", "memory took 4%", "temperature took 3%")
    places = [reason.index(word) for word in words]
    assert places == sorted(places)
    assert "other processes" not in reason


@pytest.mark.parametrize("others", [-0.02, 0.0, 0.04])
def test_a_quiet_machine_has_no_flag(others: float) -> None:
    assert reasons(of(*[make_load(others)] * 20)) == []


def test_ticks_that_are_counted_one_way_and_the_other_cancel() -> None:
    """Short requests, in which a tick is a tenth of the time."""
    short = [MachineLoad(wall_s=0.05, cores=2, others=others) for others in (0.1, -0.1) * 10]
    assert not any(each.disturbed for each in short)
    assert reasons(of(*short)) == []


def test_a_long_load_over_short_requests_is_seen_all_the_same() -> None:
    assert reasons(of(*[MachineLoad(wall_s=0.05, cores=2, others=0.3)] * 10))


def test_a_machine_that_was_not_watched_has_no_flag_and_no_numbers() -> None:
    found = of(None, None)
    assert reasons(found) == []
    assert found.metrics["busy_share"] is found.metrics["busy_others"] is found.metrics["slow_clock"] is None


def test_clocks_that_fall_within_the_run_are_a_cause() -> None:
    found = of(*(make_load(clock_mhz=clock) for clock in (3000, 3000, 2900, 1500)))
    assert "clocks below 80 % of the run's highest took 25%" in reasons(found)[0]
    assert reasons(of(*[make_load(clock_mhz=1500)] * 4)) == []


def test_the_table_says_what_does_not_count() -> None:
    aside = SetAside(ttft_s=0.1, decode_s=1.0, machine=make_load(0.5))
    made = of(make_load(), make_load(), set_aside=[aside])
    text = render(compare([made], made), "github", Console(file=io.StringIO()))
    assert "(--remeasure): 2 measurements do not count" in text
    assert made.metrics["num_set_aside"] == 2
