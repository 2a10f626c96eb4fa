"""Requests that show faults which an answer alone does not: a drafter's stale state, and an end of sequence inside a
step. They use what every backend has, so they work on any backend that decodes with the target's own layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, islice

from spdbench.backend import Backend, closing_steps
from spdbench.errors import PromptFailedError
from spdbench.judge.audit import Ends, Restarts
from spdbench.judge.results.schema import Run, Steps
from spdbench.types import GenerationRequest, Step

RESTARTS = 3
"""Rounds of an answer that are run again."""
CYCLES_PER_TOKEN = 64
"""Limit on the steps of a request that does not end."""

Verdicts = list[tuple[int, int, int]]
"""Drafted, judged, accepted of consecutive steps that gave a verdict."""


def check_restarts(backend: Backend, request: GenerationRequest, run: Run, found: Restarts) -> None:
    """Runs rounds of `run` again, each after everything before it as a prompt, and compares their verdicts.

    The rounds chosen follow a rejection, after which a drafter has to forget what it did for the rejected tokens. A
    pipeline has to have forgotten all tokens in flight as well, so its verdicts up to the next rejection are compared.
    """
    committed = [*accumulate(run.steps.emitted)]
    after = [step for step in _rejections(run.steps) if _verdicts_after(backend, _rows(run.steps, step + 1))]
    for step in after[:: max(1, len(after) // RESTARTS)][:RESTARTS]:
        expected = _verdicts_after(backend, _rows(run.steps, step + 1))
        known = run.output_ids[: committed[step] - 1]
        again = replace(
            request,
            prompt_ids=(*request.prompt_ids, *known),
            max_new_tokens=request.max_new_tokens - len(known),
        )
        with _steps(backend, again) as steps:
            first = next(steps).token_ids
            if first != (run.output_ids[committed[step] - 1],):
                continue  # rounding turned the token from which the round starts
            verdicts = _verdicts_after(backend, (_of(each) for each in steps))
        found.compared += 1
        found.different += verdicts != expected


def _rejections(steps: Steps) -> list[int]:
    """The steps after prefill in which a draft was rejected."""
    pairs = zip(steps.judged, steps.accepted, strict=True)
    return [number for number, (judged, accepted) in enumerate(pairs) if number and judged > accepted]


def _rows(steps: Steps, start: int) -> Iterator[tuple[int, int, int]]:
    return islice(zip(steps.drafted, steps.judged, steps.accepted, strict=True), start, None)


def _of(step: Step) -> tuple[int, int, int]:
    return step.drafted, step.judged, step.accepted


def _verdicts_after(backend: Backend, rows: Iterator[tuple[int, int, int]]) -> Verdicts:
    """Of a pipeline the verdicts up to a rejection, else those of the next round."""
    found: Verdicts = []
    for row in rows:
        if backend.kind != "pipeline":
            return [row]
        if row[1]:
            found.append(row)
            if row[1] > row[2]:
                break
    return found


def check_end(backend: Backend, request: GenerationRequest, run: Run, found: Ends) -> None:
    """Makes a token in the middle of the answer end the sequence, within a step of several tokens where there is one.

    The same tokens have to come up to it, and no step after that one.
    """
    if (at := _end_in_the_middle(run)) is None:
        return
    answer = run.output_ids[: at + 1]
    again = replace(request, eos_ids=request.eos_ids | {answer[at]})
    ids: list[int] = []
    goes_on = False
    with _steps(backend, again) as steps:
        for step in islice(steps, CYCLES_PER_TOKEN * request.max_new_tokens):
            if goes_on := len(ids) > at:
                break
            ids += step.token_ids
    found.compared += 1
    found.wrong += ids[: at + 1] != answer
    found.overrun += goes_on


def _end_in_the_middle(run: Run) -> int | None:
    """The index of a token that is new in the answer, in a step that goes on after it if there is one."""
    answer = run.output_ids
    starts = [0, *accumulate(run.steps.emitted)]
    inside = [start for start, count in zip(starts, run.steps.emitted, strict=False) if count > 1]
    middle = sorted(range(1, len(answer) - 1), key=lambda index: abs(index - len(answer) // 2))
    for index in (*inside, *middle):
        if 0 < index < len(answer) - 1 and answer.index(answer[index]) == index:
            return index
    return None


def first_tokens(backend: Backend, request: GenerationRequest, count: int) -> Sequence[int]:
    """The first `count` tokens of the answer, which nothing ends earlier.

    Raises:
        PromptFailedError: there are fewer.
    """
    ids: list[int] = []
    with _steps(backend, request) as steps:
        for step in steps:
            ids += step.token_ids
            if len(ids) >= count:
                break
    if len(ids) < count:
        raise PromptFailedError(f"the answer ends after {len(ids)} of {request.max_new_tokens} tokens")
    return ids[:count]


@contextmanager
def _steps(backend: Backend, request: GenerationRequest) -> Iterator[Iterator[Step]]:
    """The steps of a request, which is given up at the end."""
    backend.prepare(request)
    with closing_steps(backend.generate(request)) as steps:
        yield steps
