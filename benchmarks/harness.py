"""The cost of spdbench itself: comparing, its own work in a step and a prompt, long runs, start-up.

Why: a harness whose own work is in the measured time measures itself, and one whose memory grows with the run cannot
finish a long run. None of this may depend on a model, so the backends are mocks whose steps cost nothing.
Regimes: `compare` on 200 files of 80 runs of 201 steps, every other one with drafts; requests of 64 tokens; runs of
1,000, 5,000 and 10,000 prompts by two backends, each size in a process of its own, with result files and table at the
end; `spdbench run quick` on the embedded model, whose weights have to be in the cache already.
Output: a line a measure, with its target. Wall times are the best of three, with the CPU time of
that one, since machines are shared; the rest is CPU time and peak memory.

    python -m benchmarks.harness [compare] [overhead] [prompts] [start]
"""

from __future__ import annotations

import io
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.free_backends import BACKENDS, DEPTH, NUM_TOKENS, FreeSteps, Letters
from spdbench.cli.run.events import Events, Observers, open_events
from spdbench.cli.run.live_view import MAX_GROUPS, LiveView, Tally
from spdbench.judge.comparison.compare import compare
from spdbench.judge.results.schema import BackendRecord, DecodingInfo, ModelInfo, Run, Steps, SuiteInfo
from spdbench.measure.assemble import ResultHead, write_result
from spdbench.measure.clock import measure
from spdbench.measure.journal import Journal, create_journal, resume_journal
from spdbench.measure.request_turn import Workload
from spdbench.measure.runner import Candidate, Runner
from spdbench.render.table import render
from spdbench.types import FirstDivergence, GenerationRequest, Prompt, Sampling

NUM_FILES, NUM_RUNS, NUM_STEPS = 200, 80, 201
SIZES = (1_000, 5_000, 10_000)
TREE_NODES, NUM_SHOWN = 60, 5
ROOT = Path(__file__).parents[1]
TOKEN_S = 0.010
"""The time of a token on a fast CPU; overhead is stated as a share of it."""
LABELS = ("vanilla", "drafts")


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["long-run"]:  # `prompts` starts this script so
        print(json.dumps(long_run(int(words[1]), Path(words[2]))))
        return
    parts = {"compare": comparing, "overhead": overhead, "prompts": prompts, "start": start}
    if unknown := set(words) - parts.keys():
        sys.exit(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(parts)}.")
    print(row("measure", "measured", "target"))
    for name, part in parts.items():
        if not words or name in words:
            for line in part():
                print(line, flush=True)


def row(what: str, measured: str, target: str = "") -> str:
    return f"{what:<62} {measured:<44} {target}".rstrip()


# Comparing


def comparing() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = sum(write_made_up_result(folder, number) for number in range(NUM_FILES))
        size = f"{num_bytes / 1e6:.0f} MB"
        yield row(f"compare {NUM_FILES} files of {NUM_RUNS} prompts, {size}", best_of_three("compare", name), "2 s")
        yield row("compare one of them", best_of_three("compare", str(folder / "000.json")))


def best_of_three(*words: str) -> str:
    wall_s, cpu_s = min(timed(*words) for _ in range(3))
    return f"{wall_s:.2f} s ({cpu_s:.2f} s of CPU)"


def timed(*words: str) -> tuple[float, float]:
    """Wall and CPU time of `spdbench WORDS` in seconds."""
    began, cpu_s = time.perf_counter(), children_cpu_s()
    subprocess.run([sys.executable, "-m", "spdbench", *words], check=True, capture_output=True)
    return time.perf_counter() - began, children_cpu_s() - cpu_s


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_made_up_result(folder: Path, number: int) -> int:
    """A result of random times and ids in the layout of `run`; returns its size in bytes."""
    path, rng = folder / f"{number:03}.json", np.random.default_rng(number)
    with create_journal(folder / "journal", "2026-01-01T00:00:00+00:00", {}) as journal:
        write_result(path, result_head(LABELS[number % 2], f"label{number}", NUM_RUNS), journal)
        journal.remove()
    before, marker, after = path.read_bytes().partition(b'"runs":[\n')
    runs = [made_up_run(index, rng, drafts=number % 2).model_dump_json() for index in range(NUM_RUNS)]
    return path.write_bytes(before + marker + ",\n".join(runs).encode() + b"\n" + after)


def made_up_run(index: int, rng: np.random.Generator, *, drafts: int) -> Run:
    emitted = np.append(1, rng.integers(1, DEPTH * drafts + 2, NUM_STEPS - 1))
    drafted = np.append(0, np.full(NUM_STEPS - 1, DEPTH * drafts))
    t_ns = 50_000_000 + np.cumsum(rng.integers(9_000_000, 11_000_000, NUM_STEPS))
    return Run(
        prompt_id=f"prompt-{index}",
        category="abcdefgh"[index % 8],
        turn=0,
        repeat=0,
        prompt_sha256=f"{index:064x}",
        num_prompt_tokens=40,
        num_new_tokens=int(emitted.sum()),
        finish_reason="length",
        output_ids=rng.integers(0, 49_152, int(emitted.sum())).tolist(),
        ttft_s=t_ns[0] / 1e9,
        decode_s=(t_ns[-1] - t_ns[0]) / 1e9,
        steps=Steps(
            t_ns=t_ns.tolist(),
            emitted=emitted.tolist(),
            drafted=drafted.tolist(),
            judged=np.minimum(emitted, drafted).tolist(),
            accepted=(emitted - 1).tolist(),
            forwards=(drafted + 1.0).tolist(),
        ),
    )


def result_head(label: str, shown: str, num_prompts: int) -> ResultHead:
    return ResultHead(
        suite=SuiteInfo(name="made-up", version=1, sha256="0" * 64, source="inline", num_prompts=num_prompts),
        decoding=DecodingInfo(max_new_tokens=NUM_TOKENS, temperature=0, top_p=1, top_k=0, seed=0, eos_ids=[]),
        backend=BackendRecord(
            name=label,
            label=shown,
            kind=BACKENDS[label].kind,
            options={},
            devices=["cpu"],
            num_devices=1,
            lossy=False,
            lanes=1,
            lane_bytes=[270_000_000],
            stage_layers=[],
        ),
        model=ModelInfo(
            id="none", sha256="0" * 64, dtype="none", num_layers=1, num_parameters=1, bytes=1, template_sha256=None
        ),
        drafter=None,
        environment={"fingerprint": "made-up"},
        git=None,
    )


# The harness's own work in a step and in a prompt


def overhead() -> Iterator[str]:
    backend, num_prompts = FreeSteps(), 2000
    request = GenerationRequest((1, 2, 3), (), NUM_TOKENS, Sampling(), 0, frozenset({-1}))
    bare_s = cpu_s(lambda: [list(backend.generate(request)) for _ in range(num_prompts)]) / num_prompts
    clock_s = cpu_s(lambda: [measure(backend, request) for _ in range(num_prompts)]) / num_prompts - bare_s
    with tempfile.TemporaryDirectory() as folder:
        prompt_s = cpu_s(lambda: run_prompts(Path(folder), num_prompts, LABELS[:1])) / num_prompts - bare_s
    with tempfile.TemporaryDirectory() as folder:
        usual_s = cpu_s(lambda: run_prompts(Path(folder), num_prompts, ("drafts",))) / num_prompts
        kept_s = cpu_s(lambda: run_prompts(Path(folder), num_prompts, ("kept",), keep=True)) / num_prompts - usual_s
    yield row("clock and records, a step", share(clock_s / NUM_TOKENS, 1), "1 %")
    yield row(f"--keep-drafts, a round of {TREE_NODES} drafts, timed", share(seconds_to_read_tree(), 1), "1 %")
    yield row(f"--trace and --keep-drafts, a prompt of {NUM_TOKENS} tokens, untimed", share(kept_s, NUM_TOKENS), "1 %")
    yield row(f"everything but the backend, a prompt of {NUM_TOKENS} tokens", share(prompt_s, NUM_TOKENS), "1 %")
    yield from (row(f"{what}, {NUM_SHOWN} backends", share(s, NUM_TOKENS), "1 %") for what, s in reporting())


def reporting() -> Iterator[tuple[str, float]]:
    """CPU time of what follows a request: the live view on a terminal that takes no time itself, and an event.

    The view counts each request and is drawn once its pause is over, so a drawing is shared by the requests of a pause.
    """
    num = 2 * MAX_GROUPS
    runs = [made_up_run(index, np.random.default_rng(index), drafts=1) for index in range(num)]
    tallies = [Tally(result_head("drafts", f"label{n}", num).backend, num) for n in range(NUM_SHOWN)]
    for tally, run in product(tallies, runs[:MAX_GROUPS]):
        tally.add(run, 0.5)

    def count() -> None:
        for run in runs:
            tallies[0].add(run, 0.5)

    def draw() -> None:
        for run in runs:
            tallies[0].add(run, 0.5)
            view.draw()
            pauses.append(view.pause_s(tallies[0]))

    pauses: list[float] = []
    with LiveView(tallies, "live", Console(file=io.StringIO(), force_terminal=True, width=80)) as view:
        drawn_s = cpu_s(draw) / num
        between = math.ceil(np.mean(pauses) / (NUM_TOKENS * TOKEN_S))
    counted_s = cpu_s(count) / num
    yield f"live view, drawn every {between} requests", counted_s + (drawn_s - counted_s) / between
    with tempfile.TemporaryDirectory() as folder, open_events(Path(folder) / "events.jsonl") as write:
        finished = partial(Events(write, tallies).finished, "label0")
        yield "line for --events written", cpu_s(lambda: [*map(finished, runs)]) / num


def seconds_to_read_tree() -> float:
    """What a round does in addition for `--keep-drafts`, on a tree as large as EAGLE-2's."""
    import torch

    from spdbench.decoding.speculate import drafted_tokens
    from spdbench.decoding.tree import DraftTree, Tree

    draft = DraftTree(Tree(torch.arange(-1, TREE_NODES) // 2, 6), torch.arange(TREE_NODES + 1))
    rounds = 2000
    return cpu_s(lambda: [drafted_tokens(draft) for _ in range(rounds)]) / rounds


def cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def share(seconds: float, num_tokens: int) -> str:
    return f"{seconds * 1e6:.1f} us, {seconds / (num_tokens * TOKEN_S):.3%} at {TOKEN_S * 1e3:.0f} ms a token"


# Long runs


def prompts() -> Iterator[str]:
    facts = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.harness", "long-run", str(size), folder]
            done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            facts[size] = json.loads(done.stdout)
        run_us, end_us = (facts[size][name] / size * 1e6 for name in ("run_s", "end_s"))
        what = f"{size:,} prompts by {len(LABELS)} backends, CPU time a prompt"
        yield row(what, f"{run_us:.0f} us, {end_us:.0f} us for results and table", "constant")
    few, many = facts[SIZES[0]], facts[SIZES[-1]]
    for what, name in (("during the run", "run_mb"), ("with results and table", "end_mb")):
        grown = f"{many[name] - few[name]:+.0f} MB, from {few[name]:.0f} to {many[name]:.0f}"
        yield row(f"peak memory {what}, {SIZES[0]:,} to {SIZES[-1]:,} prompts", grown, "flat, below 30 MB")
    yield row(f"resuming {SIZES[-1]:,} finished prompts, CPU time", f"{many['resume_s']:.2f} s")


def long_run(num_prompts: int, folder: Path) -> dict[str, float]:
    """One run in this process from the first prompt to the table, then resumed: CPU times and peaks of memory."""
    run_s = cpu_s(lambda: run_prompts(folder, num_prompts, LABELS))
    run_mb = peak_mb()
    end_s = cpu_s(lambda: results_and_table(folder, num_prompts))
    end_mb = peak_mb()
    resume_s = cpu_s(lambda: run_prompts(folder, num_prompts, LABELS, resume=True))
    return {"run_s": run_s, "run_mb": run_mb, "end_s": end_s, "end_mb": end_mb, "resume_s": resume_s}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_prompts(
    folder: Path, num_prompts: int, labels: Sequence[str], *, resume: bool = False, keep: bool = False
) -> None:
    prompts = tuple(Prompt(f"prompt-{n}", "abcdefgh"[n % 8], (f"question {n}",)) for n in range(num_prompts))
    workload = Workload(prompts, NUM_TOKENS, Sampling(), 0, frozenset(), repeats=1, warmup=0, context_limit=8192)
    workload = replace(workload, keep_spans=keep, keep_drafts=keep)
    with ExitStack() as stack:
        journals = [stack.enter_context(open_journal(folder, label, resume=resume)) for label in labels]
        candidates = [
            Candidate(label, BACKENDS[label](), journal) for label, journal in zip(labels, journals, strict=True)
        ]
        Runner(workload, candidates, Letters(), lambda *_: FirstDivergence("real", 0, 1, 2), Observers()).run()


def open_journal(folder: Path, label: str, *, resume: bool) -> Journal:
    path = folder / f"{label}.journal.jsonl"
    return resume_journal(path, {}) if resume else create_journal(path, "2026-01-01T00:00:00+00:00", {})


def results_and_table(folder: Path, num_prompts: int) -> None:
    """The end of a run. The journals are read again here, as after an interruption."""
    entries = []
    for label in LABELS:
        with open_journal(folder, label, resume=True) as journal:
            entries.append(write_result(folder / f"{label}.json", result_head(label, label, num_prompts), journal))
    render(compare(entries), "table", Console(width=100))


# Start-up


def start() -> Iterator[str]:
    timed("run", "--help")  # brings the files into the page cache
    wall_s, all_s = min(first_prompt() for _ in range(3))
    yield row(
        "`spdbench run quick`, command to first prompt", f"{wall_s:.1f} s ({all_s:.1f} s of CPU to its end)", "6 s"
    )


def first_prompt() -> tuple[float, float]:
    """Seconds from the command to its first prompt, and the CPU time of the whole command, for one token."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", "quick", "-b", "vanilla", "--limit", "1", "--max-new-tokens", "1", "--results", folder]
        began, used_s = time.perf_counter(), children_cpu_s()
        command = [sys.executable, "-m", "spdbench", *words]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not has_run(Path(folder)):
                time.sleep(0.002)
            ended_s = time.perf_counter() - began
        [result] = Path(folder).glob("*.json")
        took_s = json.loads(result.read_bytes())["runs"][0]["ttft_s"]
    return ended_s - took_s, children_cpu_s() - used_s


def has_run(folder: Path) -> bool:
    """True once a finished request is in a journal, or in the result that replaces it."""
    return any(b'{"run":' in path.read_bytes() for path in folder.glob("*.jsonl")) or any(folder.glob("*.json"))


if __name__ == "__main__":
    main()
