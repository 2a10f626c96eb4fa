"""SPD with branches in flight: what is lost to a rejection, and what early re-draft and several drafts win back.

Why: a rejection empties the pipe. A row that has become deeper may know better than the first draft behind it
(`redraft`), and the second choice may be right where the first was wrong (`draft_top_k`); rows cost time as well.
Regimes: batch 1, greedy, the embedded model, trained heads: the shipped one, or `DIR/spd-N` or `DIR/spd` of
`--drafters`; the benchmarks' four prompts, or the first `--limit` questions of a JSONL file (`--prompts`, the first of
their `turns`). Settings take turns prompt by prompt. `inline` shows tokens a cycle; `process` times as well, where
there is a processor a stage.
Output: for each number of stages a table by depth: how often the first choice of a row of that depth is the target's
next token, all in all, and where every choice less deep was wrong, for depths that lie before the verdict; then a table
of settings: verdicts that accept, tokens a cycle, the formula, forwards of the target a cycle, ms a cycle, tokens/s,
whether the ids are vanilla's. The formula is 1 / (mean cycles from a verdict to the next) if every branch lived: 1
where the token is one of the first k, d + 1 where depth d gives it, n where none does, the shares being those of the
first table.

    python -m benchmarks.branches [--stages 2 3] [--drafters DIR] [--prompts FILE --limit 8] [--tokens 64]
                                  [--executor inline] [--dtypes bfloat16]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.shared import sides
from benchmarks.shared.sides import Report, show
from benchmarks.shared.workload import prompt_ids
from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.models.target import Target, load_target
from spdbench.pipeline.schedule import Node
from spdbench.prompts.chat import ChatFormat
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.spd.backend import SPD
from spdbench_backends.spd.branches import BranchingDrafter
from spdbench_backends.spd.head import HeadWeights

SETTINGS: Mapping[str, dict[str, str]] = {
    "plain": {"draft_top_k": "1"},
    "early re-draft": {"draft_top_k": "1", "redraft": "true"},
    "k = 2": {"draft_top_k": "2"},
    "k = 4": {"draft_top_k": "4"},
    "k = 2, early re-draft": {"draft_top_k": "2", "redraft": "true"},
}
FIRST_CHOICES = 4
HEADERS = (
    "setting", "accepted", "tokens a cycle", "formula", "forwards a cycle", "ms a cycle", "tokens/s", "same ids",
)  # fmt: skip


class Rank(NamedTuple):
    """Of the target's next token among a row's choices, from 0; None if it is none of the first."""

    depth: int
    rank: int | None


class LoggingDrafter(BranchingDrafter):
    """Notes the first choices of every row of every depth, by node."""

    def __init__(self, weights: HeadWeights, max_rows: int) -> None:
        super().__init__(weights, top_k=1, max_rows=max_rows, redraft=True)
        self.choices: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)  # by node: depth, tokens
        self.nodes: dict[int, Node] = {}

    def _logits(self, in_flight: Sequence[tuple[Node, int]], rows: Sequence[int]) -> Tensor:
        logits_RU = super()._logits(in_flight, rows)
        best_RC = logits_RU.topk(FIRST_CHOICES, dim=-1).indices
        tokens_RC = self._weights.vocabulary.to_target(best_RC)
        for row, tokens in zip(rows, tokens_RC.tolist(), strict=True):
            node, depth = in_flight[row]
            self.nodes[node.id] = node
            self.choices[node.id].append((depth, tokens))
        return logits_RU

    def ranks(self, answer: Mapping[int, int]) -> Iterator[list[Rank]]:
        """For each token of the answer, from the rows of the token before it, the deepest last; `answer` is by
        position. Rows of tokens that were dropped do not count."""
        for number, noted in self.choices.items():
            node: Node | None = self.nodes[number]
            assert node is not None
            right = answer.get(node.position + 1)
            while node is not None and answer.get(node.position) == node.token_id:
                node = None if node.parent is None else self.nodes.get(node.parent)
            if right is not None and node is None:
                yield [Rank(depth, tokens.index(right) if right in tokens else None) for depth, tokens in noted]


@dataclass
class Measured:
    """A setting over all prompts."""

    steps: list[Step]
    num_stages: int
    seconds: float = 0.0
    same: bool = True

    def cells(self, name: str, formula: float | None) -> tuple[str, ...]:
        tokens, cycles = sum(len(step.token_ids) for step in self.steps), len(self.steps)
        accepted = sum(step.accepted for step in self.steps) / tokens
        rows = sum(step.forwards for step in self.steps) / cycles
        return (
            name, f"{accepted:.3f}", f"{tokens / cycles:.3f}", "" if formula is None else f"{formula:.3f}",
            f"{rows:.2f}", f"{self.seconds / cycles * 1e3:.2f}", f"{tokens / self.seconds:.1f}", str(self.same),
        )  # fmt: skip


def drafter_in(folder: Path, num_stages: int) -> Path:
    own = folder / f"spd-{num_stages}"
    return own if own.exists() else folder / "spd"


def main() -> None:
    arguments = sides.parser(__doc__, rounds=1, tokens=64)
    arguments.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    arguments.add_argument("--drafters", type=Path, help="a folder of spd-N or spd; default: the drafter that ships")
    arguments.add_argument("--prompts", type=Path, help="a JSONL file of questions; default: four prompts")
    arguments.add_argument("--limit", type=int, default=8, help="questions of --prompts (default 8)")
    arguments.add_argument("--executor", choices=("inline", "process"), default="inline")
    arguments.set_defaults(dtypes=["bfloat16"])
    sides.run("branches", arguments.parse_args(), measure_all)


def measure_all(chosen: argparse.Namespace, report: Report) -> None:
    for dtype in chosen.dtypes:
        target = load_target("smollm2", dtype, "cpu")
        requests = [
            GenerationRequest(tuple(ids), (), chosen.tokens, Sampling(), 0, frozenset())
            for ids in prompts(target, chosen.prompts, chosen.limit)
        ]
        answers = [list(decode(target.decoder, request)) for request in requests]
        for num_stages in chosen.stages:
            where = (
                f"{dtype}, {num_stages} stages, {chosen.executor}, {len(requests)} prompts of {chosen.tokens} tokens"
            )
            ranks = logged(target, num_stages, chosen, requests, answers)
            depths = by_depth(ranks, max(1, num_stages - 1))
            print(f"{where}:\n")
            show(("depth", "right", "right where all less deep were wrong"), depths)
            rows = [
                result.cells(name, formula(ranks, num_stages, SETTINGS[name]))
                for name, result in measured(target, num_stages, chosen, requests, answers).items()
            ]
            show(HEADERS, rows)
            report.tables[where] = [dict(zip(HEADERS, row, strict=True)) for row in rows]
            report.tables[f"{where}, by depth"] = [
                dict(zip(("depth", "right", "of the rest"), row, strict=True)) for row in depths
            ]


def prompts(target: Target, file: Path | None, limit: int) -> list[tuple[int, ...]]:
    if file is None:
        return list(prompt_ids(target).values())
    chat, lines = ChatFormat(target.tokenizer), file.read_text("utf-8").splitlines()[:limit]
    return [tuple(chat.encode([{"role": "user", "content": json.loads(line)["turns"][0]}])) for line in lines]


def started(target: Target, num_stages: int, chosen: argparse.Namespace, options: Mapping[str, str]) -> SPD:
    drafter = str(drafter_in(chosen.drafters, num_stages)) if chosen.drafters else "auto"
    words = {"stages": str(num_stages), "executor": chosen.executor, **options}
    context = BackendContext("spd", target, drafter, ("cpu",), chosen.threads, seed=0)
    backend = SPD(parse_options("spd", SPD.Options, words), context)
    backend.load()
    return backend


def logged(
    target: Target,
    num_stages: int,
    chosen: argparse.Namespace,
    requests: Sequence[GenerationRequest],
    answers: Sequence[Sequence[int]],
) -> list[dict[int, int | None]]:
    """By token of all answers, and by depth: the right token's rank."""
    inline = argparse.Namespace(**{**vars(chosen), "executor": "inline"})
    backend = started(target, num_stages, inline, SETTINGS["early re-draft"])
    head, found = backend._head, []
    assert isinstance(head, HeadWeights)
    for request, answer in zip(requests, answers, strict=True):
        drafter = LoggingDrafter(head, backend._max_rows)
        backend._new_drafter = lambda _, drafter=drafter: drafter  # type: ignore[method-assign, misc]
        list(backend.generate(request))
        by_position = dict(enumerate(answer, len(request.prompt_ids)))
        found += [dict(ranks) for ranks in drafter.ranks(by_position)]
    backend.close()
    return found


def by_depth(ranks: Sequence[Mapping[int, int | None]], num_depths: int) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    rest = list(ranks)
    for depth in range(num_depths):
        right = [token.get(depth) == 0 for token in ranks if depth in token]
        reached = [token for token in rest if depth in token]
        late = [token[depth] == 0 for token in reached]
        lines.append((str(depth), _share(right), _share(late)))
        rest = [token for token in reached if token[depth] != 0]
    return lines


def formula(ranks: Sequence[Mapping[int, int | None]], num_stages: int, options: Mapping[str, str]) -> float | None:
    """Tokens a cycle if every branch lived."""
    first, again = int(options.get("draft_top_k", "1")), range(1, num_stages - 1) if "redraft" in options else range(0)
    cycles = []
    for token in ranks:
        rank = token.get(0)
        late = next((depth + 1 for depth in again if token.get(depth) == 0), num_stages)
        cycles.append(1 if rank is not None and rank < first else late)
    return len(cycles) / sum(cycles) if cycles else None


def measured(
    target: Target,
    num_stages: int,
    chosen: argparse.Namespace,
    requests: Sequence[GenerationRequest],
    answers: Sequence[Sequence[int]],
) -> dict[str, Measured]:
    """Every setting over all prompts, prompt by prompt in turn."""
    backends = {name: started(target, num_stages, chosen, options) for name, options in SETTINGS.items()}
    found = {name: Measured([], num_stages) for name in SETTINGS}
    try:
        for backend in backends.values():  # warm-up
            list(backend.generate(requests[0]))
        for _ in range(chosen.rounds):
            for request, answer in zip(requests, answers, strict=True):
                for name, backend in backends.items():
                    steps = backend.generate(request)
                    taken = [next(iter(steps))]
                    began = time.perf_counter()
                    taken += steps
                    found[name].seconds += time.perf_counter() - began
                    found[name].steps += taken[1:]
                    found[name].same &= [token for step in taken for token in step.token_ids] == answer
    finally:
        for backend in backends.values():
            backend.close()
    return found


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):.3f} of {len(hits)}" if hits else ""


if __name__ == "__main__":
    main()
