"""`spdbench sweep`: a file becomes points, each an ordinary run that is done once, wherever it runs."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from spdbench.cli.sweep.best import lower_is_better
from spdbench.cli.sweep.points import read_sweep
from spdbench.judge.results.schema import read_result
from tests.cli.run_helpers import Said, spdbench, write_suite

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "spd-stages.yaml"
SECONDS = 800.0  # a limit against hanging, not an expectation


@pytest.fixture
def sweep(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A sweep of four points on the tiny model."""
    suite = write_suite(tmp_path, num_prompts=2, decoding={"max_new_tokens": 8})
    return {
        "name": "tiny",
        "fixed": {
            "suite": str(suite),
            "model": str(tiny_model),
            "dtype": "float32",
            "threads": 1,
            "backends": ["vanilla", "spd"],
            "options": {"spd.executor": "inline"},
        },
        "grid": {"options.spd.stages": [2, 3], "drafters": ["oracle:0.5", "oracle:0.9"]},
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run(folder: Path, content: object, *words: str | Path) -> Said:
    return spdbench("sweep", write(folder, content), "--results", folder / "out", *words)


def results(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("mini__*.json"))


def test_example_is_twelve_points_of_the_grid() -> None:
    _, points = read_sweep(EXAMPLE)
    assert len(points) == 12
    assert {tuple(point.settings.values()) for point in points} == {
        (stages, f"oracle:{rate}") for stages in (2, 3, 5, 6) for rate in (0.6, 0.8, 0.95)
    }


def test_dry_run_prints_commands_that_run_would_take(sweep: dict[str, Any], tmp_path: Path) -> None:
    said = run(tmp_path, sweep, "--dry-run")
    lines = said.out.splitlines()
    assert (said.code, len(lines), said.err) == (0, 4, "")
    assert not (tmp_path / "out").exists()
    assert "-o spd.executor=inline -o spd.stages=2" in lines[0]
    assert "--drafter oracle:0.9" in lines[1]
    assert all(line.startswith("spdbench run ") and line.endswith("--resume") for line in lines)
    assert len({line.partition("--name ")[2] for line in lines}) == 4


def test_points_run_once_and_best_is_a_sweep_of_its_own(sweep: dict[str, Any], tmp_path: Path) -> None:
    sweep["grid"]["options.spd.stages"] = [2]
    said = run(tmp_path, sweep, "--best", "tokens_per_cycle")
    assert said.code == 0, said.err
    assert len(results(tmp_path)) == 4
    snippet = yaml.safe_load(said.out)
    assert snippet["points"] == [{"options.spd.stages": 2, "drafters": "oracle:0.9"}]
    assert "disqualified, as all are: " in said.out  # synthetic drafters
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}

    again = run(tmp_path, sweep, "--best", "speedupp")
    assert again.code == 2
    assert "did you mean 'speedup'?" in again.err
    assert "2 points, of which 2 are done" in again.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")} == times
    (alone,) = read_sweep(write(tmp_path, snippet))[1]
    assert alone.settings == snippet["points"][0]

    victim = next((tmp_path / "out").glob("mini__spd__*oracle-0.9*.json"))
    content = json.loads(victim.read_text(encoding="utf-8"))
    victim.write_text(json.dumps({**content, "run_key": "another"}), encoding="utf-8")
    changed = run(tmp_path, sweep)
    assert "2 points, of which 1 are done" in changed.err
    assert changed.code == 1  # the run itself refuses a result of another run


def test_one_point_fails_and_the_others_go_on(sweep: dict[str, Any], tmp_path: Path) -> None:
    sweep["grid"] = {"options.spd.stages": [4, 3], "drafters": ["oracle:0.5"]}  # six layers
    said = run(tmp_path, sweep)
    assert said.code == 1
    assert "1 of 2 points are in" in said.err
    failed = said.err.partition("Failed points")[2]
    assert "stages-4-drafters-oracle-0.5" in failed
    assert "exit code 2" in failed
    assert "stages-3" not in failed
    assert len(results(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {}}, "grids: unknown key; did you mean 'grid'?"),
        ({"grid": {}}, "nothing to sweep: give a grid"),
        ({"grid": {"dtype": []}}, "grid.dtype: is empty"),
        ({"grid": {"dtypes": ["float32"]}}, "dtypes: unknown key; did you mean 'dtype'?"),
        ({"grid": {"dtype": ["float33"]}}, "'float33' is not one of"),
        ({"grid": {"limit": ["many"]}}, "Invalid value for '--limit'"),
        ({"grid": {"options.spd.stagse": [2]}}, "spd.stagse: unknown option; did you mean 'stages'?"),
        ({"grid": {"options.sdp.stages": [2]}}, "no backend here has the label 'sdp'"),
        ({"grid": {"suite": ["quikc"]}}, "unknown suite 'quikc'; did you mean 'quick'?"),
        ({"grid": {"backends": [["vanila"]]}}, "unknown backend 'vanila'"),
        ({"grid": {"trace": ["yes please"]}}, "trace: 'yes please' has to be true or false"),
        ({"grid": {"results": ["here"]}}, "results: unknown key"),
        ({"points": [{"options": 3}]}, "points.0: options: has to be a mapping"),
        ({"grid": {"seed": [1, 1]}}, "a point is there twice: {'seed': 1}"),
        ({"name": "a/b"}, "name: 'a/b' has to be"),
        ({"grid": {"seed": list(range(200)), "limit": list(range(1, 100))}}, "19,800 points; 10,000 are possible"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistake_is_one_message_before_any_work(
    sweep: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if "options.sdp.stages" in str(change) or "backends" in str(change):
        sweep["fixed"]["options"] = {}
    said = run(tmp_path, {**sweep, **change})
    assert said.code == 2
    assert message in said.err
    assert said.err.startswith(f"Error: {tmp_path / 'sweep.yaml'}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "name: x\nname: y"])
def test_file_that_is_no_sweep(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
    said = spdbench("sweep", tmp_path / "sweep.yaml")
    assert said.code == 2
    assert str(tmp_path / "sweep.yaml") in said.err
    assert spdbench("sweep", tmp_path / "absent.yaml").code == 2


def test_second_sweep_in_one_folder_is_refused(sweep: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "points.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = run(tmp_path, sweep)
    assert said.code == 2
    assert "another sweep works in this folder" in said.err


def test_charts_and_page_of_a_sweep(sweep: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    page, chart = tmp_path / "sweep.html", tmp_path / "map.svg"
    said = run(tmp_path, sweep, "--report", page, "--chart", "heat-map", chart)
    assert said.code == 0, said.err
    assert chart.read_text().startswith("<svg")
    text = page.read_text()
    assert f"spdbench sweep {tmp_path / 'sweep.yaml'} --results {tmp_path / 'out'} --chart pareto pareto.svg" in text
    assert text.count('<th scope="row">spd</th>') == 4
    for words in (("--report", page), ("--chart", "pareto", tmp_path / "map.gif"), ("--chart", "map", chart)):
        said = run(tmp_path, sweep, *words)
        assert (said.code, said.out) == (2, "")
    assert run(tmp_path, sweep, "--report", page, "--force").code == 0


def test_which_metrics_are_better_when_lower() -> None:
    lower = ["ttft_s", "tpot_s", "energy_j_per_token", "device_s_per_token", "bubble_ratio"]
    higher = ["speedup", "tokens_per_s", "decode_tokens_per_s", "acceptance_rate", "tokens_per_cycle", "score"]
    assert [lower_is_better(name) for name in lower + higher] == [True] * len(lower) + [False] * len(higher)


# On other engines

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")

ON_A_CLUSTER_OF_TWO = """
import sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from spdbench.cli.main import run

folder, words = Path(sys.argv[1]), sys.argv[2:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)

def kill_a_node():
    log = folder / "points.jsonl"
    while not (log.exists() and log.read_text().count("exit_code") >= 2):
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    print("a node is gone", file=sys.stderr, flush=True)

threading.Thread(target=kill_a_node, daemon=True).start()
code = run(words)
ray.shutdown()
cluster.shutdown()
sys.exit(code)
"""


def example_on_the_tiny_model(sweep: dict[str, Any]) -> dict[str, Any]:
    """The twelve points of the example, with all that makes them fast; six layers have no five stages."""
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    example["fixed"] = {**example["fixed"], **sweep["fixed"]}
    example["grid"]["options.spd.stages"] = [1, 2, 3, 6]
    return {**example, "name": "tiny"}


def require_every_point_once(folder: Path, file: Path) -> None:
    _, points = read_sweep(file)
    assert len(points) == 12
    names = results(folder)
    for point in points:
        for label in point.labels:
            (name,) = [name for name in names if name.startswith(f"mini__{label}__") and point.name in name]
            assert len(read_result(folder / "out" / name).runs) == 2
    assert len(names) == 24
    ended = [json.loads(line) for line in (folder / "out" / "points.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["name"] for line in ended) == sorted(point.name for point in points)
    assert {line["exit_code"] for line in ended} == {0}


def in_a_process(words: Sequence[str | Path], **environment: str) -> Said:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


@needs_ray
@pytest.mark.timeout(900)
def test_ray_loses_a_node_and_every_point_is_there_once(sweep: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, example_on_the_tiny_model(sweep))
    words = ["sweep", str(file), "--results", str(tmp_path / "out"), "--on", "ray"]
    said = in_a_process(["-c", ON_A_CLUSTER_OF_TWO, tmp_path / "out", *words], RAY_USAGE_STATS_ENABLED="0")
    assert said.code == 0, said.err
    assert "a node is gone" in said.err
    assert "lost with node" in said.err
    require_every_point_once(tmp_path, file)


@needs_ray
def test_no_ray_cluster_is_one_message(sweep: dict[str, Any], tmp_path: Path) -> None:
    words = ["-m", "spdbench", "sweep", str(write(tmp_path, sweep)), "--results", str(tmp_path / "out"), "--on", "ray"]
    said = in_a_process(words, RAY_ADDRESS="127.0.0.1:9", RAY_USAGE_STATS_ENABLED="0")
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("Error: --on ray: no cluster at 127.0.0.1:9")
    assert "ray start --head" in said.err
    assert not (tmp_path / "out").exists()


@needs_submitit
@pytest.mark.timeout(900)
def test_submitits_local_jobs_give_every_point_once(sweep: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, {**example_on_the_tiny_model(sweep), "slurm": {"cluster": "local", "timeout_min": 5}})
    said = in_a_process(["-m", "spdbench", "sweep", file, "--results", tmp_path / "out", "--on", "slurm"])
    assert said.code == 0, said.err
    require_every_point_once(tmp_path, file)


@needs_submitit
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--on slurm: no SLURM here"),
        ({"cluster": "lsf"}, "slurm.cluster: 'lsf' is neither slurm nor local"),
        ({"cluster": "local", "partitoin": "gpu"}, "partitoin"),
    ],
)
def test_no_slurm_or_an_unknown_setting_is_one_message(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = run(tmp_path, {**sweep, "slurm": settings}, "--on", "slurm")
    assert said.code == 2
    assert message in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_engine_that_is_not_installed(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = run(tmp_path, sweep, "--on", engine)
    assert said.code == 2
    assert f"--on {engine}: needs {package}: " in said.err
    assert f"pip install '{package}>=" in said.err
