"""The points of a sweep on a Ray cluster: each takes a node, or the GPUs that it names, and sends its results back.

Ray starts and watches the work; this module says which node a point takes. The point of a node that is lost runs on
another one, and is given up after `TRIES`; a task's own error would follow it anywhere, and is the point's end.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from socket import create_connection
from typing import Any

from spdbench.cli.sweep.local import Runner, run_there
from spdbench.cli.sweep.points import Point
from spdbench.cli.sweep.progress import Outcome, Try, try_again
from spdbench.errors import InputError, brief, install_command
from spdbench.output_files import replaced_file

LOOK_EVERY_S, CONNECT_S = 1.0, 10
DIED = ("NodeDiedError", "LocalRayletDiedError", "WorkerCrashedError", "RayActorError")
LOSSES = {*DIED, "ObjectLostError", "TaskUnschedulableError"}
"""Ray's errors, by their base classes, of what ended with a worker or a node, or could not start there any more."""
Running = dict[Any, tuple[Point, int, str, str]]  # by task: its point, try, note and node


def connect(_settings: Mapping[str, Any]) -> Runner:
    """A runner on the cluster at RAY_ADDRESS, or the one that this machine belongs to.

    Raises:
        InputError: ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise InputError(f"--on ray: needs ray: {install_command('spdbench[ray]')}") from None
    address = os.environ.get("RAY_ADDRESS") or "auto"
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        if port.isdigit():
            create_connection((host.strip("[]"), int(port)), CONNECT_S).close()  # Ray itself would try for a minute
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, errors of gRPC
        advice = "Start one with `ray start --head`, or set RAY_ADDRESS."
        raise InputError(f"--on ray: no cluster at {address} ({brief(error)}). {advice}") from None
    _quiet()
    return partial(run_points, home=ray.get_runtime_context().get_node_id())


def _quiet() -> None:
    """Keeps the cluster's messages off the terminal, such as a lost node's last log lines: no argument of `ray.init`
    does. What was lost is named with its point."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *_, **__: None


def run_points(points: Sequence[Point], folder: Path, home: str = "") -> Generator[Outcome]:
    """`home` is the node that this process belongs to: without it no task can be started or waited for."""
    import ray

    waiting: list[Try] = [(point, 1, "") for point in points]
    running: Running = {}
    lost: set[str] = set()  # nodes, of which Ray may hear later than we do
    while waiting or running:
        waiting = [each for each in waiting if not _started(each, running, lost)]
        if not running and lost:
            lost.clear()  # Ray knows by now which of them are there; only a worker of theirs may have died
            continue
        if not running:
            yield from (Outcome(each[0], 1, f"{each[2]}; no node has room for it".lstrip("; ")) for each in waiting)
            return
        done, _ = ray.wait(list(running), timeout=LOOK_EVERY_S)
        if not done and any(node["NodeID"] == home and not node["Alive"] for node in ray.nodes()):
            note = f"lost with node {home[:8]}, to which this command belongs"
            left = [point for point, *_ in running.values()] + [point for point, *_ in waiting]
            yield from (Outcome(point, 1, note) for point in left)
            return
        for task in done:
            point, number, note, node = running.pop(task)
            try:
                exit_code, said, files = ray.get(task)
            except ray.exceptions.RayError as error:
                if LOSSES.isdisjoint(cls.__name__ for cls in type(error).__mro__):
                    yield Outcome(point, 1, brief(getattr(error, "cause", error)))
                else:
                    lost.add(node)
                    yield from try_again(waiting, point, number, f"lost with node {node[:8]} ({type(error).__name__})")
                continue
            for name, content in files.items():
                with replaced_file(folder / name) as file:
                    file.write(content)
            yield Outcome(point, exit_code, note or (said if exit_code else ""))


def _started(each: Try, running: Running, lost: Collection[str]) -> bool:
    """Starts a point on a node that has room for it; False if none has. A point without GPUs takes all processors."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    point, number, note = each
    for node in ray.nodes():
        name, has = node["NodeID"], node.get("Resources", {})
        taken = [other for other, _, _, where in running.values() if where == name]
        whole = any(not other.num_gpus for other in taken) or (taken and not point.num_gpus)
        gpus = has.get("GPU", 0) - sum(other.num_gpus for other in taken)
        if not node["Alive"] or name in lost or whole or gpus < point.num_gpus or not has.get("CPU"):
            continue
        place = NodeAffinitySchedulingStrategy(name, soft=False)
        room = {"num_cpus": 0 if point.num_gpus else has["CPU"], "num_gpus": point.num_gpus}
        task = ray.remote(run_there).options(**room, max_retries=0, scheduling_strategy=place)
        running[task.remote(point, os.getcwd())] = (point, number, note, name)
        return True
    return False
