"""The built wheel, used from an empty folder with nothing of the source tree on the path."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from spdbench.cli.reading.results import FOLDER
from tests.packages import closure, link_packages

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
SOURCES = (
    "spdbench",
    "backends",
    "suites",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
    "THIRD_PARTY.md",
    "MANIFEST.in",
)


def tracked() -> set[str]:
    """Files of the repository; none where the tests run from an sdist."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return set()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the repository, since building writes into its folder."""
    work = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, work / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, work / "source" / name)
    for place in (work / "source" / name for name in tracked()):
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / place.relative_to(work / "source"), place)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work)]
    subprocess.run([*build, str(work / "source")], check=True, capture_output=True)
    [built] = work.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def folder(wheel: Path) -> Path:
    """An empty folder; next to it an environment with the wheel, which sees what the wheel and the tutorial ask for."""
    where = wheel.parent / "venv"
    venv.create(where, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(where / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    [site] = where.glob("lib/python*/site-packages")
    # The checkout is not on the path, and of the developers' packages only those that the wheel asks for.
    extras = re.findall(r"\bextra `(\w+)`", TUTORIAL.read_text("utf-8"))
    asked = closure([*_dependencies(wheel), *(f"spdbench[{extra}]" for extra in extras)])
    link_packages(asked.keys() - {"spdbench"}, wheel.parent / "dependencies")
    (site / "dependencies.pth").write_text(f"{wheel.parent / 'dependencies'}\n", encoding="utf-8")
    empty = wheel.parent / "empty"
    empty.mkdir()
    return empty


def _dependencies(wheel: Path) -> list[str]:
    """The requirements in the wheel's metadata, those of extras with their markers, which keep them out."""
    with zipfile.ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(file.read(name)).get_all("Requires-Dist") or []


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(folder: Path, program: str, *args: str) -> str:
    env = environment()
    env["SPDBENCH_CACHE"] = str(folder.parent / "cache")
    command = [str(folder.parent / "venv" / "bin" / program), *args]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_suites_schema_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    suites = {f"spdbench_suites/{path.name}" for path in (ROOT / "suites").glob("*.yaml")}
    assert suites
    assert suites <= set(names)
    assert {"spdbench/judge/result.schema.json", "spdbench/py.typed", "spdbench_backends/py.typed"} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert any(name.endswith("/licenses/NOTICE") for name in names)
    assert any(name.endswith("/licenses/THIRD_PARTY.md") for name in names)


def test_wheel_holds_every_module_of_the_checkout(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = [path.relative_to(ROOT) for path in (ROOT / "spdbench").rglob("*.py")]
    modules += [path.relative_to(ROOT / "backends") for path in (ROOT / "backends").rglob("*.py")]
    assert {path.as_posix() for path in modules} <= names


def test_sdist_holds_every_file_of_the_repository(wheel: Path) -> None:
    """So that `make test` and `make docs` work in it. Building a wheel lists what an sdist would hold."""
    if not (files := tracked()):
        pytest.skip("this is no repository")
    listed = (wheel.parent / "source" / "spdbench.egg-info" / "SOURCES.txt").read_text("utf-8").splitlines()
    assert files - set(listed) == set()


def test_wheel_brings_no_tests_and_no_generic_names_into_site_packages(wheel: Path) -> None:
    top = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "spdbench",
        "spdbench_backends",
        "spdbench_suites",
    }


def test_installed_wheel_answers_from_an_empty_folder(folder: Path) -> None:
    assert "compare" in run(folder, "spdbench", "--help")
    assert "quick  (" in run(folder, "spdbench", "suites")
    backends = run(folder, "spdbench", "backends")
    assert "vanilla  autoregressive" in backends
    assert "-o spd.stages=" in backends


def test_installed_wheel_sees_no_package_that_it_does_not_ask_for(folder: Path) -> None:
    hidden = ("pytest", "hypothesis", "pandas", "pyarrow", "lm_eval", "ray")
    script = f"import importlib.util; print([name for name in {hidden} if importlib.util.find_spec(name)])"
    assert run(folder, "python", "-c", script) == "[]\n"


def test_installed_wheel_is_what_is_imported_and_has_no_git_state(folder: Path) -> None:
    script = (
        "import spdbench, spdbench_backends, spdbench_suites\n"
        "from spdbench.judge.results.schema import SCHEMA_FILE\n"
        "from spdbench.measure.environment import git_state\n"
        "for module in (spdbench, spdbench_backends, spdbench_suites): print(module.__file__)\n"
        "print(SCHEMA_FILE if SCHEMA_FILE.exists() else 'no schema')\n"
        "print(git_state())\n"
    )
    *files, git = run(folder, "python", "-c", script).splitlines()
    inside = str(folder.parent / "venv")
    assert all(file.startswith(inside) for file in files), files
    assert git == "None"


SUITE = """
name: own
version: 1
prompts: {source: [{inline: [{id: a, turns: ["one two"]}, {id: b, turns: ["three"]}]}]}
decoding: {max_new_tokens: 8}
"""


def test_installed_wheel_measures_vanilla_and_spd_with_a_suite_of_ones_own(folder: Path, tiny_model: Path) -> None:
    (folder / "own.yaml").write_text(SUITE, encoding="utf-8")
    options = ["-o", "spd.stages=3", "--drafter", "oracle:0.8", "--dtype", "float32", "--threads", "1"]
    table = run(folder, "spdbench", "run", "own.yaml", "-m", str(tiny_model), *options)
    assert "synthetic_drafter (spd)" in table or "synthetic_drafter (all)" in table, table
    outputs = []
    for label in ("vanilla", "spd"):
        result = json.loads((folder / "results" / f"own__{label}__{tiny_model.name}.json").read_text("utf-8"))
        assert result["spdbench"]["git"] is None
        outputs.append({measured["prompt_id"]: measured["output_ids"] for measured in result["runs"]})
    assert outputs[0].keys() == {"a", "b"}
    assert outputs[0] == outputs[1]


@pytest.mark.timeout(900)
def test_the_tutorials_commands_work_in_order(folder: Path) -> None:
    """In an empty folder, from the wheel, on the embedded model that `make test` fetched."""
    page = TUTORIAL.read_text("utf-8")
    place = folder / "tutorial"
    place.mkdir()
    [suite] = re.findall(r"^```yaml\n(name: mine\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    (place / "mine.yaml").write_text(suite, "utf-8")
    env = environment()
    env["PATH"] = f"{folder.parent / 'venv' / 'bin'}:{env['PATH']}"
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    for line in (line for block in blocks for line in block.splitlines()):
        done = subprocess.run(["sh", "-c", line], cwd=place, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert done.stdout or done.stderr, line
    assert (place / "report.html").stat().st_size > 100_000
    assert (place / "my-drafter" / "model.safetensors").exists()


def test_an_image_is_built_from_what_a_wheel_needs_and_keeps_results_and_cache_in_volumes() -> None:
    ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()]
    assert not {*SOURCES, "constraints.txt"} & {*ignored}
    assert {".git", ".venv", "results", "build", "dist"} <= {*ignored}
    text = (ROOT / "Containerfile").read_text("utf-8")
    [workdir], [made] = re.findall("^WORKDIR (.*)$", text, re.MULTILINE), re.findall(r"mkdir -p (/[\w /]*?) &&", text)
    assert f"{workdir}/{FOLDER}" in made.split()
    assert {path for _, path in re.findall(r"-v (\S+):(/\w[\w/]*)", text)} == {*made.split()}
    assert re.search("^ENV SPDBENCH_CACHE=(/cache)", text, re.MULTILINE)
