"""A backend from a third-party package: installed next to spdbench, found, listed and run like a built-in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"

SUITE = """
name: greetings
version: 1
prompts:
  source:
    - inline:
        - {id: a, category: short, turns: ["Hello"]}
        - {id: b, category: longer, turns: ["What is the time?", "And now?"]}
decoding: {max_new_tokens: 12}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the third-party package is installed."""
    return install("outsider", tmp_path_factory.mktemp("outsider"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a package is installed that cannot be imported."""
    return install("broken_outsider", tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package of docs/backend.md is installed, as that page has it."""
    work = tmp_path_factory.mktemp("documented")
    [project] = blocks("backend.md", "toml")
    (work / "source").mkdir()
    (work / "source" / "pyproject.toml").write_text(project, encoding="utf-8")
    (work / "source" / "mine.py").write_text("\n\n".join(blocks("backend.md", "python")), encoding="utf-8")
    return built(work)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page of docs/ in one language."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [block.partition("```")[0] for block in text.split(f"```{language}\n")[1:]]


def install(package: str, work: Path) -> Path:
    shutil.copytree(FIXTURES / package, work / "source")  # building writes into the source folder
    return built(work)


def built(work: Path) -> Path:
    """Installs the package in `work`/source, in a folder of its own."""
    source = work / "source"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(work / "site"), str(source)], check=True, capture_output=True)
    return work / "site"


def spdbench(sites: Sequence[Path], folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sites)), "SPDBENCH_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "spdbench", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_outsiders_backend_is_listed_with_its_package_and_options(site: Path, tmp_path: Path) -> None:
    done = spdbench([site], tmp_path, "backends", "outsider", "--json")
    assert done.returncode == 0, done.stderr
    [listing] = json.loads(done.stdout)
    assert (listing["name"], listing["kind"]) == ("outsider", "autoregressive")
    assert listing["package"] == "spdbench-outsider 1.2.3"
    assert listing["description"] == "One token a forward, with a loop of its own; the prompt is read in pieces."
    assert [(option["key"], option["type"], option["default"]) for option in listing["options"]] == [
        ("piece", "int", 16),
        ("mood", "calm|hasty", "calm"),
    ]


def test_backend_that_cannot_be_imported_is_listed_with_the_reason_and_spoils_nothing(
    site: Path, broken: Path, tmp_path: Path
) -> None:
    done = spdbench([site, broken], tmp_path, "backends")
    assert done.returncode == 0, done.stderr
    assert "broken  cannot be used  (from spdbench-broken-outsider 0.3)" in done.stdout
    assert "No module named 'outsider_that_is_not_there'" in " ".join(done.stdout.split())
    for name in ("outsider", "vanilla", "spd"):
        assert f"\n{name}  " in done.stdout


def test_outsiders_backend_runs_against_vanilla_and_gives_the_same_tokens(
    site: Path, broken: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "greetings.yaml").write_text(SUITE, encoding="utf-8")
    words = ["greetings.yaml", "-m", str(tiny_model), "--dtype", "float32", "--threads", "1"]
    done = spdbench(
        [site, broken], tmp_path, "run", *words, "-b", "vanilla", "-b", "outsider", "-o", "outsider.piece=3"
    )
    assert done.returncode == 0, done.stderr
    vanilla, outsider = (
        json.loads((tmp_path / "results" / f"greetings__{label}__{tiny_model.name}.json").read_text(encoding="utf-8"))
        for label in ("vanilla", "outsider")
    )
    assert outsider["backend"]["options"] == {"piece": 3, "mood": "calm"}
    assert len(outsider["runs"]) == 3
    assert [run["output_ids"] for run in outsider["runs"]] == [run["output_ids"] for run in vanilla["runs"]]
    assert outsider["divergence"]["identical"] == 3


def test_outsiders_wrong_option_is_the_users_mistake(site: Path, tmp_path: Path, tiny_model: Path) -> None:
    words = ["quick", "-m", str(tiny_model), "-b", "outsider", "-o", "outsider.peace=3"]
    done = spdbench([site], tmp_path, "run", *words)
    assert done.returncode == 2
    assert "-o outsider.peace: unknown option; did you mean 'piece'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_backends_from_elsewhere_are_held_to_the_same_tests_as_those_that_ship(site: Path, documented: Path) -> None:
    pytest_ = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (site, documented))),
        "OMP_NUM_THREADS": "1",
    }  # a tiny model gains nothing from a second thread
    done = subprocess.run(
        [*pytest_, "-k", "outsider or guessing"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_the_documented_backends_work_as_they_stand(documented: Path, tmp_path: Path, tiny_model: Path) -> None:
    [suite] = [each for each in blocks("suites.md", "yaml") if each.startswith("name: mine\n")]
    (tmp_path / "mine.yaml").write_text(suite, "utf-8")
    words = ["mine.yaml", "-m", str(tiny_model), "--dtype", "float32", "--threads", "1", "--max-new-tokens", "12"]
    done = spdbench(
        [documented],
        tmp_path,
        "run",
        *words,
        "-b",
        "vanilla",
        "-b",
        "mine",
        "-b",
        "guessing",
        "-o",
        "guessing.num_drafts=4",
    )
    assert done.returncode == 0, done.stderr
    judged = {}
    for label in ("mine", "guessing"):
        result = json.loads((tmp_path / "results" / f"mine__{label}__{tiny_model.name}.json").read_text("utf-8"))
        assert result["divergence"]["identical"] == len(result["runs"]) == 3
        judged[label] = sum(sum(run["steps"]["judged"]) for run in result["runs"])
    assert judged["guessing"] > judged["mine"] == 0
