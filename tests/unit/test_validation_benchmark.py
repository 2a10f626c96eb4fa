"""`benchmarks/validation.py`: run takes its commands, and its page has every table and names the worst error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import validation
from benchmarks.shared.published import Compared, Regime, published, worst_errors
from spdbench.backend import find_backend, parse_options
from spdbench.cli.options import parse_backend_options, parse_drafters, parse_labels
from spdbench.cli.run.settings import parse_words
from spdbench.judge.results.kept import SpanColumns
from spdbench.judge.results.schema import Result, Run
from spdbench.types import Span, SpanKind
from tests.builders import MS, make_load, write_result
from tests.unit.judge.projection.projected import make_profile, pipeline_result, vanilla_result

PAGE = Path(__file__).parents[2] / "docs" / "validation.md"
ROW = re.compile(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+)% \| (.*) \|$", re.MULTILINE)
SECTIONS = (
    "Stages in processes",
    "Stages in processes that mostly sleep",
    "Stages stepped in one process",
    "Published tables",
)


def spans_of(t_ns: Sequence[int], num_stages: int, drafting: int) -> list[Span]:
    """In each cycle of 10 ms all stages work for 8, a draft for 4 next to them, and a verdict for half a
    millisecond behind them."""
    parts: list[tuple[int, SpanKind, float, float]] = [
        (drafting, "draft", 0, 4),
        *((stage, "target", 0.5, 8.5) for stage in range(num_stages)),
        (num_stages + 1, "verify", 8.5, 9),
    ]
    return [
        Span(lane, kind, began + round(start * MS), began + round(stop * MS), 0, True)
        for began in t_ns[:-1]
        for lane, kind, start, stop in parts
    ]


def labelled(result: Result, label: str, drafting: int | None = None) -> Result:
    """With spans of a drafter in lane `drafting`, or of none."""
    backend = result.backend.model_copy(update={"label": label})

    def watched(run: Run) -> Run:
        more: dict[str, object] = {"machine": make_load(0.02)}
        if drafting is not None:
            more["spans"] = SpanColumns.of(spans_of(run.steps.t_ns, backend.lanes, drafting), 0)
        return run.model_copy(update=more)

    return result.model_copy(update={"backend": backend, "runs": [watched(run) for run in result.runs]})


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A folder as `measure` and `measure_sleeping` leave it, with times chosen by hand."""
    results = [labelled(vanilla_result(), "vanilla")]
    for number, (stages, options) in enumerate(validation.IN_PROCESSES.values()):
        drafting = 0 if "drafting" in options else stages
        results.append(labelled(pipeline_result(stages), f"process{number}", drafting))
    results += [labelled(pipeline_result(stages), f"inline{stages}") for stages in validation.STAGES]
    for result in results:
        write_result(result, tmp_path / f"quick__{result.backend.label}__smollm2.json")
    (tmp_path / validation.PROFILE).write_text(make_profile().to_json())
    t_ns = [10 * MS * number for number in range(12)]
    slept = [[[15, 15], 0.11, [[1, 1, 0, 1, 1, 1, 1, 1, 1]], [[spans_of(t_ns, 2, 2), t_ns[0], t_ns[-1]]]]]
    (tmp_path / validation.SLEEPING).write_text(json.dumps(slept))
    return tmp_path


def require_worst_errors(page: str) -> None:
    """The page's first figures are the largest of its tables'."""
    errors = [float(error) for _, _, _, error, _ in ROW.findall(page)]
    own_core = [float(error) for _, _, _, error, remark in ROW.findall(page) if remark == "a core each"]
    slept = page.partition("## Stages in processes that mostly sleep")[2].partition("\n## ")[0]
    own_core += [float(error) for _, _, _, error, _ in ROW.findall(slept)]
    found = re.search(r"\*\*Worst error: ([+-][\d.]+)%\*\*, .+ \(.+\)\.", page)
    assert found is not None
    assert float(found[1]) == max(errors, key=abs)
    found = re.search(r"Where every stage has a core of its own it is ([+-][\d.]+)%", page)
    assert found is not None
    assert float(found[1]) == max(own_core, key=abs)


def test_the_page_has_every_table_and_names_the_worst_error(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validation, "spdbench", lambda *_: pytest.fail("nothing is measured where results are"))
    monkeypatch.setattr("sys.argv", ["validation", "--results", str(measured)])
    validation.main()
    page = capsys.readouterr().out
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == list(SECTIONS)
    require_worst_errors(page)
    rows = {name: (float(was), float(is_), float(error)) for name, was, is_, error, _ in ROW.findall(page)}
    assert len(ROW.findall(page)) == 2 * len(validation.IN_PROCESSES) + 1 + len(validation.STAGES) + 10 + 14
    for was, projected, error in rows.values():
        assert error == pytest.approx(100 * (projected / was - 1), abs=1.5)


def test_the_page_in_the_documentation_names_its_worst_error() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == list(SECTIONS)
    require_worst_errors(page)


def test_the_published_tables_in_the_documentation_are_those_that_are_made() -> None:
    page, number = PAGE.read_text(encoding="utf-8"), 0
    for part in published():
        for line in part.table() if isinstance(part, Regime) else [part]:
            assert line in page
            number += 1
    assert number > 40


def test_the_worst_error_is_the_one_that_is_farthest_from_none() -> None:
    regimes = [
        Regime("a", "tok/s", [Compared("slow", 100, 80), Compared("fair", 100, 110, own_core=True)]),
        Regime("b", "tok/s", [Compared("fast", 100, 115)]),
    ]
    lines = "\n".join(worst_errors(regimes))
    assert "**Worst error: -20.0%**, slow (a)." in lines
    assert "it is +10.0%, fair; the goal is 10 %" in lines
    assert "| a | 2 | -20.0% | slow |" in lines
    assert "| b | 1 | +15.0% | fast |" in lines


def test_what_is_measured_are_commands_that_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[tuple[str, ...]]()
    monkeypatch.setattr(validation, "spdbench", lambda *words: said.append(words))
    validation.measure(tmp_path / "new")
    profile, run = said
    assert profile[:2] == ("profile", "-o")
    options = parse_words(run[1:])
    labels = parse_labels(options.backends)
    assert {"vanilla", "process4", "inline10"} <= set(labels)
    given = parse_backend_options(options.options, list(labels))
    parse_drafters(options.drafters, list(labels))
    for label, name in labels.items():
        parse_options(label, find_backend(name).Options, given[label])
    assert options.trace
