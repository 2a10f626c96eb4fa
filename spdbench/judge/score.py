"""Scores of answers: what a model said, compared with its reference, as a number between 0 and 1.

`gsm8k` and `gsm8k_strict` compare one number. `humaneval` asks whether the answer's code passes its tests, once, so
that the mean over answers is pass@1. The caller decides who runs code, and in
which sandbox.
"""

from __future__ import annotations

import ast
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from spdbench.errors import InputError
from spdbench.types import Prompt

RUNS_CODE = frozenset({"humaneval"})
"""Judges that have to run what a model wrote."""

ANSWER_LINE = "# <answer>"
"""Where the answer's code goes in a reference that is a program; without such a line it goes first."""

FINAL = "####"
"""What precedes the result in GSM8K's own solutions."""

_PLAIN = r"(?:(?:\d{1,3}(?:(?:,|\{,\}|\\,|[\u00a0\u2009\u202f])\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
"""With groups of three after a comma, as LaTeX writes it too, or after a thin space or one that does not break."""
_SUPERSCRIPTS = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
_VULGAR = "".join(map(chr, [0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F)]))
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212]\s?)?[$€£]?(?<![\w.^])(?<!\^\{)(?:"
    # A fraction, which may have a whole number in front, but is no date.
    rf"(?:(?P<whole>\d+)[ \u00a0]?(?=[\\{_VULGAR}]|(?<=[ \u00a0])\d+ ?[/\u2044]))?(?:"
    rf"(?P<above>{_PLAIN}) ?[/\u2044] ?(?P<below>{_PLAIN})(?! ?/ ?\d)"
    rf"|\\[dt]?frac ?\{{ ?(?P<minus>[-\u2212])? ?(?P<latex_above>{_PLAIN}) ?\}} ?\{{ ?(?P<latex_below>{_PLAIN}) ?\}}"
    rf"|\\[dt]?frac ?(?P<digit_above>\d) ?(?P<digit_below>\d)|(?P<vulgar>[{_VULGAR}]))"
    # A number, which may be a power, or be multiplied by one of ten.
    rf"|(?P<plain>{_PLAIN})(?:(?:[eE]| ?(?:[x×*·]|\\times|\\cdot) ?10(?:\^|\*\*)\{{?)"
    r"(?P<ten>[-+\u2212]?\d{1,3})(?![\d.])"
    r"| ?(?:[x×*·]|\\times|\\cdot) ?10(?P<raised_ten>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})|(?P<raised>⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})"
    r"|(?:\^|\*\*)\{?(?P<power>[-\u2212]?\d{1,3})(?![\d.]))?)"
)
"""A number in the ways in which answers write it; its parts are one value."""
MAX_POWER = 400
MARKED = re.compile(rf"{FINAL}[ \t]*(?:\\boxed\{{|\*\*)?(?={NUMBER.pattern}(?![.)][ \t]+\w))")
"""A mark with its number behind it. `#### 1. Add them up` is a heading."""
NEXT_QUESTION = re.compile(r"\n\s*(?:Question|Q|Problem|Human|User)[ \t]*\d*[ \t]*:")
"""Where a model that has answered invents what it is asked next."""

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
FENCE = re.compile(
    r"(?:^([ \t]*))?(`{3,}|~{3,})([^\n`]*)\n(.*?)(?:\n(?!\1[ \t]{4})[ \t]*\2|\Z)", re.DOTALL | re.MULTILINE
)
"""A fence that is indented by four more than the first is inside of the code, such as in a docstring."""
CODE_BEGINS = re.compile(r"^(?:(?:def|class|from|import|async def)\s|@\w)", re.MULTILINE)
FUTURE = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)

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
    have written, and before thoughts that do not end."""
    said = THOUGHTS_END.split(answer)[-1]
    return THOUGHTS_BEGIN.split(said, maxsplit=1)[0]


def final_number(text: str) -> Fraction | None:
    """Strict: the number at the first `####` that has one, since a model may go on with a question of its own, else the
    first number behind the last `####`."""
    marked = MARKED.search(text)
    _, mark, end = text.rpartition(FINAL)
    found = NUMBER.search(text, marked.end()) if marked else NUMBER.search(end) if mark else None
    return _value(found) if found else None


def any_number(text: str) -> Fraction | None:
    """Flexible: the number marked by `####` where there is one, else the last number before a further question, else
    the last number in the text."""
    final = final_number(text)
    if final is not None:
        return final
    for part in (NEXT_QUESTION.split(text.lstrip(), maxsplit=1)[0], text):
        values = [value for found in NUMBER.finditer(part) if (value := _value(found)) is not None]
        if values:
            return values[-1]
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    """None for a division by zero, and for powers that take too long to compute."""
    if found["plain"]:
        value = _plain(found["plain"])
        ten, power = _exponent(found["ten"] or found["raised_ten"], 0), _exponent(found["power"] or found["raised"], 1)
        if max(abs(ten), abs(power)) > MAX_POWER or (power < 0 and not value):
            return None
        value = value**power * Fraction(10) ** ten
    elif found["vulgar"]:
        value = _plain(found["whole"] or "0") + Fraction(unicodedata.numeric(found["vulgar"])).limit_denominator(10)
    else:
        above, below = (
            _plain(found[name] or found[f"latex_{name}"] or found[f"digit_{name}"]) for name in ("above", "below")
        )
        if not below:
            return None
        value = _plain(found["whole"] or "0") + (-above if found["minus"] else above) / below
    return -value if found["sign"] else value


def _exponent(text: str | None, otherwise: int) -> int:
    return int(text.translate(_SUPERSCRIPTS).replace("\u2212", "-")) if text else otherwise


def _plain(digits: str) -> Fraction:
    return Fraction(Decimal(re.sub(r"[^\d.]", "", digits)))


def program(answer: str, reference: str) -> str:
    """The program that comes to its end if the answer's code does what `reference` asks of it.

    Lines at the answer's end that are no Python, such as words after the code, are left out.
    """
    before, after = _around_answer(reference)
    code = code_in(answer, after)
    before = "".join(FUTURE.findall(code)) + before  # nothing may precede these
    lines = FUTURE.sub("", code).split("\n")
    for end in range(len(lines), 0, -1):
        begun = before + "\n".join(lines[:end])
        if _is_python(begun):
            return f"{begun}\n{after}"
    return before + "\n".join(lines) + f"\n{after}"


def code_in(answer: str, tests: str = "") -> str:
    """The code of an answer: its fenced blocks that define what `tests` use, and what these blocks use in turn; if
    there are none, its first fenced block with a function in it, else its first fenced block. Without any, all from the
    first line on that looks like code, or the whole text where that is the inside of a function."""
    blocks = [_block(*parts) for parts in FENCE.findall(answer)]
    if blocks:
        first = next((block for block in blocks if "def " in block), blocks[0])
        return "\n".join(_needed(blocks, tests)) or first
    answer = answer.replace("<|python_tag|>", "\n")  # of Llama 3, in front of code
    begun = CODE_BEGINS.search(answer)
    is_inside = answer.lstrip("\r\n")[:1] in (" ", "\t")
    return answer if begun is None or is_inside else answer[begun.start() :]


def _needed(blocks: Sequence[str], tests: str) -> list[str]:
    """The blocks, in order, that define names which `tests` or other such blocks use. Examples of use are not among
    them, nor are tests of the model's own, either of which may end the program."""
    names = [_names(block) for block in blocks]
    used, chosen = _names(tests)[1], set[int]()
    while more := {i for i, (defined, _) in enumerate(names) if i not in chosen and defined & (used | {"*"})}:
        chosen |= more
        used = used.union(*(names[i][1] for i in more))
    return [blocks[i] for i in sorted(chosen)]


def _names(code: str) -> tuple[set[str], set[str]]:
    """The names that the outermost statements of `code` define, and all names that are used in it."""
    if not _is_python(code):
        return set(), set()
    tree = ast.parse(code)
    defined: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            defined.update((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
        else:
            targets = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
            defined.update(node.id for node in targets if isinstance(node.ctx, ast.Store))
    loaded = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return defined, {node.id for node in loaded}


def _block(indent: str, _: str, info: str, code: str) -> str:
    """A block's code, which may begin in the line of its fence, behind the name of a language."""
    _, space, rest = info.strip().partition(" ")
    begun = f"{rest}\n" if space and CODE_BEGINS.match(rest) else ""
    return begun + _without_indent(code, len(indent))


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
        if final_number(text) is None and "=" not in text and len(list(NUMBER.finditer(text))) > 1:
            raise InputError(
                f"{where}: {judge} compares one number, and there are several in {text[:60]!r}; write `#### ` in front "
                "of the one that counts, behind all else"
            )
    elif not all(_is_python(part) for part in _around_answer(text)):
        raise InputError(
            f"{where}: {judge} needs Python that tests the answer, such as `assert add(1, 2) == 3`, not {text[:60]!r}"
        )
