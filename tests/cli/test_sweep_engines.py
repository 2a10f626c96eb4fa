"""`spdbench sweep --on ray` and `--on slurm`: points whose node or job is lost, failures, interruptions, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from spdbench.cli.sweep import on_ray, on_slurm
from spdbench.cli.sweep.points import read_sweep
from spdbench.judge.results.schema import read_result
from tests.cli.run_helpers import Said
from tests.cli.sweeps import EXAMPLE, results, run, tiny_sweep, write

SECONDS = 800.0  # a limit against hanging, not an expectation

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@pytest.fixture
def sweep(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_sweep(tiny_model, tmp_path)


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


class FakeCluster:
    """Ray's nodes, which are always alive, and the `answers` of tasks in their order; errors among them are raised.
    `nodes` are those on which tasks were started."""

    def __init__(self, answers: Sequence[object], num_nodes: int = 2) -> None:
        self.answers = answers
        self.nodes = list[str]()
        self._listed = [
            {"NodeID": f"{number:056x}", "Alive": True, "Resources": {"CPU": 1.0}} for number in range(num_nodes)
        ]

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        monkeypatch.setattr(ray, "nodes", lambda: self._listed)
        monkeypatch.setattr(ray, "remote", lambda _work: self)
        monkeypatch.setattr(ray, "wait", lambda tasks, timeout: (tasks[:1], tasks[1:]))  # noqa: ARG005
        monkeypatch.setattr(ray, "get", self._get)

    def options(self, *, scheduling_strategy: Any, **_: object) -> FakeCluster:
        self.nodes.append(scheduling_strategy.node_id)
        return self

    def remote(self, *_: object) -> int:
        return len(self.nodes) - 1

    def _get(self, task: int) -> object:
        answer = self.answers[task]
        if isinstance(answer, Exception):
            raise answer
        return answer


FINE: object = (0, "", {})


def loss(name: str) -> Exception:
    """The error of Ray of that name."""
    from ray import exceptions

    words = {"ObjectLostError": ("ab" * 28, None, ""), "WorkerCrashedError": (), "ActorDiedError": ()}
    made: Exception = getattr(exceptions, name)(*words.get(name, ("it is gone",)))
    return made


@needs_ray
@pytest.mark.parametrize(
    "name", ["NodeDiedError", "WorkerCrashedError", "ActorDiedError", "ObjectLostError", "TaskUnschedulableError"]
)
def test_what_ends_with_a_node_runs_again_on_another(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (point, *_) = read_sweep(write(tmp_path, sweep))[1]
    cluster = FakeCluster([loss(name), FINE])
    cluster.use(monkeypatch)
    (outcome,) = on_ray.run_points([point], tmp_path)
    assert outcome.exit_code == 0
    assert outcome.note.startswith("lost with node 00000000 (")
    assert outcome.note.endswith("try 1 of 3")
    assert cluster.nodes == [f"{number:056x}" for number in (0, 1)]


@needs_ray
def test_a_tasks_own_error_is_the_points_failure(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import OutOfMemoryError, RayTaskError

    points = read_sweep(write(tmp_path, sweep))[1][:3]
    own = RayTaskError("run_there", "a traceback\nof lines", OSError("no space left")).as_instanceof_cause()
    cluster = FakeCluster([own, OutOfMemoryError("the node is full"), FINE])
    cluster.use(monkeypatch)
    outcomes = list(on_ray.run_points(points, tmp_path))
    assert [(each.exit_code, each.note) for each in outcomes] == [
        (1, "OSError: no space left"),
        (1, "OutOfMemoryError: the node is full"),
        (0, ""),
    ]
    assert len(cluster.nodes) == 3  # no second try


@needs_ray
def test_the_only_node_is_used_again_and_a_point_given_up_after_three_tries(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (point, other, *_) = read_sweep(write(tmp_path, sweep))[1]
    crash = loss("WorkerCrashedError")
    cluster = FakeCluster([crash, FINE, crash, crash], num_nodes=1)
    cluster.use(monkeypatch)
    outcomes = {each.point.name: each for each in on_ray.run_points([point, other], tmp_path)}
    assert outcomes[other.name].exit_code == 0
    assert outcomes[point.name].exit_code == 1
    assert outcomes[point.name].note.endswith("try 3 of 3")


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


class FakeJob:
    """A job that has ended, unless its answer is None; an error is raised as its result."""

    def __init__(self, job_id: str, answer: int | Exception | None) -> None:
        self.job_id = job_id
        self._answer = answer
        self.cancelled = False

    def done(self) -> bool:
        return self._answer is not None

    def result(self) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def cancel(self) -> None:
        if self.job_id == "7_1":
            raise subprocess.CalledProcessError(1, ["scancel", self.job_id])
        self.cancelled = True


class FakeExecutor:
    """Gives its jobs the `answers` in order."""

    def __init__(self, answers: Sequence[int | Exception | None]) -> None:
        self._answers = answers
        self.jobs = list[FakeJob]()

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, _work: object, _point: object, _folder: Path) -> FakeJob:
        self.jobs.append(FakeJob(f"7_{len(self.jobs)}", self._answers[len(self.jobs)]))
        return self.jobs[-1]


def test_a_point_whose_job_is_lost_is_submitted_again_three_times_at_most(
    sweep: dict[str, Any], tmp_path: Path
) -> None:
    points = read_sweep(write(tmp_path, sweep))[1][:3]
    gone = RuntimeError("job 7 has no output\nand a long log")
    executor = FakeExecutor([0, gone, gone, 0, gone, gone])
    outcomes = {each.point.name: each for each in on_slurm._run_points(lambda _: executor, None, points, tmp_path)}
    assert [outcomes[point.name].exit_code for point in points] == [0, 0, 1]
    assert outcomes[points[0].name].note == ""
    assert outcomes[points[1].name].note == "lost with job 7_1 (RuntimeError: job 7 has no output), try 1 of 3"
    assert outcomes[points[2].name].note.endswith("try 3 of 3")
    assert len(executor.jobs) == 6
    assert not any(job.cancelled for job in executor.jobs)


def test_an_interrupted_sweep_cancels_its_jobs_and_names_those_that_it_could_not(
    sweep: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = read_sweep(write(tmp_path, sweep))[1]
    executor = FakeExecutor([0, None, None, None])
    outcomes = on_slurm._run_points(lambda _: executor, None, points, tmp_path)
    assert next(outcomes).point is points[0]
    outcomes.close()  # as the command does when it is interrupted
    assert [job.cancelled for job in executor.jobs] == [False, False, True, True]
    said = capsys.readouterr().err
    assert "Cancelled 2 jobs; the same command goes on" in said
    assert "could not be cancelled and may still run: scancel 7_1" in said


def runs_in(folder: Path) -> list[int]:
    """The processes whose command line names `folder`'s results as a run's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"run" in words and str(folder / "out").encode() in words:
                found.append(int(path.parent.name))
    return found


@needs_submitit
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.timeout(300)
def test_ctrl_c_ends_submitits_local_jobs(sweep: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, {**sweep, "slurm": {"cluster": "local", "timeout_min": 5}})
    words = [sys.executable, "-m", "spdbench", "sweep", file, "--results", tmp_path / "out", "--on", "slurm"]
    running = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not runs_in(tmp_path):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)  # not to the group, as a job on another machine gets none either
    _, said = running.communicate()
    assert running.returncode == 130
    assert "Cancelled 1 job; the same command goes on" in said
    while runs_in(tmp_path):
        time.sleep(0.02)


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
