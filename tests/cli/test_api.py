"""`import spdbench`: the Python interface, from a user's script."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import spdbench
from spdbench.api import RunSettings
from spdbench.cli.run.command import RunOptions
from spdbench.cli.run.session import Session
from tests.cli.run_helpers import spdbench as command
from tests.cli.run_helpers import write_suite

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"
BASELINES = ROOT / "results" / "baselines"


Measure = Callable[..., list[spdbench.Result]]


@pytest.fixture
def measure(own_cache: Path, tiny_model: Path, tmp_path: Path) -> Measure:
    """`spdbench.run` on the tiny model, with results in a folder of the test's own."""
    assert own_cache
    settings = {"model": tiny_model, "dtype": "float32", "threads": 1, "results": tmp_path / "results"}
    return partial(spdbench.run, **settings)  # type: ignore[arg-type]


def test_importing_is_light_and_the_functions_bring_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'click'} & sys.modules.keys()"
    code = (
        f"import sys, spdbench; assert not {heavy}, {heavy}\n"
        f"spdbench.load({str(BASELINES)!r}); spdbench.run; assert 'torch' not in sys.modules\n"
        "assert set(spdbench.__all__) <= set(dir(spdbench))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        spdbench.rum  # noqa: B018


def test_a_run_returns_what_it_wrote(measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"ngram.max_ngram": 4}
    suite = write_suite(tmp_path)
    results = measure(suite, backends=["vanilla", "ngram"], options=options, limit=2, quiet=True)
    assert capsys.readouterr() == ("", "")
    assert [result.label for result in results] == ["vanilla", "ngram"]
    assert results[1].head.backend.options["max_ngram"] == 4
    assert {result.head.suite.num_prompts for result in results} == {2}
    for result, again in zip(results, spdbench.load([each.file for each in results]), strict=True):
        assert result.label in repr(result)
        assert dict(result.metrics) == dict(again.metrics)
        assert result.records() == again.records()
        assert result.metrics["num_failed"] == 0
        assert [*result.flags] == [*again.flags]


def test_a_table_has_a_row_for_each_request_and_a_comparison_one_for_each_label() -> None:
    results = spdbench.load(BASELINES)
    comparison = spdbench.compare(results)
    frame, by_label = results[0].to_pandas(), comparison.to_pandas()
    runs = json.loads(Path(results[0].file).read_text("utf-8"))["runs"]
    assert [*frame["prompt_id"]] == [run["prompt_id"] for run in runs]
    assert [*frame["num_new_tokens"]] == [run["num_new_tokens"] for run in runs]
    assert sorted(by_label["label"]) == sorted(result.label for result in results)
    assert len(by_label.columns) == len(comparison.records()[0])


def test_a_comparison_is_that_of_the_command() -> None:
    paths = [BASELINES / f"quick__{label}__smollm2.json" for label in ("vanilla", "eagle")]
    mixed = spdbench.compare([spdbench.load(paths[0])[0], paths[1]], baseline="eagle", by="category")
    said = command("compare", *paths, "--baseline", "eagle", "--by", "category", "--format", "csv")
    assert mixed.render("csv") == said.out
    assert str(mixed).splitlines()[0].startswith("eagle: ")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"limt": 2}, "spdbench.run: limt: unknown key; did you mean 'limit'?"),
        ({"limit": 0}, "Invalid value for '--limit'"),
        ({"options": ["spd.stages=3"]}, "options: has to be a mapping"),
        ({"options": {"ngram.max_ngrm": 3}}, "unknown option; did you mean 'max_ngram'?"),
        ({"backends": []}, "backends: [] has to be a text or a list of texts"),
        ({"drafters": {"spd": "random"}}, "drafters: {'spd': 'random'} has to be a text or a list of texts"),
        ({"backends": "ngrm"}, "did you mean 'ngram'?"),
        ({"resume": "yes"}, "resume: 'yes' has to be true or false"),
        ({"suite": "--help"}, "suite: '--help' is the name of no suite"),
        ({"suite": "quik"}, "did you mean 'quick'?"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_mistake_is_spdbenchs_own_exception(mistake: dict[str, object], words: str, measure: Measure) -> None:
    with pytest.raises(spdbench.InputError, match=re.escape(words)) as caught:
        measure(**{"suite": "quick", "backends": "ngram", **mistake})
    assert isinstance(caught.value, spdbench.SpdbenchError)
    with pytest.raises(spdbench.InputError, match="absent"):
        spdbench.load("absent.json")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda found: found.render("word"), "form: 'word' is not known. Known: csv, github, json, latex, table."),
        (lambda found: found.render("tabel"), "did you mean 'table'?"),
        (lambda found: found.render(["csv"]), "form: ['csv'] is not known. Known: table, "),
        (lambda _: spdbench.compare(BASELINES, by="foo"), "compare: by: 'foo' is not known. Known: category, context."),  # type: ignore[arg-type]
        (lambda _: spdbench.compare(BASELINES, by=3), "compare: by: 3 is not known. Known: category, context."),  # type: ignore[arg-type]
        (
            lambda _: spdbench.compare(BASELINES, dialect="vlm"),
            "dialect: 'vlm' is not known; did you mean 'vllm'?",
        ),
        (lambda _: spdbench.compare(BASELINES, goodput={"ttft": 1}), "compare: goodput: {'ttft': 1} is no text; write"),  # type: ignore[arg-type]
        (lambda _: spdbench.compare(BASELINES, baseline=3), "compare: baseline: 3 is neither a label nor the path"),  # type: ignore[arg-type]
        (lambda _: spdbench.compare(None), "compare: results: None is not a Result, a path"),  # type: ignore[arg-type]
        (lambda found: spdbench.compare([found]), "is in it; expected a Result, a path"),
        (lambda _: spdbench.load(3), "load: paths: 3 is not a path or a list of paths"),  # type: ignore[arg-type]
        (lambda _: spdbench.load(b"results"), "load: paths: b'results' is not a path"),  # type: ignore[arg-type]
        (lambda _: spdbench.load([None]), "load: paths: None is in it; expected a path"),  # type: ignore[list-item]
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(call: Callable[[Any], object], words: str) -> None:
    with pytest.raises(spdbench.InputError, match=re.escape(words)):
        call(spdbench.compare(BASELINES))


def test_settings_are_the_options_of_the_command() -> None:
    assert RunSettings.__annotations__.keys() == RunOptions.__dataclass_fields__.keys() - {"suite"}


def test_ctrl_c_works_as_before_after_a_run_that_it_ended(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a session does while it writes what was finished
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Session, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(write_suite(tmp_path), backends="vanilla")
    assert signal.getsignal(signal.SIGINT) is before


def test_without_pandas_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(spdbench.SpdbenchError, match=r"pandas is not installed; .*pip install pandas"):
        spdbench.load(BASELINES)[0].to_pandas()


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.embedded
def test_the_pages_examples_run_as_they_stand(tmp_path: Path) -> None:
    found = examples()
    assert len(found) == 2
    for number, code in enumerate(found):
        (tmp_path / f"example_{number}.py").write_text(code, "utf-8")
        done = subprocess.run(
            [sys.executable, f"example_{number}.py"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "ngram" in done.stdout


def test_a_type_checker_knows_the_interface(tmp_path: Path) -> None:
    """With the project's settings and cache, so that torch is not checked once more."""
    pytest.importorskip("mypy")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("\n".join(examples()), "utf-8")
    bad.write_text("import spdbench\nspdbench.run('quick', limt=2)\nspdbench.load(3)[0].label + 1\n", "utf-8")
    mypy = [sys.executable, "-m", "mypy", "--output", "json", "--config-file", "pyproject.toml", str(good), str(bad)]
    done = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(error["line"], error["code"]) for error in errors} == {(2, "call-arg"), (3, "arg-type"), (3, "operator")}
    assert {Path(error["file"]).name for error in errors} == {"bad.py"}, errors
