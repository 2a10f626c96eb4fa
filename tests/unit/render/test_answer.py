"""The picture of an answer in the terminal: nothing is wider than it, and no two cells touch."""

from __future__ import annotations

import pytest
from rich.console import Console

from spdbench.render.answer import show_answer
from tests.unit.render.report.reports import results


@pytest.mark.parametrize("width", [40, 60, 80])
def test_verdicts_of_cycles_do_not_touch(width: int) -> None:
    result = results(1, detailed=True)["quick__spd.json"]
    shown = show_answer(result.runs[0], result.backend, None, Console(width=width, no_color=True))
    [verdicts] = [line for line in shown.splitlines() if line.startswith("verdict")]
    assert {"accepted", "REJECTED"} <= set(verdicts.split()) <= {"verdict", "accepted", "REJECTED", "fills"}
    assert max(map(len, shown.splitlines())) <= width
