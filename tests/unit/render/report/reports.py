"""A comparison of every kind of method with numbers chosen by hand, and what models and users may write into it."""

from __future__ import annotations

from spdbench.judge.comparison.compare import Table, compare
from spdbench.judge.loaded import load
from spdbench.judge.results.kept import DraftColumns, SpanColumns
from spdbench.judge.results.lanes import BubbleParts
from spdbench.judge.results.schema import BackendRecord, Result, Run
from spdbench.types import Drafted, Span
from tests.builders import (
    MS,
    TRAINED,
    chunk_steps,
    make_backend,
    make_result,
    make_run,
    pipeline_steps,
    vanilla_steps,
)

CATEGORIES = ("math", "writing")
HOSTILE = (
    '</script><script>window.pwned=1</script><img src="http://evil.invalid/x" onerror="window.pwned=1">&amp;'
    "\x1b[31m\u202e"
)
"""Markup, a script, a picture from elsewhere, a terminal's escape sequence, and a mark that turns text around."""
WRONG = 999
"""The id of every rejected draft."""
SPANS = BubbleParts(
    useful=0.6, wasted=0.1, fill=0.1, verify=0.02, draft=0.08, imbalance=0.04, host=0.05, unattributed=0.01
)


def _runs(kind: str, num_prompts: int, text: str | None, name: str) -> list[Run]:
    runs = []
    for number in range(num_prompts):
        pace = 1 + number % 5 / 20
        steps = {
            "vanilla": vanilla_steps(17, step_ns=round(10 * MS * pace)),
            "eagle": chunk_steps([1, 4, 1, 4, 3, 4], step_ns=round(18 * MS * pace)),
            "medusa": chunk_steps([1, *[2] * 8], step_ns=round(20 * MS * (1 + number % 3 / 10))),
            "spd": pipeline_steps([True, True, False, True, True, False, True, True], 3, step_ns=9 * MS),
        }[kind]
        runs.append(
            make_run(
                steps,
                prompt=f"{name}{number}",
                category=CATEGORIES[number % 2],
                bubble=None if kind == "vanilla" else SPANS,
                text=text,
            )
        )
    return runs


def results(
    num_prompts: int = 12, *, text: str | None = None, label: str = "eagle", prompt: str = "p", detailed: bool = False
) -> dict[str, Result]:
    """Vanilla, EAGLE under `label`, Medusa and SPD, by file name; `detailed` ones with spans and drafted tokens."""
    made = {
        "vanilla": make_backend(),
        "eagle": make_backend("draft_verify", label=label),
        "medusa": make_backend("draft_verify", label="medusa", lossy=True),
        "spd": make_backend("pipeline"),
    }
    found = {}
    for kind, backend in made.items():
        runs = _runs(kind, num_prompts, text, prompt)
        if detailed and kind != "vanilla":
            runs = [with_details(run, backend) for run in runs]
        drafter = None if kind == "vanilla" else TRAINED
        found[f"quick__{kind}.json"] = make_result(runs, backend, drafter=drafter)
    return found


def with_details(run: Run, backend: BackendRecord) -> Run:
    """The run with a chain of drafts a verdict, whose rejected ones are `WRONG`, and a span a lane and step."""
    steps, drafts, spans, done = run.steps, [], [], 0
    for number, emitted in enumerate(steps.emitted):
        accepted, judged = steps.accepted[number], steps.judged[number]
        chain = [*run.output_ids[done : done + accepted], *[WRONG] * (judged - accepted)]
        drafts.append(Drafted(tuple(chain), tuple(range(-1, len(chain) - 1))))
        start = steps.t_ns[number - 1] if number else 0
        for lane in range(backend.lanes):
            at = run.num_prompt_tokens + done - 1
            spans.append(Span(lane, "target", start, steps.t_ns[number], at, judged == accepted, number - 1))
        done += emitted
    return run.model_copy(
        update={"drafted_tokens": DraftColumns.of(drafts), "spans": SpanColumns.of(spans[backend.lanes :], 0)}
    )


def table(found: dict[str, Result]) -> Table:
    [only] = compare([load(result, file) for file, result in found.items()], by_category=True)
    return only
