"""Scores of answers: what a model said, compared with its reference, as a number between 0 and 1.

`gsm8k` and `gsm8k_strict` compare one number. `humaneval` asks whether the answer's code passes its tests, once, so
that the mean over answers is pass@1. The caller decides who runs code, and in
which sandbox.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from spdbench.errors import InputError
from spdbench.types import Prompt

RUNS_CODE = frozenset({"humaneval"})
"""Judges that have to run what a model wrote."""

ANSWER_LINE = "# <answer>"
"""Where the answer's code goes in a reference that is a program; without such a line it goes first."""

FINAL = "####"
"""What precedes the result in GSM8K's own solutions."""

NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212]\s?)?[$€£]?(?<![\w.])(?:"
    r"(?P<whole>\d{1,3}(?:(?:,|\{,\}|[\u00a0\u202f])\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?|(?P<bare>\.\d+))"
)
"""With groups of three after a comma, as LaTeX writes it too, or after a space that does not break."""
FENCE = re.compile(r"(?:^([ \t]*))?```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
CODE_BEGINS = re.compile(r"^(?:(?:def|class|from|import|async def)\s|@\w)", re.MULTILINE)

Judges = str | Mapping[str, str] | None
"""One judge for all prompts, or judges by category; None where nothing is scored."""

Execute = Callable[[str], bool | None]
"""Runs a program where it can do no harm; true if it came to its end, None if it could not be run."""


@dataclass(frozen=True)
class Scorer:
    """Scores answers to a suite's prompts. Without `execute` code is never run, and answers that are code have no
    score."""

    judges: Judges
    execute: Execute | None = None

    def __call__(self, prompt: Prompt, turn: int, answer: str) -> float | None:
        """None where no judge is named for the prompt, it has no reference in this turn, or code could not be run."""
        judge, reference = judge_of(self.judges, prompt.category), reference_of(prompt, turn)
        if judge is None or reference is None:
            return None
        if judge in RUNS_CODE:
            passed = self.execute(program(answer, reference)) if self.execute else None
            return None if passed is None else float(passed)
        found = final_number(answer) if judge == "gsm8k_strict" else any_number(answer)
        return float(found is not None and found == any_number(reference))


def judge_of(judges: Judges, category: str) -> str | None:
    return judges if judges is None or isinstance(judges, str) else judges.get(category)


def reference_of(prompt: Prompt, turn: int) -> str | None:
    """The reference of one turn; None where it has none."""
    texts = prompt.reference or ()
    return texts[turn] or None if turn < len(texts) else None


def final_number(text: str) -> Decimal | None:
    """Strict: the number behind the last `####`."""
    _, mark, end = text.rpartition(FINAL)
    found = NUMBER.search(end) if mark else None
    return _value(found) if found else None


def any_number(text: str) -> Decimal | None:
    """Flexible: the number behind the last `####` where there is one, else the last number in the text."""
    final = final_number(text)
    if final is not None:
        return final
    numbers = list(NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(found: re.Match[str]) -> Decimal:
    sign, whole = "-" if found["sign"] else "", re.sub(r"\D", "", found["whole"] or "0")
    return Decimal(sign + whole + (found["part"] or found["bare"] or ""))


def program(answer: str, reference: str) -> str:
    """The program that comes to its end if the answer's code does what `reference` asks of it.

    Lines at the answer's end that are no Python, such as words after the code, are left out.
    """
    before, after = _around_answer(reference)
    lines = code_in(answer).split("\n")
    for end in range(len(lines), 0, -1):
        begun = before + "\n".join(lines[:end])
        if _is_python(begun):
            return f"{begun}\n{after}"
    return before + "\n".join(lines) + f"\n{after}"


def code_in(answer: str) -> str:
    """The code of an answer: its first fenced block with a function in it, else its first fenced block; without any,
    all from the first line on that looks like code, or the whole text where that is the inside of a function."""
    blocks = [_without_indent(block, len(indent)) for indent, block in FENCE.findall(answer)]
    if blocks:
        return next((block for block in blocks if "def " in block), blocks[0])
    begun = CODE_BEGINS.search(answer)
    is_inside = answer.lstrip("\r\n")[:1] in (" ", "\t")
    return answer if begun is None or is_inside else answer[begun.start() :]


def _without_indent(block: str, most: int) -> str:
    """A block without what its fence, in an item of a list, is indented by."""
    return re.sub(rf"^[ \t]{{0,{most}}}", "", block, flags=re.MULTILINE)


def _around_answer(reference: str) -> tuple[str, str]:
    before, mark, after = reference.partition(f"{ANSWER_LINE}\n")
    return (before, after) if mark else ("", reference)


def _is_python(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes, which are the model's fault
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def check_references(suite: str, judges: Judges, prompts: Sequence[Prompt], *, runs_code: bool, missing: str) -> None:
    """What can be known to be wrong with references before anything is measured.

    `runs_code` says whether answers that are code are to be run; else their references are not looked at. `missing` is
    why there are none, if that is known.

    Raises:
        InputError: a judge whose category no prompt has or whose prompts have no reference at all, or a reference of
            which it can make nothing.
    """
    if isinstance(judges, Mapping):
        known = {prompt.category for prompt in prompts}
        if strangers := sorted(set(judges) - known):
            raise InputError(
                f"suite {suite}: score.{strangers[0]}: no prompt has this category. Known: {', '.join(sorted(known))}."
            )
    asked: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        judge = judge_of(judges, prompt.category)
        if judge is not None and (runs_code or judge not in RUNS_CODE):
            asked.setdefault(judge, []).append(prompt)
    for judge, members in asked.items():
        found = [(prompt.id, text) for prompt in members for text in prompt.reference or () if text]
        if not found:
            raise InputError(
                f"suite {suite}: score: {judge} needs a reference for each prompt, and there is none. "
                + (missing or "Name what holds them with the source's key `reference`, or leave `score` out.")
            )
        for name, text in found:
            _check_reference(judge, f"suite {suite}: prompt {name}: reference", text)


def _check_reference(judge: str, where: str, text: str) -> None:
    if judge not in RUNS_CODE:
        if any_number(text) is None:
            raise InputError(f"{where}: {judge} needs a number in it, and there is none in {text[:60]!r}")
    elif not all(_is_python(part) for part in _around_answer(text)):
        raise InputError(
            f"{where}: {judge} needs Python that tests the answer, such as `assert add(1, 2) == 3`, not {text[:60]!r}"
        )
