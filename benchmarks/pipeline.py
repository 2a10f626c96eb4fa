"""SPD's stage processes: how much longer a cycle takes than the stages' own work.

Why: a pipeline is as fast as its slowest stage at best; messages, waiting and Python come on top, and on one machine
the stages share its memory.
Regimes: batch 1, greedy, the embedded model, drafts that are always right, so that the pipeline is full; several cuts
and transports. Sides take turns: vanilla with all threads; the pipeline; its stages looping in processes of the same
kind without any messages, all at once and each alone.
Output: a table a dtype, a row a setting, medians over the rounds: ms a token of vanilla and of the pipeline; a full
cycle's ms, its control time (what is not its slowest stage), its efficiency; the cycle over the slowest of the stages
at work without messages; each stage's busy time over its time there; the largest cause of idle time. Then the workers'
memory over the model's bytes, less the base of a worker without its layers; then targets.

    python -m benchmarks.pipeline [--rounds 5] [--tokens 96] [--cuts even auto 16,14] [--transports pipe gloo]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.shared import sides
from benchmarks.shared.sides import Goal, Report, ratio, show, spread, times
from benchmarks.shared.stage_loop import StageLoops, held_bytes
from benchmarks.shared.workload import prompt_ids
from spdbench.backend import BackendContext, find_backend, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.judge.metrics.bubble import full_cycles, lane_time, read_spans
from spdbench.measure.clock import measure
from spdbench.models.target import Target, load_target
from spdbench.pipeline.processes.process import ProcessPipeline
from spdbench.types import GenerationRequest, Sampling
from spdbench_backends.spd.pipelined import Pipelined

HEADERS = (
    "setting", "layers", "vanilla, ms", "spd, ms", "spd over vanilla", "cycle, ms", "control, ms", "efficiency",
    "cycle over stages", "stages, ms", "alone, ms", "busy over stages", "idle", "same ids",
)  # fmt: skip


class Turn(NamedTuple):
    """One answer's decoding: seconds a token of vanilla and of the pipeline, seconds of a full cycle and of its slowest
    stage, seconds that each stage works on a token, shares of the lanes' time; and the stages without messages."""

    vanilla_s: float
    spd_s: float
    cycle_s: float
    stage_s: float
    busy_s: list[float]
    shares: Mapping[str, float]
    same: bool
    together_s: list[float]
    alone_s: list[float]


def main() -> None:
    arguments = sides.parser(__doc__, rounds=5, tokens=96)
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--cuts", nargs="+", default=["even", "auto"], help="even, auto, or layers such as 16,14")
    arguments.add_argument("--stages", type=int, default=2)
    arguments.add_argument("--transports", nargs="+", default=["pipe", "gloo"])
    sides.run("pipeline", arguments.parse_args(), measure_all)


def measure_all(chosen: argparse.Namespace, report: Report) -> None:
    for dtype in chosen.dtypes:
        target = load_target(chosen.model, dtype, "cpu")
        ids = prompt_ids(target)["prose"]
        request = GenerationRequest(tuple(ids), (), chosen.tokens, Sampling(), 0, frozenset())
        rows = []
        for cut in chosen.cuts:
            for transport in chosen.transports:
                backend = start(target, cut, transport, chosen)
                try:
                    rows.append(setting(backend, target, request, chosen.rounds, f"{cut}, {transport}"))
                finally:
                    backend.close()
        print(f"{dtype}, {chosen.stages} stages, {chosen.threads} threads, {chosen.tokens} tokens:")
        show(HEADERS, [row["cells"] for row in rows])
        report.tables[dtype] = rows
        best = min(rows, key=lambda row: row["cycle_s"])
        report.goals += goals(best, dtype)


def start(target: Target, cut: str, transport: str, chosen: argparse.Namespace) -> Pipelined:
    options = {"stages": str(chosen.stages), "transport": transport, "executor": "process"}
    if cut != "even":
        options["stage_layers"] = cut
    cls = find_backend("spd")
    context = BackendContext("spd", target, "oracle:1.0", ("cpu",), chosen.threads, seed=0)
    backend = cls(parse_options("spd", cls.Options, options), context)
    assert isinstance(backend, Pipelined)
    backend.load()
    return backend


def setting(backend: Pipelined, target: Target, request: GenerationRequest, rounds: int, name: str) -> dict[str, Any]:
    pipeline = backend._pipeline
    assert isinstance(pipeline, ProcessPipeline)
    with StageLoops(pipeline._specs) as loops:
        turn(backend, target, request, loops)  # warm-up
        turns = [turn(backend, target, request, loops) for _ in range(rounds)]
        base = statistics.mean(loops.base_bytes)
    held = sum(held_bytes(pid, target.files.directory) for pid in pipeline._workers.process_ids)
    memory = (held - base * len(pipeline._specs)) / target.num_bytes
    slowest = [max(each.together_s) for each in turns]
    over = ratio([each.cycle_s for each in turns], slowest)
    busy = [statistics.median(e.busy_s[s] / e.together_s[s] for e in turns) for s in range(len(pipeline._specs))]
    cycle, control = spread(e.cycle_s for e in turns), spread(e.cycle_s - e.stage_s for e in turns)
    efficiency = spread(e.stage_s / e.cycle_s for e in turns)
    shares = {key: statistics.median(e.shares[key] for e in turns) for key in turns[0].shares}
    cause = max((key for key in shares if key not in ("useful", "wasted")), key=shares.__getitem__)
    layers = ",".join(map(str, backend.describe().stage_layers))
    print(f"{name}: workers hold {held / 1e6:.0f} MB, a base of {base / 1e6:.0f} MB each; {memory:.2f} of the model's")
    cells = (
        name, layers, _ms(e.vanilla_s for e in turns), _ms(e.spd_s for e in turns),
        times(ratio([e.vanilla_s for e in turns], [e.spd_s for e in turns])), f"{cycle.median * 1e3:.2f}",
        f"{control.median * 1e3:.2f}", f"{efficiency.median:.3f}", times(over),
        " ".join(_ms(e.together_s[s] for e in turns) for s in range(len(busy))),
        " ".join(_ms(e.alone_s[s] for e in turns) for s in range(len(busy))),
        " ".join(f"{each:.2f}" for each in busy), f"{cause} {shares[cause]:.1%}", str(all(e.same for e in turns)),
    )  # fmt: skip
    return {
        "setting": name,
        "cells": cells,
        "cycle_s": cycle.median,
        "control_s": control.median,
        "efficiency": efficiency.median,
        "cycle_over_stages": over.median,
        "busy_over_stages": busy,
        "memory": memory,
        "base_bytes": base,
        "shares": shares,
        "turns": [each._asdict() for each in turns],
    }


def turn(backend: Pipelined, target: Target, request: GenerationRequest, loops: StageLoops) -> Turn:
    tokens = decode(target.decoder, request)
    expected = [next(tokens)]
    first = time.perf_counter()
    expected += tokens
    vanilla_s = (time.perf_counter() - first) / (len(expected) - 1)
    backend.prepare(request)
    measured = measure(backend, request)
    spans, lanes = backend.spans(), backend.describe().lanes
    ends = [measured.start_ns + at for at in measured.steps.t_ns]
    table = read_spans(spans, lanes)
    full = full_cycles(table, ends)
    assert full is not None
    busy = [
        sum(s.end_ns - s.start_ns for s in spans if s.lane == lane and s.kind in ("target", "head"))
        / sum(s.lane == lane and s.kind == "target" for s in spans)
        / 1e9
        for lane in range(lanes)
    ]
    position = len(request.prompt_ids)
    return Turn(
        vanilla_s,
        measured.decode_s / (len(measured.output_ids) - 1),
        full.wall_s / full.num,
        full.stage_s / full.num,
        busy,
        lane_time(table, ends).shares().model_dump(),
        list(measured.output_ids) == expected,
        loops.together(position, request.max_new_tokens),
        loops.alone(position, request.max_new_tokens),
    )


def goals(row: Mapping[str, Any], dtype: str) -> list[Goal]:
    where = f"{dtype}, {row['setting']}"
    off = max(abs(share - 1) for share in row["busy_over_stages"])
    return [
        Goal(f"control time a cycle in ms, {where}", row["control_s"] * 1e3, at_most=0.2),
        Goal(f"cycle efficiency, {where}", row["efficiency"], at_least=0.97),
        Goal(f"cycle over stages without messages, {where}", row["cycle_over_stages"], at_most=1.1),
        Goal(f"workers' memory over the model's bytes, {where}", row["memory"], at_most=1.15),
        Goal(f"unexplained share, {where}", row["shares"]["unattributed"], at_most=0.1),
        Goal(f"busy time off an independent timing by, {where}", off, at_most=0.05),
    ]


def _ms(seconds: Any) -> str:
    return f"{statistics.median(seconds) * 1e3:.2f}"


if __name__ == "__main__":
    main()
