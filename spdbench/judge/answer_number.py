"""The number that an answer gives: which of those in it counts, and its value, in whatever way it is written."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

FINAL = "####"
"""What precedes the result in GSM8K's own solutions."""

_PLAIN = (
    r"(?:\d{1,3}(?:\.\d{3})+,\d+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?![\d.]*\d)"  # as in 1.234,50 and 1.234.567
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])(?:\.\d+)?"  # as in 12,34,567
    r"|\d{1,3}(?: \d{3}){2,}(?![\d,]| \d)(?:\.\d+)?"  # as in 1 000 000; one group may be a number by itself
    r"|(?:\d{1,3}(?:(?:,|\{,\}|\\,|['’_\u00a0\u2009\u202f])\d{3})+(?!\d)(?<!\b0,\d{3})|\d+)(?:\.\d+)?"
    r"|(?<!\.)\.\d+)"
)
"""With groups of three after a comma, as LaTeX writes it too, after an apostrophe or an underscore, or after a thin
space or one that does not break; with groups of two, as in India, or after points."""
_COMMA = r"(?<!,)\d+,(?:\d{1,2}|(?<=\b0,)\d+)(?![\d,])"
"""With a comma for its fraction, as in 12,50."""
_SUPERSCRIPTS = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "-+01234567890123456789")
_VULGAR = "".join(map(chr, [0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F)]))
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SUFFIXES = {"k": 3, "m": 6, "mn": 6, "b": 9, "bn": 9}
"""Behind an amount of money."""
_CURRENCY = r"(?P<currency>[A-Z]{0,2}[$€£¥₹]|\b(?:USD|EUR|GBP|INR|CNY|RMB|JPY|CAD|AUD|CHF|Rs\.?))[ \u00a0]?"
_NO_NAME = r"(?<![^\W_])(?<![^\W_]_)(?<!\}_)(?<!_\{)(?<!\d\.)(?<!\^)(?<!\^\{)"
"""A digit that is no part of a name, such as `B12` or `x_1`, of a version, or of a power."""
_BRACED = (
    rf"\\[dtcs]?frac ?(?:\{{ ?(?P<minus>[-\u2212])? ?(?P<latex_above>{_PLAIN}) ?\}}|(?P<digit_above>\d)) ?"
    rf"(?:\{{ ?(?P<latex_below_minus>[-\u2212])? ?(?P<latex_below>{_PLAIN}) ?\}}|(?P<digit_below>\d))"
)
NUMBER = re.compile(
    # A dash with a space behind it is a sign behind `=` or a bracket only: elsewhere it begins an item or joins words.
    rf"(?P<sign>(?<![\w)\]}}%])[-\u2212\u2013](?=[\d.$€£¥₹\\{_VULGAR}A-Z])"
    r"|(?<=[=({] )[-\u2212]\s|(?<=[=({])[-\u2212]\s"
    r"|\b[Nn]egative |(?:(?<=\bis )|(?<![\w)\]}%] )(?<!\w))[Mm]inus )?"
    rf"(?:{_CURRENCY}|{_NO_NAME})(?:"
    # A fraction, which may have a whole number in front, but is no date.
    rf"(?:(?P<whole>\d+)(?:[ \u00a0]?(?=[\\{_VULGAR}])|[ \u00a0](?=\d+ ?[/\u2044])|(?: and |-)(?=\d+[/\u2044]\d)))?(?:"
    rf"(?<!\d/)(?P<above>{_PLAIN}) ?[/\u2044] ?(?P<below_minus>[-\u2212])?(?P<below>{_PLAIN})(?!\d| ?/ ?\d)"
    rf"|\((?P<above_minus>[-\u2212])(?P<bracketed_above>{_PLAIN})\) ?/ ?(?P<bracketed_below>{_PLAIN})"
    rf"|(?P<raised_above>[⁰¹²³⁴⁵⁶⁷⁸⁹]+)[/\u2044](?P<lowered_below>[₀₁₂₃₄₅₆₇₈₉]+)"
    rf"|{_BRACED}|\{{ ?(?P<over_above>{_PLAIN}) ?\\over ?(?P<over_below>{_PLAIN}) ?\}}|(?P<vulgar>[{_VULGAR}]))"
    r"|(?P<based>0(?:[xX][0-9a-fA-F]+|[bB][01]+|[oO][0-7]+))\b"
    rf"|\((?P<base>[-\u2212]{_PLAIN})\)(?:\^|\*\*)[{{(]?(?P<base_power>\d{{1,3}})(?![\d.])"
    # A number, which may be a power, or be multiplied by one of ten.
    rf"|(?P<plain>{_COMMA}|{_PLAIN})(?:(?:[eE]| ?(?:[x×*·]|\\times|\\cdot) ?10(?:\^|\*\*)[{{(]?)"
    r"(?P<ten>[-+\u2212]?\d{1,3})(?![\d.])"
    r"| ?(?:[x×*·]|\\times|\\cdot) ?10(?P<raised_ten>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})"
    r"|(?P<raised>⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})(?![/\u2044])"
    r"|(?(currency)(?P<suffix>[kKmMbB]|mn|bn)\b|(?!))"
    r"|(?:\^|\*\*)[{(]?(?P<power>[-\u2212]?\d{1,3})(?![\d.])"
    rf"|[ \u00a0-]?(?P<scale>{'|'.join(_SCALES)})s?\b)?)"
)
"""A number in the ways in which answers write it; its parts are one value."""
MAX_POWER = 400
MAX_DIGITS = 10_000
"""Of a power's value."""
MARKED = re.compile(rf"{FINAL}[ \t]*(?:\\boxed\{{|\*\*)?(?={NUMBER.pattern}(?![.)][ \t]+\w))")
"""A mark with its number behind it. `#### 1. Add them up` is a heading."""
REMARKS = re.compile(
    rf"(?<![\d/])\d{{1,4}}/\d\d?/\d{{1,4}}(?![\d/])|\b\d{{4}}-\d\d-\d\d\b"  # a date
    rf"|(?<=[\w%$*_}}\])] )\((?! ?=? ?(?>{NUMBER.pattern})[ %$]*\))[^()]*\)|\\(?:text|mathrm|textbf)\{{[^{{}}]*\}}"
)
"""What holds numbers that are not the result where there is another one: dates, and what stands in brackets or as text
behind it, as in `7 (since 3 + 4)`, but not the result itself, as in `eighteen (18)`."""
REASON = re.compile(
    rf"\A(\W*(?>{NUMBER.pattern})[^.;\n=]*?),? (?:since|because|rather than|instead of|not)\b.*", re.DOTALL
)
"""A result at the beginning of a sentence, and why it is that."""
BOXED = re.compile(r"\\f?boxed ?\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
CONCLUSION = re.compile(
    r"\bfinal answer\b|\b(?:the|correct|our|my) answer is\b|^[^\w\n]*answer[^\w\n]*:", re.IGNORECASE | re.MULTILINE
)
"""Words that announce a result. Behind them are checks of it, and notes."""
NEXT_QUESTION = re.compile(
    r"\n[ \t#*\[]*(?:(?:Next |New |Follow-up )?(?:Question|Problem|Exercise)|Q|Human|User|Instruction|Input)"
    r"(?:[ \t]*\d+)?[ \t]*(?:[:\]*]|\n)|\n(?:user|USER)\n",
    re.IGNORECASE,
)
"""Where a model that has answered invents what it is asked next."""


def final_number(text: str) -> Fraction | None:
    """Strict: the number at the first `####` that has one, since a model may go on with a question of its own, else the
    first number behind the last `####`. Of a calculation in the mark's line it is the result."""
    marked = MARKED.search(text)
    _, mark, end = text.rpartition(FINAL)
    if marked is None:
        found = NUMBER.search(end) if mark else None
        return _value(found) if found else None
    line = _without_remarks(text[marked.end() :].partition("\n")[0])
    found = NUMBER.search(line.rpartition("=")[2]) or NUMBER.search(line)
    return _value(found) if found else None


def _without_remarks(text: str) -> str:
    """`text` without what explains a number in it; all of it where no other number is left."""
    text = REASON.sub(lambda found: found[1], text)
    left = REMARKS.sub(" ", text)
    return left if NUMBER.search(left) else text


def any_number(text: str) -> Fraction | None:
    """Flexible: the number marked by `####` where there is one, else, before a further question, the last one in a box,
    or the one of the last line that announces a result, or the last number; else the last number in the text."""
    final = final_number(text)
    if final is not None:
        return final
    answered = NEXT_QUESTION.split(text.lstrip(), maxsplit=1)[0]
    boxes = [box for box in BOXED.findall(answered) if NUMBER.search(box)]
    for part in (*boxes[-1:], *_announced(answered), answered, text):
        values = [value for found in NUMBER.finditer(_without_remarks(part)) if (value := _value(found)) is not None]
        if values:
            return values[-1]
    return None


def _announced(text: str) -> list[str]:
    """The first sentence with a number behind the last words that announce a result."""
    ends = [found.end() for found in CONCLUSION.finditer(text)]
    sentences = re.split(r"\n|[.;]\s", text[ends[-1] :]) if ends else []
    return [sentence for sentence in sentences if NUMBER.search(sentence)][:1]


def _value(found: re.Match[str]) -> Fraction | None:
    """None for a division by zero, and for powers that take too long to compute."""
    if found["based"]:
        value = Fraction(int(found["based"], 0))
    elif found["base"]:
        power = int(found["base_power"])
        if not _is_feasible(found["base"], power):
            return None
        value = (-_plain(found["base"])) ** power
    elif found["plain"]:
        value = _plain(found["plain"])
        ten, power = _exponent(found["ten"] or found["raised_ten"], 0), _exponent(found["power"] or found["raised"], 1)
        ten += _SCALES.get(found["scale"] or "", 0) + _SUFFIXES.get((found["suffix"] or "").lower(), 0)
        if not _is_feasible(found["plain"], power) or abs(ten) > MAX_POWER or (power < 0 and not value):
            return None
        value = value**power * Fraction(10) ** ten
    elif found["vulgar"]:
        value = _plain(found["whole"] or "0") + Fraction(unicodedata.numeric(found["vulgar"])).limit_denominator(10)
    else:
        above, below = (_plain(next(filter(None, map(found.group, names)))) for names in (ABOVE, BELOW))
        if not below:
            return None
        is_negative = bool(found["minus"] or found["above_minus"]) != bool(
            found["below_minus"] or found["latex_below_minus"]
        )
        value = _plain(found["whole"] or "0") + (-above if is_negative else above) / below
    return -value if found["sign"] else value


ABOVE = ("above", "latex_above", "digit_above", "bracketed_above", "raised_above", "over_above")
BELOW = ("below", "latex_below", "digit_below", "bracketed_below", "lowered_below", "over_below")
"""The groups of `NUMBER` that hold what is above and below a fraction's line."""


def _is_feasible(digits: str, power: int) -> bool:
    """False for a power that takes too long to compute."""
    return abs(power) <= MAX_POWER and (abs(power) <= 1 or len(digits) * abs(power) <= MAX_DIGITS)


def _exponent(text: str | None, otherwise: int) -> int:
    return int(text.translate(_SUPERSCRIPTS).replace("\u2212", "-")) if text else otherwise


def _plain(digits: str) -> Fraction:
    digits = digits.translate(_SUPERSCRIPTS)
    if re.fullmatch(rf"\d{{1,3}}(?:\.\d{{3}})+,\d+|\d{{1,3}}(?:\.\d{{3}}){{2,}}|{_COMMA}", digits):
        digits = digits.replace(".", "").replace(",", ".")
    return Fraction(Decimal(re.sub(r"[^\d.]", "", digits)))
