"""A backend from somebody else's package: installed beside spdbench, found, listed and run like a built-in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OUTSIDER = Path(__file__).parents[1] / "fixtures" / "outsider"

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
    """A folder with the outsider's package installed in it."""
    work = tmp_path_factory.mktemp("outsider")
    source = shutil.copytree(OUTSIDER, work / "source")  # building leaves traces in the source folder
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(work / "site"), str(source)], check=True, capture_output=True)
    return work / "site"


def spdbench(site: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), "SPDBENCH_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "spdbench", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_outsiders_backend_is_listed_with_its_package_and_options(site: Path, tmp_path: Path) -> None:
    done = spdbench(site, tmp_path, "backends", "outsider", "--json")
    assert done.returncode == 0, done.stderr
    [listing] = json.loads(done.stdout)
    assert (listing["name"], listing["kind"]) == ("outsider", "autoregressive")
    assert listing["package"] == "spdbench-outsider 1.2.3"
    assert listing["description"] == "Greedy decoding that reads the prompt in pieces."
    assert [(option["key"], option["type"], option["default"]) for option in listing["options"]] == [
        ("piece", "int", 16),
        ("mood", "calm|hasty", "calm"),
    ]


def test_backend_that_cannot_be_imported_is_listed_with_the_reason_and_spoils_nothing(
    site: Path, tmp_path: Path
) -> None:
    done = spdbench(site, tmp_path, "backends")
    assert done.returncode == 0, done.stderr
    assert "broken  cannot be used  (from spdbench-outsider 1.2.3)" in done.stdout
    assert "No module named 'outsider_that_is_not_there'" in " ".join(done.stdout.split())
    for name in ("outsider", "vanilla", "spd"):
        assert f"\n{name}  " in done.stdout


def test_outsiders_backend_runs_against_vanilla_and_gives_the_same_tokens(
    site: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "greetings.yaml").write_text(SUITE, encoding="utf-8")
    words = ["greetings.yaml", "-m", str(tiny_model), "--dtype", "float32", "-b", "vanilla", "-b", "outsider"]
    done = spdbench(site, tmp_path, "run", *words, "-o", "outsider.piece=3")
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
    done = spdbench(site, tmp_path, "run", "quick", "-m", str(tiny_model), "-b", "outsider", "-o", "outsider.peace=3")
    assert done.returncode == 2
    assert "-o outsider.peace: unknown option; did you mean 'piece'?" in done.stderr
    assert "Traceback" not in done.stderr
