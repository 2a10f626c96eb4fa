"""Text from outside is shown, and not obeyed."""

from __future__ import annotations

import pytest

from spdbench.console import MAX_CHARS, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, caf\u00e9 \u65e5\u672c", "plain, caf\u00e9 \u65e5\u672c"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m\x7f\r", "\\x9b31m\\x7f\\r"),
        ("left\u202eright\u2028", "left\\u202eright\\u2028"),
        ("not utf-8: \udce9", "not utf-8: \\udce9"),
        ("one\ntwo\tthree\u200d", "one\ntwo\tthree\u200d"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_line_stays_a_line_and_a_megabyte_does_not_stay_one() -> None:
    assert printable("a\nb", one_line=True) == "a\\nb"
    assert printable("x" * 10**6).startswith("x" * MAX_CHARS + "... (1,000,000 characters)")
