"""`torchrun -m spdbench run`: the whole command on one node, and on two agents with a network between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdbench.judge.results.schema import Result, read_result
from tests.cli.run_helpers import write_suite
from tests.processes.rank_group import free_port
from tests.processes.test_stage_faults import MARK, processes

SECONDS = 240.0  # a limit against hanging, not an expectation
TORCHRUN = f"{sys.executable} -m torch.distributed.run"
TWO_NAMESPACES = """
set -e
ip link set lo up
unshare --net sleep 600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add near type veth peer name far netns $other
ip addr add 10.83.0.1/24 dev near; ip link set near up
nsenter --net --target $other sh -c 'ip link set lo up; ip addr add 10.83.0.2/24 dev far; ip link set far up'
"""
"""This shell is on one side of a cable, what `nsenter --net --target $other` starts on the other side."""
AGENTS = """
GLOO_SOCKET_IFNAME=%(near)s %(torchrun)s --node_rank=0 %(rest)s & first=$!
GLOO_SOCKET_IFNAME=%(far)s %(enter)s %(torchrun)s --node_rank=1 %(rest)s & second=$!
%(meanwhile)s
code=0
wait $first || code=$?
wait $second || code=$((code + 10 * $?))
exit $code
"""


class Torchrun:
    """`spdbench run` on the tiny model, with three stages as ranks, in processes that carry a mark."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.results = folder / "results"
        self.suite = write_suite(folder, num_prompts=40, turns=1, decoding={"max_new_tokens": 30})
        self.model = model
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, MARK: self.mark, "SPDBENCH_CACHE": str(folder / "cache")}

    def words(self, *more: str, executor: str = "torchrun") -> str:
        return " ".join(
            [
                f"-m spdbench run {self.suite} -m {self.model} --dtype float32 --threads 1 --devices cpu",
                f"--drafter random -b vanilla -b spd -o spd.stages=3 -o spd.executor={executor}",
                f"--results {self.results}",
                *more,
            ]
        )

    def start(self, command: str, *shell: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*shell, "sh", "-c", command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, label: str = "spd") -> Result:
        return read_result(self.results / f"mini__{label}__tiny-llama.json")

    def wait_for(self, num_runs: int, running: subprocess.Popen[str]) -> None:
        """Waits until `num_runs` requests are in the journals."""
        deadline = time.monotonic() + SECONDS
        journals = [self.results / f"mini__{label}__tiny-llama.journal.jsonl" for label in ("vanilla", "spd")]
        while sum(path.read_bytes().count(b'\n{"run"') for path in journals if path.exists()) < num_runs:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Iterator[Torchrun]:
    shared = set(Path("/dev/shm").iterdir())
    made = Torchrun(tiny_model, tmp_path)
    yield made
    deadline = time.monotonic() + 30
    while left := processes(made.mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert set(Path("/dev/shm").iterdir()) <= shared


def finished(running: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = running.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    return running.returncode, out, err


def same_work(first: Result, second: Result) -> bool:
    """True if every request has the same ids and the same steps."""

    def work(result: Result) -> list[object]:
        return [(r.prompt_id, r.output_ids, r.steps.emitted, r.steps.accepted, r.steps.forwards) for r in result.runs]

    return bool(first.runs) and work(first) == work(second)


MORE = {
    "two": ["stages=3", "draft_top_k=2", "head=split"],
    "four": ["stage_layers=2,1,2,1", "draft_top_k=4", "drafting=first_stage"],
}
"""More pipelines for four ranks: with branches, and where rank 0 runs a part of the head or the first stage."""


def more(executor: str) -> list[str]:
    words = ["--limit", "2"]
    for label, options in MORE.items():
        words += ["-b", f"{label}=spd", *(f"-o {label}.{option}" for option in (*options, f"executor={executor}"))]
    return words


def test_one_node_gives_the_results_of_processes(run: Torchrun) -> None:
    code, out, err = finished(run.start(f"{TORCHRUN} --nnodes=1 --nproc_per_node=4 {run.words(*more('torchrun'))}"))
    assert code == 0, err
    assert out.count("tok/s, the baseline") == 1
    far = {label: run.result(label) for label in ("spd", *MORE)}
    assert [far[label].backend.chosen["nodes"] for label in far] == [*["0, 0, 0 by stage"] * 2, "0, 0, 0, 0 by stage"]
    assert "clock_offsets_us" not in far["spd"].backend.chosen
    command = f"{sys.executable} {run.words(*more('inline'), executor='process')}"
    code, _, err = finished(run.start(command))
    assert code == 0, err
    assert run.result().backend.chosen["executor"] == "process"
    for label, result in far.items():
        assert same_work(result, run.result(label))


def test_wrong_input_is_one_message_of_rank_0(run: Torchrun) -> None:
    code, out, err = finished(
        run.start(f"{TORCHRUN} --nproc_per_node=2 {run.words('--limit', '2')} -b ngram -o ngram.nonsense=1")
    )
    assert code == 1  # torchrun's own, whatever its ranks end with
    assert err.count("Error: ") - err.count("ChildFailedError: ") == 1
    assert "ngram.nonsense" in err
    assert "exitcode  : 2" in err
    assert not out


def namespaces() -> tuple[str, ...] | None:
    """The command that gives a shell a network of its own, as some user that may change it; None where the system
    refuses."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return None
    command = ("unshare", "--user", "--map-root-user", "--net")
    tried = subprocess.run([*command, "sh", "-c", TWO_NAMESPACES], capture_output=True, check=False)
    return command if tried.returncode == 0 else None


def two_agents(run: Torchrun, words: str, meanwhile: str = "") -> subprocess.Popen[str]:
    """Two torchrun agents with two ranks each, in two networks; where the system allows none, on two loopback
    addresses."""
    shell = namespaces()
    split = {"near": "near", "far": "far", "address": "10.83.0.1", "enter": "nsenter --net --target $other"}
    if shell is None:
        split = {"near": "lo", "far": "lo", "address": "127.0.0.2", "enter": ""}
    rest = f"--nnodes=2 --nproc_per_node=2 --master_addr={split['address']} --master_port={free_port()} {words}"
    command = AGENTS % {"torchrun": TORCHRUN, "rest": rest, "meanwhile": meanwhile, **split}
    return run.start((TWO_NAMESPACES if shell else "") + command, *(shell or ()))


@pytest.mark.parametrize("transport", ["pipe", "gloo"])
def test_two_nodes_give_the_results_of_one_process(run: Torchrun, transport: str) -> None:
    code, out, err = finished(two_agents(run, run.words("--limit", "2", "-o", f"spd.transport={transport}")))
    assert code == 0, err
    assert out.count("tok/s, the baseline") == 1
    far = run.result()
    assert far.backend.chosen["nodes"] == "0, 1, 1 by stage"
    assert far.backend.chosen["transport"] == transport
    assert far.divergence is not None
    assert far.divergence.identical == 2
    command = f"{sys.executable} {run.words('--limit', '2', executor='inline')}"
    code, _, err = finished(run.start(command))
    assert code == 0, err
    assert same_work(far, run.result())


def test_a_rank_that_is_killed_ends_both_nodes_and_is_named(run: Torchrun) -> None:
    running = two_agents(run, run.words())
    run.wait_for(6, running)
    victim = next(
        pid
        for pid, command in processes(run.mark)
        if "spdbench\0run" in command and b"\0RANK=3\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(victim, signal.SIGKILL)
    code, _, err = finished(running)
    assert code == 11
    assert "rank 3 on node 1" in err
    assert "finished requests are kept" in err
    assert len(run.result("vanilla").runs) >= 2


def test_a_cable_that_is_cut_ends_both_nodes_by_the_limit(run: Torchrun) -> None:
    """Rank 0 by `spd.timeout_s`, the ranks on the other node as their connections die of silence."""
    if namespaces() is None:
        pytest.skip("no network namespaces here, so there is no cable to cut")
    cut = run.results.parent / "cut"
    running = two_agents(
        run,
        run.words("-o", "spd.timeout_s=5"),
        f"until [ -e {cut} ] || ! kill -0 $first; do sleep 0.1; done; ip link set near down",
    )
    run.wait_for(6, running)
    cut.touch()
    code, _, err = finished(running)
    assert code == 11
    assert "Error: stage 1 of 3 of spd (layers 2 to 3, rank 2 on node 1, process " in err
    assert "no answer within 5 s (spd.timeout_s)" in err
    assert "finished requests are kept" in err
    for rank in (2, 3):
        assert f"rank {rank} on node 1 lost rank 0" in err
