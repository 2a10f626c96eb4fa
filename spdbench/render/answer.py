"""An answer step by step, with what became of each drafted token, and pictures of the cycles around a rejection.

Signs and colours say the same, so that it reads without colour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from spdbench.console import printable
from spdbench.judge.results.schema import BackendRecord, Run
from spdbench.judge.timeline import (
    LaneSpan,
    StageToken,
    StepTokens,
    lane_spans,
    rejection_to_show,
    stage_tokens,
    step_tokens,
    verdict,
)

Decode = Callable[[Sequence[int]], str]

SIGNS = {
    "accepted": ("[", "]", "green"),
    "rejected": ("~", "~", "red strike"),
    "dropped": ("-", "-", "dim strike"),
    "own": ("", "", "bold"),
}
"""By what became of a token: what stands before it, what behind it, its style."""
CONTEXT_IDS = 4
"""Ids before a token that are decoded with it: many tokenizers drop the space of a first one."""
MAX_UNUSED = 3
"""Rejected or dropped drafts of a step that are shown; a tree may have 60."""
CYCLES_BEFORE = 2
LABEL_WIDTH = 9
CYCLE_WIDTH = len("accepted ")
"""The least of a cycle's column: the longest verdict, and a space behind it."""
WORK = {"target": "T", "head": "T", "draft": "D", "verify": "V", "host": "H"}
DISCARDED, IDLE = "X", "."
IDLE_WIDTH = 5
LEAST_IDLE = 0.1
"""Of a cell's time: from here on its sign is small."""


def show_answer(run: Run, backend: BackendRecord, decode: Decode | None, console: Console) -> str:
    """The answer of a run with kept drafts, and the cycles around a rejection, as wide as `console`.

    Raises:
        ValueError: the drafts are not those of the run's steps.
    """
    tokens, words = step_tokens(run), Words(run.output_ids, decode)
    parts: list[RenderableType] = [_title(run, backend), _legend(), "", _steps(run, backend, tokens, words)]
    at = rejection_to_show(run, backend)
    if at is not None and backend.kind == "pipeline":
        parts += ["", *_stages(run, backend, at, words, console.width)]
    if at is not None and run.spans is not None and run.spans.lane:
        parts += ["", *_lanes(run, backend, at, console.width)]
    with console.capture() as shown:
        console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in shown.get().splitlines()) + "\n"


class Words:
    """Ids as text on one line, with `line_end` for its line breaks: each as it reads within the answer."""

    def __init__(self, output_ids: Sequence[int], decode: Decode | None, line_end: str = "\\n") -> None:
        self._ids, self._decode, self._line_end = output_ids, decode, line_end

    def at(self, position: int, ids: Sequence[int]) -> str:
        """`ids` as they read behind the answer's first `position` ids."""
        before = list(self._ids[max(position - CONTEXT_IDS, 0) : position])
        text = self._decode([*before, *ids])[len(self._decode(before)) :] if self._decode else ""
        text = text or "".join(f"<{token}>" for token in ids)
        return printable(text.replace("\n", self._line_end).replace("\t", "\\t"), one_line=True)


def _signed(kind: str, text: str) -> Text:
    before, behind, style = SIGNS[kind]
    return Text(f"{before}{text}{behind}", style)


def _title(run: Run, backend: BackendRecord) -> Text:
    steps, step_name = run.steps, "cycles" if backend.kind == "pipeline" else "steps"
    where = printable(f"{backend.label}: prompt {run.prompt_id}, turn {run.turn}, repeat {run.repeat}", one_line=True)
    judged, accepted = sum(steps.judged), sum(steps.accepted)
    counts = f"{run.num_new_tokens} tokens in {len(steps.t_ns) - 1} {step_name}, {accepted} of {judged} drafts accepted"
    return Text(f"{where}\n{counts}", "bold")


def _legend() -> Text:
    names = {"accepted": "accepted", "rejected": "rejected", "dropped": "dropped"}
    shown = Text("  ").join(_signed(kind, name) for kind, name in names.items())
    return shown.append_text(Text("  the target's own", SIGNS["own"][2]))


def _steps(run: Run, backend: BackendRecord, tokens: Sequence[StepTokens], words: Words) -> Table:
    """A line a step; of a pipeline, whose steps give one token each, a line up to each flush."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for first, last in _lines(run, backend):
        line, position = Text(), tokens[first].position
        accepted = [token for step in tokens[first : last + 1] for token in step.accepted]
        step = tokens[last]
        if backend.kind == "pipeline":
            line.append("." * sum(verdict(run.steps, n, backend) == "filling" for n in range(first, last + 1)), "dim")
        for offset, token in enumerate(accepted):
            line.append_text(_signed("accepted", words.at(position + offset, [token])))
        behind = position + len(accepted)
        _append_unused(line, "rejected", step.rejected, words, behind)
        _append_unused(line, "dropped", step.dropped, words, behind)
        line.append_text(_signed("own", words.at(behind, step.own) if step.own else ""))
        number = f"{first}" if first == last else f"{first}-{last}"
        table.add_row(Text(number, "dim"), Text(f"{run.steps.t_ns[last] / 1e6:.0f} ms", "dim"), line)
    return table


def _append_unused(line: Text, kind: str, ids: Sequence[int], words: Words, position: int) -> None:
    for token in ids[:MAX_UNUSED]:
        line.append_text(_signed(kind, words.at(position, [token])))
    if len(ids) > MAX_UNUSED:
        before, behind, style = SIGNS[kind]
        line.append(f"{before}{len(ids) - MAX_UNUSED} more{behind}", style)


def _lines(run: Run, backend: BackendRecord) -> Iterator[tuple[int, int]]:
    """The first and the last step of each line."""
    first = 0
    for number in range(len(run.steps.t_ns)):
        ends = backend.kind != "pipeline" or verdict(run.steps, number, backend) in ("prefill", "rejected")
        if ends or number == len(run.steps.t_ns) - 1:
            yield first, number
            first = number + 1


def _stages(run: Run, backend: BackendRecord, at: int, words: Words, width: int) -> list[RenderableType]:
    """Which token is in which stage, a column a cycle."""
    cycles = stage_tokens(run, backend)
    rejection = at - 1
    first = max(rejection - CYCLES_BEFORE, 0)
    room = max((width - LABEL_WIDTH) // CYCLE_WIDTH, 1)
    num = min(rejection - first + backend.num_stages + 2, len(cycles) - first, room)
    cell = min((width - LABEL_WIDTH) // num - 1, 14)
    lines = [Text("Tokens in the stages around a rejection, a column a cycle ('.': none)", "bold")]
    shown = range(first, first + num)
    lines.append(_row("cycle", [Text(str(cycle + 1), "dim") for cycle in shown], cell))
    for stage in range(backend.num_stages):
        lines.append(_row(f"stage {stage}", [_held(cycles[cycle][stage], words, cell) for cycle in shown], cell))
    names = {"accepted": "accepted", "rejected": "REJECTED", "filling": "fills"}
    verdicts = [names[verdict(run.steps, cycle + 1, backend)] for cycle in shown]
    lines.append(_row("verdict", [Text(name, "red" if name == "REJECTED" else "") for name in verdicts], cell))
    ends = run.steps.t_ns
    lines.append(_row("ms", [Text(f"{(ends[c + 1] - ends[c]) / 1e6:.1f}", "dim") for c in shown], cell))
    return list(lines)


def _held(token: StageToken | None, words: Words, width: int) -> Text:
    if token is None:
        return Text(IDLE, "dim")
    before, behind, _ = SIGNS[token.fate]
    word = words.at(0, [token.token_id]).strip() or "' '"
    room = width - len(before) - len(behind)
    return _signed(token.fate, word if cell_len(word) <= room else set_cell_size(word, max(room, 1)))


def _row(label: str, cells: Sequence[Text], width: int) -> Text:
    line = Text(set_cell_size(label, LABEL_WIDTH), no_wrap=True)
    for cell in cells:
        line.append_text(cell).append(" " * max(width + 1 - cell.cell_len, 0))
    return line


def _lanes(run: Run, backend: BackendRecord, at: int, width: int) -> list[RenderableType]:
    """What each lane did over time, from a cycle or two before the rejection to the next verdict."""
    ends = run.steps.t_ns
    first, last = max(at - CYCLES_BEFORE, 1), min(at + backend.num_stages, len(ends) - 1)
    begin, end = ends[first - 1], ends[last]
    columns = max(width - LABEL_WIDTH - IDLE_WIDTH, 10)
    cell_ns = max((end - begin) / columns, 1)
    rows: dict[str, list[LaneSpan]] = {}
    for each in lane_spans(run):
        if each.span.end_ns > begin and each.span.start_ns < end:
            rows.setdefault(lane_name(each, backend), []).append(each)
    names = [name for name in lane_order(backend) if name in rows]
    window, cell = (f"{each / 1e6:.{digits}f} ms" for each, digits in ((end - begin, 1), (cell_ns, 2)))
    steps = "cycles" if backend.kind == "pipeline" else "steps"
    lines = [Text(f"What the lanes did around a rejection: {steps} {first} to {last}, {window}", "bold")]
    lines.append(Text("T target  X discarded  D draft  V verify  H host  . idle  | a step ends", "dim"))
    lines.append(Text(f"a sign is {cell}; a small letter: the lane is idle for {LEAST_IDLE:.0%} of it or more", "dim"))
    marks = {min(int((at_ns - begin) / cell_ns), columns - 1) for at_ns in ends[first : last + 1]}
    ends_of_steps = "".join("|" if c in marks else " " for c in range(columns))
    lines.append(_row("steps", [Text(f"{ends_of_steps} idle", "dim")], 0))
    for name in names:
        found = rows[name]
        signs = "".join(_sign(found, begin + c * cell_ns, begin + (c + 1) * cell_ns) for c in range(columns))
        idle = _percent(_idle(found, begin, end))
        lines.append(_row(name, [_coloured(signs).append(f"{idle:>{IDLE_WIDTH}}", "dim")], 0))
    return list(lines)


def _percent(share: float) -> str:
    """A share of idle time: one that rounds to all of it, while something was done, is told from all."""
    text = f"{share:.0%}"
    return ">99%" if share < 1 and text == "100%" else text


def lane_name(each: LaneSpan, backend: BackendRecord) -> str:
    """Where a span belongs: a lane of a pipeline, else what the one lane did."""
    lane = each.span.lane
    if backend.lanes == 1 and backend.kind != "pipeline":
        return {"head": "target"}.get(each.span.kind, each.span.kind)
    return f"stage {lane}" if lane < backend.num_stages else "drafter" if lane == backend.num_stages else "host"


def lane_order(backend: BackendRecord) -> list[str]:
    """All names that `lane_name` gives."""
    return [*(f"stage {lane}" for lane in range(backend.num_stages)), "drafter", "draft", "target", "verify", "host"]


def _sign(spans: Sequence[LaneSpan], begin: float, end: float) -> str:
    """What takes most of the time from `begin` to `end`, small where much of that is idle; `IDLE` where all is."""
    taken: Counter[str] = Counter()
    for each in spans:
        span = each.span
        overlap = min(span.end_ns, end) - max(span.start_ns, begin)
        if overlap > 0:
            taken[WORK[span.kind] if span.kept else DISCARDED] += round(overlap)
    if not taken:
        return IDLE
    sign = max(taken, key=taken.__getitem__)
    return sign.lower() if _idle(spans, begin, end) >= LEAST_IDLE else sign


def _idle(spans: Sequence[LaneSpan], begin: float, end: float) -> float:
    """The share of the time from `begin` to `end` in which there is none of `spans`."""
    idle, reached = 0.0, begin
    for start, stop in sorted((each.span.start_ns, each.span.end_ns) for each in spans):
        idle += max(min(start, end) - reached, 0)
        reached = max(reached, min(stop, end))
    return (idle + end - reached) / (end - begin)


def _coloured(signs: str) -> Text:
    styles = {"T": "green", DISCARDED: "red", "D": "yellow", "V": "cyan", "H": "magenta", IDLE: "dim"}
    line = Text(no_wrap=True)
    for sign in signs:
        line.append(sign, styles[sign.upper()])
    return line
