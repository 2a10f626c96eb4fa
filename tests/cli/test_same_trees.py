"""Two runs of one command choose the same trees, however busy the machine is: costs are measured once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from spdbench.decoding.tree_choice import MAX_AUTO_NODES, ROW_COUNTS
from tests.cli.run_helpers import spdbench, write_suite

CLOCKS = (
    "spdbench.models.torch_utils.perf_counter",
    "spdbench.decoding.tree_choice.perf_counter",
    "spdbench_backends.drafting.perf_counter",
)
LABELS = ("eagle", "medusa")


def even() -> Callable[[], float]:
    """Everything takes the same time: further rows cost nothing."""
    ticks = count()
    return lambda: float(next(ticks))


def loaded() -> Callable[[], float]:
    """Of each round of forwards, in which the numbers of rows take turns, the later ones take many times longer."""
    calls, now = count(), [0.0]
    in_a_round = sum(rows <= MAX_AUTO_NODES for rows in ROW_COUNTS)

    def clock() -> float:
        number = next(calls) // 2 % in_a_round
        now[0] += 1.0 + 10.0 * number
        return now[0]

    return clock


@pytest.mark.timeout(600)
def test_a_second_run_on_a_loaded_machine_drafts_as_the_first_one_did(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = write_suite(tmp_path, num_prompts=2, decoding={"max_new_tokens": 12})

    def run(name: str, clock: Callable[[], float]) -> list[dict[str, Any]]:
        for place in CLOCKS:
            monkeypatch.setattr(place, clock)
        words = [word for label in LABELS for word in ("-b", label, "--drafter", f"{label}=random")]
        common = ("-m", tiny_model, "--dtype", "float32", "--threads", "1", "--results", tmp_path / name)
        said = spdbench("run", suite, "-b", "vanilla", *words, *common)
        assert said.code == 0, said.err
        return [json.loads(next((tmp_path / name).glob(f"*__{label}__*.json")).read_text()) for label in LABELS]

    def trees(results: list[dict[str, Any]]) -> list[str]:
        return [each["backend"]["chosen"]["tree"] for each in results]

    def drafts(results: list[dict[str, Any]]) -> list[Any]:
        names = ("drafted", "judged", "accepted", "forwards")
        return [[run["steps"][name] for name in names] for each in results for run in each["runs"]]

    first, second = run("first", even()), run("second", loaded())
    assert trees(second) == trees(first)
    assert drafts(second) == drafts(first)

    monkeypatch.setenv("SPDBENCH_PROFILES", os.environ["SPDBENCH_PROFILES"] + "-other")
    assert trees(run("measured anew", loaded())) != trees(first)
