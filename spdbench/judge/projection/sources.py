"""Which recorded pipelines stand for which number of stages, and what each result is called.

Results of one backend whose options are equal but for the stages stand for each other: a number of stages that none of
them has is replayed from the nearest one. Another option, or another synthetic drafter, makes another way to decode,
which is projected next to the first under its own label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from spdbench.judge.loaded import LoadedResult
from spdbench.judge.projection.recorded import Recorded
from spdbench.profiles.profile import nearest

OF_STAGES = {"stages", "stage_layers"}


def labels(results: Sequence[LoadedResult]) -> dict[LoadedResult, str]:
    """A name for each result that no other has: its label, from the second of a label on with a number, `spd#2`."""
    found, seen = {}, Counter[str]()
    for result in results:
        seen[result.label] += 1
        found[result] = result.label if seen[result.label] == 1 else f"{result.label}#{seen[result.label]}"
    return found


def replayed(recorded: Recorded, wanted: int) -> Iterator[tuple[str, LoadedResult]]:
    """For `wanted` stages the results whose verdicts are replayed, with what their rows are called: after the backend
    where all of its results stand for each other, else by label."""
    names, families = labels(recorded.all), _families(recorded)
    kinds = Counter(results[0].head.backend.name for results in families)
    for results in families:
        numbers = [each.head.backend.num_stages for each in results]
        best, backend = nearest(numbers, wanted), results[0].head.backend.name
        chosen = [each for each, number in zip(results, numbers, strict=True) if number == best]
        common = backend if kinds[backend] == 1 else names[results[0]]
        for result in chosen:
            yield (common if len(chosen) == 1 else names[result]), result


def _families(recorded: Recorded) -> list[list[LoadedResult]]:
    """Pipelines that differ in nothing but their stages, or in drafters that were trained for these."""
    found: dict[str, list[LoadedResult]] = {}
    for result in recorded.pipelines:
        backend, drafter = result.head.backend, result.head.drafter
        options = sorted((key, repr(value)) for key, value in backend.options.items() if key not in OF_STAGES)
        made_up = drafter.id if drafter is not None and (drafter.synthetic or drafter.trained_tokens == 0) else None
        found.setdefault(repr((backend.name, options, made_up)), []).append(result)
    return list(found.values())
