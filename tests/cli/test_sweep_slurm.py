"""`spdbench sweep --on slurm`: jobs that are lost, interruptions, refusals."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from spdbench.cli.sweep import on_slurm
from spdbench.cli.sweep.points import read_sweep
from tests.cli.sweeps import (
    example_on_the_tiny_model,
    in_a_process,
    require_every_point_once,
    run,
    runs_of,
    started,
    write,
)

needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


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

    def stderr(self) -> str:
        return "NOTE: a busy machine\nError: it has six layers\n"

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
    ended = RuntimeError(
        'failed with trace:\n  File "a.py"\nsubmitit.core.utils.UncompletedJobError: timed-out\nSee logs'
    )
    executor = FakeExecutor([0, gone, gone, 0, gone, ended])
    outcomes = {each.point.name: each for each in on_slurm._run_points(lambda _: executor, None, points, tmp_path)}
    assert [outcomes[point.name].exit_code for point in points] == [0, 0, 1]
    assert outcomes[points[0].name].note == ""
    assert outcomes[points[1].name].note == "lost with job 7_1 (RuntimeError: job 7 has no output), try 1 of 3"
    assert (
        outcomes[points[2].name].note
        == "lost with job 7_5 (submitit.core.utils.UncompletedJobError: timed-out), try 3 of 3"
    )
    assert len(executor.jobs) == 6
    assert not any(job.cancelled for job in executor.jobs)


def test_a_point_that_fails_says_why(sweep: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = read_sweep(write(tmp_path, sweep))[1][:2]
    outcomes = list(on_slurm._run_points(lambda _: FakeExecutor([2, 0]), None, points, tmp_path))
    assert [(each.exit_code, each.note) for each in outcomes] == [(2, "Error: it has six layers"), (0, "")]
    assert "Submitted 2 jobs; `squeue -j 7` shows what they wait for." in capsys.readouterr().err


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


@needs_submitit
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.timeout(300)
def test_ctrl_c_ends_submitits_local_jobs(sweep: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, {**sweep, "slurm": {"cluster": "local", "timeout_min": 5}})
    running = started("sweep", file, "--results", tmp_path / "out", "--on", "slurm")
    while not runs_of(sweep["fixed"]["suite"]):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)  # not to the group, as a job on another machine gets none either
    _, said = running.communicate()
    assert running.returncode == 130
    assert "Cancelled 1 job; the same command goes on" in said
    while runs_of(sweep["fixed"]["suite"]):
        time.sleep(0.02)


@pytest.fixture
def _slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's commands: `sbatch` takes each script, whose jobs never start, unless it names the partition `none`;
    `scancel` writes down what it was given."""
    scripts = {
        "sbatch": 'if grep -q partition=none "$1"; then echo "sbatch: error: invalid partition" >&2; exit 1; fi\n'
        'if grep -q time=1440 "$1"; then echo "sbatch: error: Requested time limit is invalid" >&2; exit 1; fi\n'
        f'cp "$1" {tmp_path}/submitted; echo "Submitted batch job 4711"',
        "srun": "exit 1",
        "sacct": f"touch {tmp_path}/asked; "
        'echo "JobID|State|NodeList"; for n in 0 1 2 3; do echo "4711_$n|PENDING|"; done',
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
    }
    (tmp_path / "bin").mkdir()
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@needs_submitit
@pytest.mark.usefixtures("_slurm")
@pytest.mark.timeout(300)
def test_sigterm_cancels_every_task_of_slurms_array(sweep: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, {**sweep, "slurm": {"slurm_partition": "cpu", "timeout_min": 5}})
    running = started("sweep", file, "--results", tmp_path / "out", "--on", "slurm")
    while not (tmp_path / "asked").exists():  # for the state of its jobs
        assert running.poll() is None
        time.sleep(0.02)
    running.terminate()
    _, said = running.communicate()
    assert running.returncode == 143
    assert "Cancelled 4 jobs; the same command goes on" in said
    assert (tmp_path / "cancelled").read_text().split() == [f"4711_{number}" for number in range(4)]
    script = (tmp_path / "submitted").read_text()
    for line in ("--array=0-3", "--exclusive", "--nodes=1", "--partition=cpu"):
        assert f"#SBATCH {line}" in script


@needs_submitit
@pytest.mark.usefixtures("_slurm")
def test_what_sbatch_refuses_is_one_message(sweep: dict[str, Any], tmp_path: Path) -> None:
    said = run(tmp_path, {**sweep, "slurm": {"slurm_partition": "none"}}, "--on", "slurm")
    assert said.code == 2
    assert "Error: --on slurm: no job was accepted: sbatch: error: invalid partition" in said.err
    said = run(tmp_path, {**sweep, "slurm": {"slurm_partition": "short"}}, "--on", "slurm")
    assert said.code == 2
    assert "Requested time limit is invalid; slurm.timeout_min sets the limit" in said.err


@needs_submitit
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--on slurm: no SLURM here"),
        ({"cluster": "lsf"}, "slurm.cluster: 'lsf' is neither slurm nor local"),
        ({"cluster": "local", "partitoin": "gpu"}, "partitoin"),
        ({"cluster": "local", "timeout_min": "soon"}, 'slurm: Parameter "timeout_min" expected type'),
        ({"cluster": "local", "tasks_per_node": 4}, "slurm.tasks_per_node: 4: each point is one task on one node"),
        ({"nodes": 2}, "slurm.nodes: 2: each point is one task on one node"),
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
