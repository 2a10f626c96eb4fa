"""How far `spdbench project` is off: against pipelines run on this machine, and against published tables.

Why: a projection is worth as much as its error is known.
Regimes: (1) SPD with stages in processes, its parts timed by the spans of the run itself: does the simulated schedule
give the measured tokens/s? (2) the same with stages that mostly sleep, as if each had a device. (3) SPD inline, all
stages on one device, its layers timed by vanilla in the same run and its drafter by the stored profile. (4) The
reference code's tables (`benchmarks/shared/published.py`).
Output: `docs/validation.md` on stdout, with the worst error of all and of each regime. Takes five minutes, (4) alone a
second.

    python -m benchmarks.validation [--results DIR] [--published] > docs/validation.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.shared.published import Compared, Regime, published, worst_errors
from benchmarks.shared.sleeping import SleepingSPD, sleeping_pipeline
from benchmarks.shared.traced import Traced, parts_of, traced_parts
from benchmarks.shared.workload import prompt_ids
from spdbench.judge.loaded import LoadedResult, read_results
from spdbench.judge.projection.costs import ProfileCosts, RecordedCosts
from spdbench.judge.projection.project import replay
from spdbench.judge.projection.recorded import (
    host_seconds,
    part_seconds,
    rows_a_stage,
    sort_results,
    stage_sigma,
    start_seconds,
    verdicts,
)
from spdbench.judge.projection.simulation import (
    Parts,
    Scatter,
    Stretch,
    lognormal_factors,
    request_seconds,
)
from spdbench.judge.results.table import COLUMN
from spdbench.measure.clock import measure as measure_request
from spdbench.models.target import load_target
from spdbench.profiles.profile import Profile, read_profile
from spdbench.types import GenerationRequest, Sampling, Span

SLEEPING_STAGES, SLEEPING_DRAFTER = (2, 3, 5, 10), "oracle:0.7"
LAYER_S, DRAFT_S = 4e-3, 20e-3
STAGES = {2: "auto", 3: "auto", 5: "oracle:0.6", 6: "oracle:0.6", 10: "oracle:0.6"}
"""Number of stages -> drafter; the trained head is used for two and three."""
IN_PROCESSES: dict[str, tuple[int, dict[str, str]]] = {
    "2 stages, drafter in the first one's process": (2, {"drafting": "first_stage"}),
    "2 stages, drafter and head in the first one's process": (2, {"drafting": "first_stage", "head": "drafter"}),
    "2 stages": (2, {}),
    "3 stages": (3, {}),
    "5 stages": (5, {}),
}
PROFILE, SLEEPING = "profile.json", "sleeping.json"
LIMIT, NEW_TOKENS, REPEATS = 6, 32, 2
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="read the runs from this folder, or measure into it if it is new")
    parser.add_argument("--published", action="store_true", help="only the published tables; measures nothing")
    words = parser.parse_args()
    parts = [*published()]
    if not words.published:
        with tempfile.TemporaryDirectory() as name:
            folder = words.results or Path(name)
            if not (folder / PROFILE).exists():
                measure(folder)
            if not (folder / SLEEPING).exists():
                measure_sleeping(folder)
            parts = [*here(folder), *parts]
    print("\n".join(page(parts)))


def page(parts: Sequence[str | Regime]) -> Iterator[str]:
    """The page's lines: the worst errors first, then each part."""
    yield from heading()
    yield from worst_errors([each for each in parts if isinstance(each, Regime)])
    for each in parts:
        yield from each.table() if isinstance(each, Regime) else [each]


def heading() -> Iterator[str]:
    yield "# How far projections are off"
    yield ""
    yield f"Made by `python -m benchmarks.validation > docs/validation.md` on {datetime.now(UTC):%Y-%m-%d}."
    yield "What is simulated, and from what, is in [projection.md](projection.md)."


def measure(folder: Path) -> None:
    """A profile of this machine, then all pipelines and vanilla in one run, prompt by prompt in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    spdbench("profile", "-o", str(folder / PROFILE))
    words = ["-b", "vanilla"]
    for stages, drafter in STAGES.items():
        words += _pipeline(f"inline{stages}", drafter, {"stages": str(stages), "executor": "inline"})
    for number, (stages, options) in enumerate(IN_PROCESSES.values()):
        words += _pipeline(
            f"process{number}", STAGES[stages], {"stages": str(stages), "executor": "process", **options}
        )
    limits = ["--limit", str(LIMIT), "--max-new-tokens", str(NEW_TOKENS), "--repeats", str(REPEATS)]
    spdbench("run", "quick", *words, *limits, "--trace", "--results", str(folder))


def _pipeline(label: str, drafter: str, options: dict[str, str]) -> Iterator[str]:
    yield from ("-b", f"{label}=spd", "--drafter", f"{label}={drafter}")
    for name, value in options.items():
        yield from ("-o", f"{label}.{name}={value}")


def spdbench(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "spdbench", *words], check=True, stdout=sys.stderr, cwd=ROOT)


def here(folder: Path) -> Iterator[str | Regime]:
    """What was measured on this machine."""
    results = read_results(sorted(folder.glob("*__*.json")))
    by_label = {each.label: each for each in results}
    head, profile = results[0].head, read_profile(folder / PROFILE)
    cores, cpu = int(head.environment.get("cores") or 1), head.environment.get("cpu")
    yield ""
    yield f"Machine: {cpu}, {cores} cores; {head.model.id} in {head.model.dtype}, greedy, {head.suite.num_prompts}"
    yield f"prompts of `{head.suite.name}`, up to {head.decoding.max_new_tokens} tokens, {REPEATS} repeats. Other"
    yield f"programs took {_others(results):.0%} of the cores' time meanwhile."
    pipelines = [by_label[f"process{number}"] for number in range(len(IN_PROCESSES))]
    hosts_s = {len(each.stages): each.host_s for each in map(traced_parts, pipelines)}
    yield ""
    yield "## Stages in processes"
    yield ""
    yield "The times of stages, heads, drafts and messages are drawn from the spans of the run, and the controller's"
    yield "time between two parts is their mean distance; so this checks the schedule: fill, flush, overlap, waits."
    yield "With more processes than cores, spans are longer the more stages are at work (the first of two"
    yield "next to a drafter: 4 ms alone, 7.5 with all at work), and the draws do not know how many are."
    yield ""
    yield "The first projection of the run of 2026-11-29 took the controller's time from the profile, which times the"
    yield f"schedule alone (8 us), and was 6 to 11 % too fast. Here the spans say {1e3 * min(hosts_s.values()):.1f} to"
    yield f"{1e3 * max(hosts_s.values()):.1f} ms."
    traced = [in_processes(*each, cores) for each in zip(IN_PROCESSES, pipelines, strict=True)]
    yield Regime("stages in processes, times of spans", "tokens/s", traced)
    yield ""
    yield "The same from what every result holds, as `spdbench project` reads it: the means of the parts, and one"
    yield "scatter for all of them, by which the slowest stage took what it took on average."
    means = [without_spans(*each) for each in zip(IN_PROCESSES, pipelines, strict=True)]
    yield Regime("stages in processes, means of the result", "tokens/s", means)
    yield ""
    yield "## Stages in processes that mostly sleep"
    yield ""
    yield "The same engine, with layers and drafts that sleep several times as long as they compute, so that every"
    yield "stage has a core when it needs one, whatever their number: the check of the simulated schedule by itself."
    yield f"Layers sleep {1e3 * LAYER_S:.0f} ms each, drafts {1e3 * DRAFT_S:.0f} ms."
    yield Regime("stages that mostly sleep", "tokens/s", list(sleeping(folder)))
    yield ""
    yield "## Stages stepped in one process"
    yield ""
    yield "One device runs all stages one after another. A layer and the head take what vanilla took in the same run; a"
    yield "draft takes what the stored profile says, scaled by how much slower or faster vanilla was than it, and the"
    yield "controller what it took with the same drafter and stages in processes (with 6 and 10 stages: 5, as six"
    yield "processes). Nothing waits for anything else, so that times may scatter without an effect. A forward of"
    yield "the rows that branches have takes as much longer than one of one row as in the profile."
    rows = [
        inline(by_label["vanilla"], by_label[f"inline{stages}"], results, profile, hosts_s[min(stages, max(hosts_s))])
        for stages in STAGES
    ]
    yield Regime("stages stepped in one process", "tokens/s", rows)


def _others(results: Sequence[LoadedResult]) -> float:
    """The share of the cores' time that other programs took while requests were timed."""
    totals = np.sum([each.runs.total(each.runs.answered) for each in results], axis=0)
    return float(totals[COLUMN["others_core_s"]] / totals[COLUMN["watched_core_s"]])


def in_processes(name: str, result: LoadedResult, cores: int) -> Compared:
    parts = traced_parts(result)
    processes = parts.num_stages + (parts.devices[-1] != 0)
    remark = "a core each" if processes <= cores else f"{processes} processes on {cores} cores"
    return replace(compared(f"{name}, {_drafter(result)}", result, parts, remark), own_core=processes <= cores)


def without_spans(name: str, result: LoadedResult) -> Compared:
    """With the parts' means and the scatter that a result without spans has."""
    counts = [count for count in result.head.backend.stage_layers if count]
    options, layer = IN_PROCESSES[name][1], part_seconds(result, "layer") or 0.0
    own = "drafting" not in options
    factors = lognormal_factors(stage_sigma(result))
    parts = Parts(
        stages=tuple(count * layer for count in counts),
        head_s=part_seconds(result, "head") or 0.0,
        draft_s=part_seconds(result, "draft") or 0.0,
        verify_s=part_seconds(result, "verify") or 0.0,
        host_s=host_seconds(result),
        message_s=0.0,
        devices=(*range(len(counts)), len(counts) if own else 0),
        start_s=start_seconds(result),
        drafters_head=1.0 if options.get("head") == "drafter" else 0.0,
        abort_s=layer / 2 if own else 0.0,
        scatter=Scatter(factors, factors, factors),
    )
    return compared(f"{name}, {_drafter(result)}", result, parts)


class Slept(NamedTuple):
    """Requests to a pipeline that mostly sleeps: layers by stage, seconds of decoding in all; verdicts, spans."""

    counts: list[int]
    seconds: float
    verdicts: list[list[int]]
    traced: list[Traced]


def measure_sleeping(folder: Path) -> None:
    """Pipelines in processes whose parts mostly sleep, into `sleeping.json`."""
    target = load_target("smollm2", "bfloat16", "cpu")
    requests = [
        GenerationRequest(tuple(each), (), NEW_TOKENS, Sampling(), 0, frozenset())
        for each in prompt_ids(target).values()
    ]
    found = []
    for stages in SLEEPING_STAGES:
        backend = sleeping_pipeline(target, stages, SLEEPING_DRAFTER, LAYER_S, DRAFT_S)
        try:
            found.append(_measure_sleeping(backend, requests))
        finally:
            backend.close()
    (folder / SLEEPING).write_text(json.dumps(found))


def _measure_sleeping(backend: SleepingSPD, requests: Sequence[GenerationRequest]) -> Slept:
    found = Slept(list(backend.describe().stage_layers), 0.0, [], [])
    for request in requests:
        backend.prepare(request)
        measured = measure_request(backend, request)
        first_ns, last_ns = (measured.start_ns + measured.steps.t_ns[at] for at in (0, -1))
        found.traced.append(Traced(backend.spans(), first_ns, last_ns))
        columns = list(zip(measured.steps.emitted, measured.steps.accepted, strict=True))[1:]
        found.verdicts.append([int(accepted > 0) for new, accepted in columns if new])
        found = found._replace(seconds=found.seconds + (last_ns - first_ns) / 1e9)
    return found


def sleeping(folder: Path) -> Iterator[Compared]:
    for row in json.loads((folder / SLEEPING).read_text()):
        found = Slept(*row)
        traced = [Traced([Span(*span) for span in spans], *window) for spans, *window in found.traced]
        parts = parts_of(traced, found.counts, reads_states=False)
        stretch, tokens = Stretch(parts), sum(map(len, found.verdicts))
        rate = tokens / sum(request_seconds(stretch, each) for each in found.verdicts)
        remark = f"stages of {1e3 * parts.slowest_s:.0f} ms, drafts of {1e3 * parts.draft_s:.0f} ms"
        yield Compared(f"{len(found.counts)} stages", tokens / found.seconds, rate, remark, own_core=True)


def inline(
    vanilla: LoadedResult, result: LoadedResult, results: Sequence[LoadedResult], profile: Profile, host_s: float
) -> Compared:
    recorded = sort_results([each for each in results if each in (vanilla, result) or each.label == "process2"])
    costs, profiled = RecordedCosts(recorded), ProfileCosts(profile, recorded)
    layer, head = costs.layer_s(1) or 0.0, costs.head_s(1) or 0.0
    slower = (recorded.num_layers * layer + head) / (
        recorded.num_layers * (profiled.layer_s(1) or 0.0) + (profiled.head_s(1) or 0.0)
    )
    counts = result.head.backend.stage_layers
    growth = profiled.growth(rows_a_stage(result))
    parts = Parts(
        stages=tuple(count * layer * growth for count in counts),
        head_s=head * growth,
        draft_s=(profiled.pipeline_draft_s(result, len(counts)) or 0.0) * slower,
        verify_s=profiled.verify_s(result),
        host_s=host_s,
        message_s=0.0,
        devices=(0,) * (len(counts) + 1),
        start_s=start_seconds(result),
        in_step=True,
    )
    return compared(f"{len(counts)} stages, {_drafter(result)}", result, parts)


def compared(name: str, result: LoadedResult, parts: Parts, remark: str = "") -> Compared:
    return Compared(name, result.metrics["decode_tokens_per_s"], replay(Stretch(parts), verdicts(result))[0], remark)


def _drafter(result: LoadedResult) -> str:
    return result.head.drafter.id if result.head.drafter else "no drafter"


if __name__ == "__main__":
    main()
