"""Requests of load generators, whichever wrote them down, as the runs of results."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdbench.errors import InputError
from spdbench.judge.results.schema import Drafts, Run, Steps

MAX_TEMPERATURE = 1e3
MAX_TIME_S = 2.0**33
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What reading a value of another type or size raises."""


@dataclass(frozen=True)
class Export:
    """The requests that a `tool` of some version made with one load. `None` for what the export does not say.

    `num_odd_drafts` of them have counts of drafts that cannot be, and were dropped.
    """

    tool: str
    version: str
    model: str
    at_once: int
    created_s: float
    max_new_tokens: int | None
    temperature: float | None
    runs: tuple[Run, ...]
    num_odd_drafts: int = 0

    @property
    def prompts_sha256(self) -> str:
        """The hash of all that was asked, in any order."""
        return _sha256(json.dumps(sorted({run.prompt_sha256 for run in self.runs})))


@dataclass(frozen=True)
class Request:
    """One request; times in seconds, the first token's and the last's since it was sent."""

    asked: str
    turn: int
    num_prompt_tokens: int
    num_new_tokens: int
    first_s: float
    last_s: float
    text: str | None = None
    error: str | None = None
    drafts: Drafts | None = None
    odd_drafts: bool = False
    """Its counts of drafts contradict each other or its tokens, and are dropped."""


def runs_of(requests: Sequence[Request]) -> tuple[Run, ...]:
    """A run for each request; one that is asked again is a repeat."""
    seen = Counter[tuple[str, int]]()
    found = []
    for request in requests:
        sha256 = _sha256(request.asked)
        key = (sha256, request.turn)
        found.append(_run(request, sha256, seen[key]))
        seen[key] += 1
    return tuple(found)


def _run(request: Request, sha256: str, repeat: int) -> Run:
    first_ns, last_ns = (round(seconds * 1e9) for seconds in (request.first_s, request.last_s))
    tokens, columns = request.num_new_tokens, [request.num_new_tokens > 0, request.num_new_tokens > 1]
    emitted = [1, tokens - 1][: sum(columns)] if request.error is None else []
    zeros = [0] * len(emitted)
    failed = request.error is not None or not emitted
    return Run(
        prompt_id=f"p-{sha256[:10]}",
        category="all",
        turn=request.turn,
        repeat=repeat,
        prompt_sha256=sha256,
        num_prompt_tokens=request.num_prompt_tokens,
        num_new_tokens=0 if failed else tokens,
        finish_reason="error" if failed else "eos",
        error=text_of(request.error or "no token came") if failed else None,
        output_ids=[],
        ttft_s=None if failed else request.first_s,
        decode_s=None if failed else (request.last_s - request.first_s if tokens > 1 else 0.0),
        steps=Steps(
            t_ns=[first_ns, last_ns][: len(emitted)],
            emitted=emitted,
            drafted=zeros,
            judged=zeros,
            accepted=zeros,
            forwards=[0.0] * len(emitted),
        ),
        text=None if request.text is None else text_of(request.text),
        drafts=request.drafts,
    )


def checked(read: Callable[[Any], Request], row: Any, where: str) -> Request:
    """The request in `row`, whose place is `where`.

    Raises:
        InputError: it is damaged, or its numbers cannot be.
    """
    try:
        found = read(row)
        if found.error is None and not (0 <= found.first_s <= found.last_s < 1e6 and 0 <= found.num_new_tokens < 2**20):
            raise ValueError("times or tokens that cannot be")
        return found
    except DAMAGED as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: cannot be read: {what}") from None


def field_of(holder: Any, name: str, where: str) -> Mapping[str, Any]:
    """The object `name` in `holder`. Raises `InputError` where there is none."""
    found = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(found, Mapping):
        raise InputError(f"{where}.{name}: is missing, or no object")
    return found


def list_of(holder: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """The list `name` in `holder`. Raises `InputError` where there is none."""
    found = holder.get(name)
    if not isinstance(found, list):
        raise InputError(f"{where}.{name}: is missing, or no list")
    return found


def whole(value: Any) -> int:
    """A count, which may be written as text. Raises one of `DAMAGED` where `value` is none."""
    number = int(value)
    if isinstance(value, bool) or number != float(value):
        raise ValueError(f"{value!r:.40} is no count")
    return number


def load_of(value: Any) -> int:
    """How many requests at once `value` is; 1 where it is no such number."""
    return value if isinstance(value, int) and 1 <= value <= 2**20 else 1


def most_at_once(times: Sequence[tuple[float, float]]) -> int:
    """The most requests that were under way at one time, by when each began and ended."""
    events = sorted([(start, 1) for start, _ in times] + [(end, -1) for _, end in times])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return max(1, most)


def limit_of(bodies: Iterable[Mapping[str, Any]]) -> int | None:
    """The most new tokens that any request asked for."""
    values = [body.get("max_completion_tokens") or body.get("max_tokens") for body in bodies]
    return max((value for value in values if isinstance(value, int) and value > 0), default=None)


def temperature_of(bodies: Iterable[Mapping[str, Any]]) -> float | None:
    """The one temperature that all requests asked for."""
    values = [body.get("temperature") for body in bodies]
    first = values[0] if values and values.count(values[0]) == len(values) else None
    return float(first) if isinstance(first, int | float) and 0 <= first < MAX_TEMPERATURE else None


def text_of(value: object) -> str:
    """`value` as text that can be written as UTF-8."""
    return str(value).encode(errors="replace").decode()


def time_of(value: Any) -> float:
    """A time of the clock in seconds since 1970; 0 where `value` is none."""
    is_time = isinstance(value, int | float) and 0 <= value < MAX_TIME_S
    return float(value) if is_time else 0.0


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
