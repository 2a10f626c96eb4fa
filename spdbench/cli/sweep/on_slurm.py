"""The points of a sweep as SLURM jobs, through submitit: one job array, of which each task has a node for itself.

Results go to the sweep's folder, which all nodes share. A task whose node is lost is submitted again; since each run
continues its journal, it loses at most the request that was being measured. An interrupted sweep cancels its jobs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spdbench.cli.sweep.local import Runner, last_line, run_here
from spdbench.cli.sweep.points import Point
from spdbench.cli.sweep.progress import Outcome, Try, try_again
from spdbench.console import counted, say
from spdbench.errors import InputError, brief, first_line, install_command

LOOK_EVERY_S = 0.5
LOGS = "slurm"
RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt): ")
"""The line of a trace that names the error."""
ONE_NODE = {"nodes": 1, "tasks_per_node": 1}
DEFAULT_TIMEOUT_MIN = 24 * 60  # submitit's own: two minutes for local jobs and five on SLURM, in which few points end


def connect(settings: Mapping[str, Any]) -> Runner:
    """A runner with the sweep's `slurm` settings: `cluster` (slurm, or local to try it without SLURM), and parameters
    of submitit such as `slurm_partition` and `timeout_min`.

    Raises:
        InputError: submitit is not installed, there is no SLURM here, or a parameter is unknown or of another type.
    """
    try:
        import submitit
    except ImportError:
        raise InputError(f"--on slurm: needs submitit: {install_command('spdbench[slurm]')}") from None
    if other := [key for key in ONE_NODE if settings.get(key, 1) != 1]:
        raise InputError(
            f"--on slurm: slurm.{other[0]}: {settings[other[0]]!r}: each point is one task on one node. One model over "
            "several nodes is spd.executor=torchrun"
        )
    parameters = {**ONE_NODE, "timeout_min": DEFAULT_TIMEOUT_MIN, **settings}
    cluster = parameters.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise InputError(f"--on slurm: slurm.cluster: {cluster!r} is neither slurm nor local")
    if cluster == "slurm":
        if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
            raise InputError(f"--on slurm: no SLURM here (there is no {missing[0]}); run it on a login node")
        parameters = {"slurm_exclusive": "", **parameters}

    def executor(folder: Path) -> Any:
        made = submitit.AutoExecutor(folder / LOGS, cluster=cluster)
        made.update_parameters(**parameters)
        return made

    try:
        submitit.AutoExecutor(Path.cwd(), cluster=cluster).update_parameters(**parameters)
    except (AssertionError, NameError, TypeError, ValueError) as error:
        raise InputError(f"--on slurm: slurm: {str(error).partition(chr(10))[0]}") from None
    return partial(_run_points, executor, 1 if cluster == "local" else None)


def _run_points(executor: Any, at_once: int | None, points: Sequence[Point], folder: Path) -> Generator[Outcome]:
    """All points as one array; or `at_once` jobs at a time, where all run on this machine."""
    executing = executor(folder)
    waiting: list[Try] = [(point, 1, "") for point in points]
    running: list[tuple[Any, Point, int, str]] = []
    try:
        while waiting or running:
            room = len(waiting) if at_once is None else at_once - len(running)
            now, waiting = waiting[:room], waiting[room:]
            if now:
                try:
                    with executing.batch():
                        jobs = [executing.submit(run_here, point, folder.resolve()) for point, _, _ in now]
                except RuntimeError as error:  # what sbatch says, such as of a partition that there is not
                    advice = "; slurm.timeout_min sets the limit" if "time limit" in str(error).lower() else ""
                    raise InputError(f"--on slurm: no job was accepted: {first_line(error)}{advice}") from None
                if at_once is None:
                    array = jobs[0].job_id.partition("_")[0]
                    say(f"Submitted {counted(len(jobs), 'job')}; `squeue -j {array}` shows what they wait for.")
                running += [(job, *each) for job, each in zip(jobs, now, strict=True)]
            for each in (ended := [each for each in running if each[0].done()]):
                running.remove(each)
                job, point, number, note = each
                try:
                    exit_code = job.result()
                    yield Outcome(point, exit_code, note or (last_line(job.stderr() or "") if exit_code else ""))
                except Exception as error:  # the job has no result: its node was lost, it was killed or out of time
                    yield from try_again(waiting, point, number, f"lost with job {job.job_id} ({_reason(error)})")
            if not ended:
                time.sleep(LOOK_EVERY_S)
    finally:
        _cancel([job for job, *_ in running])


def _reason(error: Exception) -> str:
    """What ended a job, in a line. submitit gives the trace of an error in the job, whose end says what it was."""
    raised = [line for line in str(error).splitlines() if RAISED.match(line)]
    return raised[-1] if raised else brief(error)


def _cancel(jobs: Sequence[Any]) -> None:
    """Cancels the jobs of a sweep that was interrupted, and says so."""
    left = []
    for job in jobs:
        try:
            job.cancel()
        except (OSError, subprocess.CalledProcessError):  # of scancel
            left.append(job.job_id)
    if num := len(jobs) - len(left):
        say(f"Cancelled {counted(num, 'job')}; the same command goes on where they stopped.")
    if left:
        say(f"NOTE: these could not be cancelled and may still run: scancel {' '.join(left)}")
