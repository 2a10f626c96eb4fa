"""`spdbench sweep --on ray`: nodes that are lost, failures of points, refusals."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spdbench.cli.sweep import on_ray
from spdbench.cli.sweep.points import read_sweep
from tests.cli.sweeps import (
    example_on_the_tiny_model,
    in_a_process,
    require_every_point_once,
    runs_of,
    started,
    write,
)

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


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


@needs_ray
@pytest.mark.timeout(900)
def test_ray_loses_a_node_and_every_point_is_there_once(sweep: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, example_on_the_tiny_model(sweep))
    words = ["sweep", str(file), "--results", str(tmp_path / "out"), "--on", "ray"]
    said = in_a_process(["-c", ON_A_CLUSTER_OF_TWO, tmp_path / "out", *words], RAY_USAGE_STATS_ENABLED="0")
    assert said.code == 0, said.err
    assert "a node is gone" in said.err
    assert "lost with node" in said.err
    assert "raylet" not in (said.out + said.err).lower()  # Ray's own messages, a lost node's last log lines among them
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

    def lose(self, number: int) -> None:
        self._listed[number] = {**self._listed[number], "Alive": False}

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
def test_without_its_own_node_a_sweep_ends_and_names_its_points(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    points = read_sweep(write(tmp_path, sweep))[1][:2]
    cluster = FakeCluster([FINE], num_nodes=1)
    cluster.use(monkeypatch)

    def nothing_ends(tasks: list[object], timeout: float) -> tuple[list[object], list[object]]:  # noqa: ARG001
        cluster.lose(0)
        return [], tasks

    monkeypatch.setattr(ray, "wait", nothing_ends)
    outcomes = list(on_ray.run_points(points, tmp_path, home="0" * 56))
    assert [each.point.name for each in outcomes] == [point.name for point in points]
    assert {(each.exit_code, each.note) for each in outcomes} == {
        (1, "lost with node 00000000, to which this command belongs")
    }


A_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@needs_ray
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.timeout(300)
def test_ctrl_c_ends_what_runs_on_the_cluster(sweep: dict[str, Any], tmp_path: Path) -> None:
    words = [sys.executable, "-c", A_CLUSTER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        running = started(
            *("sweep", write(tmp_path, sweep), "--results", tmp_path / "out", "--on", "ray"),
            RAY_ADDRESS=address,
            RAY_USAGE_STATS_ENABLED="0",
        )
        while not runs_of(sweep["fixed"]["suite"]):
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        assert "Interrupted." in running.communicate()[1]
        assert running.returncode == 130
        while runs_of(sweep["fixed"]["suite"]):
            time.sleep(0.02)


@needs_ray
def test_no_ray_cluster_is_one_message(sweep: dict[str, Any], tmp_path: Path) -> None:
    words = ["-m", "spdbench", "sweep", str(write(tmp_path, sweep)), "--results", str(tmp_path / "out"), "--on", "ray"]
    said = in_a_process(words, RAY_ADDRESS="127.0.0.1:9", RAY_USAGE_STATS_ENABLED="0")
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("Error: --on ray: no cluster at 127.0.0.1:9")
    assert "ray start --head" in said.err
    assert not (tmp_path / "out").exists()
