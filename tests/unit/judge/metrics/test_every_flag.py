"""docs/metrics.md's list of flags, each made to appear in a comparison: with a reason, a remedy, and its weight."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from spdbench.judge.comparison.compare import Row, compare
from spdbench.judge.loaded import LoadedResult, load
from spdbench.judge.metrics.flags import DISQUALIFYING, MADE_FROM_ONE_RESULT
from spdbench.judge.results.lanes import BubbleParts
from spdbench.judge.results.schema import Divergence, Run
from spdbench.render.table import render
from tests.builders import (
    MS,
    ORACLE,
    RANDOM,
    TRAINED,
    chunk_steps,
    make_backend,
    make_load,
    make_result,
    make_run,
    vanilla_steps,
)

NUM = 10


def runs(num: int = NUM, *, step_ms: Callable[[int], float] = lambda _: 20, **more: Any) -> list[Run]:
    """Three times as fast as the baseline, in chunks of four."""
    return [
        make_run(chunk_steps([1, *[4] * 9], step_ns=round(step_ms(i) * MS)), prompt=f"p{i}", **more) for i in range(num)
    ]


def mine(made: list[Run] | None = None, **more: Any) -> LoadedResult:
    own = {name: more.pop(name) for name in ("lossy", "other_model") if name in more}
    backend = make_backend("draft_verify", **own)
    result = make_result(runs() if made is None else made, backend, **({"drafter": TRAINED} | more))
    return load(result, "mine.json")


def vanilla(step_ms: float = 15) -> LoadedResult:
    made = [make_run(vanilla_steps(37, step_ns=round(step_ms * MS)), prompt=f"p{i}") for i in range(NUM)]
    return load(make_result(made), "vanilla.json")


def bubble(**shares: float) -> BubbleParts:
    return BubbleParts(**(dict.fromkeys(BubbleParts.model_fields, 0.0) | shares))


MAKERS: dict[str, Callable[[], LoadedResult]] = {
    "lossy": lambda: mine(lossy=True),
    "diverged": lambda: mine(divergence=Divergence(identical=9, ties=0, near_ties=0, real=1, unclassified=0)),
    "synthetic_drafter": lambda: mine(drafter=ORACLE),
    "untrained_drafter": lambda: mine(drafter=RANDOM),
    "hardware_mismatch": lambda: mine(machine="machine-b"),
    "prompt_mismatch": lambda: mine([*runs(9), make_run(chunk_steps([1, 4]), prompt="p9", prompt_sha256="0" * 64)]),
    "template_mismatch": lambda: mine(template="u" * 64),
    "no_template": lambda: mine(template=None),
    "unattributed": lambda: mine(runs(bubble=bubble(useful=0.8, unattributed=0.2))),
    "degenerate": lambda: mine(runs(output_ids=[5] * 37)),
    "contradicted": lambda: mine(runs(contradiction="8 listed, a usage of 20")),
    "truncated": lambda: mine(runs(finish="length")),
    "other_model": lambda: mine(other_model="llama in its server"),
    "few_prompts": lambda: mine(runs(7)),
    "noisy": lambda: mine(runs(step_ms=lambda i: (8, 14, 21)[i % 3])),
    "busy_machine": lambda: mine(runs(machine=make_load(others=0.4, who=["python"]))),
    "drift": lambda: mine(runs(step_ms=lambda i: 20 + i)),
    "outliers": lambda: mine(runs(step_ms=lambda i: 40 if i == 4 else 20)),
}


def row_of(entry: LoadedResult) -> Row:
    base = vanilla()
    [table] = compare([base, entry], base)
    return next(row for row in table.rows if not row.is_baseline)


def test_a_row_without_flags_is_best() -> None:
    row = row_of(mine())
    assert row.flags == ()
    assert row.best


def test_a_row_of_few_prompts_is_never_best() -> None:
    row = row_of(MAKERS["few_prompts"]())
    assert row.difference_shown
    assert not row.disqualified
    assert not row.best


@pytest.mark.parametrize("name", MAKERS)
def test_the_flag_is_on_its_row_with_reason_and_remedy(name: str) -> None:
    [flag] = [flag for flag in row_of(MAKERS[name]()).flags if flag.name == name]
    assert flag.reason
    assert flag.remedy
    assert "\n" not in flag.reason + flag.remedy
    assert not flag.remedy.endswith(".")


@pytest.mark.parametrize("name", MAKERS)
def test_the_flag_stands_below_the_table_with_its_remedy_on_one_line(name: str) -> None:
    base = vanilla()
    tables = compare([base, MAKERS[name]()], base)
    text = render(tables, "table", Console(file=io.StringIO(), width=80))
    [line] = [line for line in text.splitlines() if line.startswith(f"- {name} (")]
    [remedy] = [flag.remedy for flag in row_of(MAKERS[name]()).flags if flag.name == name]
    assert line.endswith(f": {remedy[:1].lower()}{remedy[1:]}.")
    weight = "disqualifies" if name in DISQUALIFYING else "warning"
    assert f"- {name} ({weight}): " in render(tables, "github", Console(file=io.StringIO()), details=True)


@pytest.mark.parametrize("name", sorted(DISQUALIFYING))
def test_a_row_that_is_disqualified_is_never_best_in_any_category(name: str) -> None:
    base = vanilla()
    [table] = compare([base, MAKERS[name]()], base, by_category=True)
    found = [row for row in table.rows if not row.is_baseline]
    assert len(found) == 2
    assert all(row.disqualified and not row.best for row in found)


def test_the_baselines_own_flag_is_on_its_row() -> None:
    base = vanilla(40)
    [table] = compare([base, mine()], base)
    assert [flag.name for flag in table.rows[0].flags] == ["slow_baseline"]
    assert [flag.name for flag in table.rows[1].flags] == []


def test_every_flag_of_the_list_is_made_here() -> None:
    assert MAKERS.keys() | {"slow_baseline"} == DISQUALIFYING | MADE_FROM_ONE_RESULT
