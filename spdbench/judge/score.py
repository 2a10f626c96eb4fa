"""Scores of answers: what a model said, compared with its reference, as a number between 0 and 1.

`gsm8k` and `gsm8k_strict` compare one number. `humaneval` asks whether the answer's code passes its tests, once, so
that the mean over answers is pass@1. The caller decides who runs code, and in
which sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spdbench.errors import InputError
from spdbench.judge.answer_code import around_answer, is_python, program
from spdbench.judge.answer_number import NUMBER, any_number, final_number
from spdbench.types import Prompt

RUNS_CODE = frozenset({"humaneval"})
"""Judges that have to run what a model wrote."""

_THOUGHTS = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad|seed:think"
THOUGHTS_BEGIN = re.compile(
    rf"<(?:{_THOUGHTS})(?:\s[^<>]*)?>|\[THINK\]|◁think▷|<\|(?:START_THINKING|begin_of_thought|think)\|>"
    r"|<\|channel>thought\b|<unused94>thought\b|Here is my thought process:",
    re.IGNORECASE,
)
THOUGHTS_END = re.compile(
    rf"</(?:{_THOUGHTS})>|\[/THINK\]|◁/think▷|<\|(?:END_THINKING|end_of_thought|/think)\|>"
    r"|<\|channel\|>final<\|message\|>|<channel\|>|<unused95>|Here is my response:",
    re.IGNORECASE,
)
"""As DeepSeek, Qwen, Magistral, Kimi, Command, OpenThinker, gpt-oss, Gemma, MedGemma and Granite write them."""
TURN_END = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|end|end_of_text|endoftext|end_of_turn|end_of_sentence|END_OF_TURN_TOKEN|return|call)\|>"
    r"|</s>(?![\w\"'<])|<end_of_turn>|<eos>|<｜end▁of▁sentence｜>|\[/?INST\]"
    r"|<\|(?:im_start|start_header_id)\|>user|<\|user\|>|<start_of_turn>user"
)
"""Where an answer ends whose server or tokenizer writes its special tokens as text."""
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
        answer = without_thoughts(answer)
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


def without_thoughts(answer: str) -> str:
    """What a model says after it has thought: behind the last end of thoughts, whose beginning the chat template may
    have written, before thoughts that do not end, and before the next turn."""
    said = THOUGHTS_END.split(answer)[-1]
    said = THOUGHTS_BEGIN.split(said, maxsplit=1)[0]
    return next((turn for turn in TURN_END.split(said) if turn.strip()), "")


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
        if final_number(text) is None and "=" not in text and len(list(NUMBER.finditer(text))) > 1:
            raise InputError(
                f"{where}: {judge} compares one number, and there are several in {text[:60]!r}; write `#### ` in front "
                "of the one that counts, behind all else"
            )
    elif not all(is_python(part) for part in around_answer(text)):
        raise InputError(
            f"{where}: {judge} needs Python that tests the answer, such as `assert add(1, 2) == 3`, not {text[:60]!r}"
        )
