"""The picture of an answer in the terminal: nothing is wider than it, and no two cells touch."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from spdbench.render.answer import _percent, show_answer
from tests.unit.render.report.reports import results


@pytest.mark.parametrize("width", [40, 60, 80])
def test_verdicts_of_cycles_do_not_touch(width: int) -> None:
    result = results(1, detailed=True)["quick__spd.json"]
    shown = show_answer(result.runs[0], result.backend, None, Console(width=width, no_color=True))
    [verdicts] = [line for line in shown.splitlines() if line.startswith("verdict")]
    assert {"accepted", "REJECTED"} <= set(verdicts.split()) <= {"verdict", "accepted", "REJECTED", "fills"}
    assert max(map(len, shown.splitlines())) <= width


def test_pictures_say_which_cycles_they_show_and_idle_is_all_only_where_nothing_was_done() -> None:
    found = results(1, detailed=True)
    for name, steps in (("spd", "cycles"), ("eagle", "steps")):
        result = found[f"quick__{name}.json"]
        shown = show_answer(result.runs[0], result.backend, None, Console(width=80, no_color=True))
        [title] = [line for line in shown.splitlines() if line.startswith("What the lanes did")]
        assert re.fullmatch(rf"What the lanes did around a rejection: {steps} \d+ to \d+, [\d.]+ ms", title)
        assert ("Tokens in the stages around a rejection" in shown) is (name == "spd")
    assert [_percent(share) for share in (0.5, 0.996, 1)] == ["50%", ">99%", "100%"]
