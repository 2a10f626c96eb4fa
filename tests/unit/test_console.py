"""Text from outside on the terminal: nothing in it is obeyed, and what is harmless stays as it is."""

from __future__ import annotations

import io
import unicodedata
from contextlib import redirect_stderr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spdbench.console import CLEAR, MAX_CHARS, can_redraw, hide_notes, printable, say, wrapped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),  # clears the screen, renames the window
        ("\x9b31m", r"\x9b31m"),  # the same as one byte
        ("done\rError", r"done\rError"),  # writes over the line
        ("a\bb\x7f", r"a\x08b\x7f"),
        ("user\u202etxt.exe", r"user\u202etxt.exe"),  # right to left from here
        ("\u2066hidden\u2069", r"\u2066hidden\u2069"),
        ("\u200e\u200f\u061c", r"\u200e\u200f\u061c"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        ("\ud800", r"\ud800"),  # half of a pair, which no encoding takes
        ("\U000e0041", r"\U000e0041"),  # a tag, invisible
        ("\ue000", r"\ue000"),
    ],
)
def test_what_a_terminal_obeys_or_hides_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text, one_line=True) == shown


def test_harmless_text_stays_as_it_is() -> None:
    text = "naïve 日本語 👩\u200d💻 می\u200cخواهم\tcolumn [bold]markup[/bold] <b>&amp;"
    assert printable(text) == text


def test_line_breaks_stay_unless_it_has_to_be_one_line() -> None:
    assert printable("a\nb") == "a\nb"
    assert printable("a\nb", one_line=True) == r"a\nb"


def test_long_text_is_cut_and_says_so() -> None:
    shown = printable("x" * 2_000_000)
    assert len(shown) < MAX_CHARS + 100
    assert shown.endswith("... (2,000,000 characters)")


@given(st.text(st.characters(), max_size=50))
def test_of_any_text_nothing_is_obeyed(text: str) -> None:
    shown = printable(text, one_line=True)
    assert "\n" not in shown
    shown.encode()
    assert all(char in "\t\u200c\u200d" or unicodedata.category(char)[0] != "C" for char in shown)
    assert printable(shown) == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal that can be redrawn."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    return Terminal()


def test_notes_are_shown_the_same_way_and_only_our_own_code_clears_the_line(terminal: Terminal) -> None:
    for stream, before in ((terminal, CLEAR), (io.StringIO(), "")):
        with redirect_stderr(stream):
            say("NOTE: \x1b[31m\u202e")
        assert stream.getvalue() == f"{before}NOTE: \\x1b[31m\\u202e\n"


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TERM", "unknown"), ("TERM", ""), ("CI", "true")])
def test_a_dumb_terminal_and_the_log_of_a_ci_job_get_no_escape_sequences(
    name: str, value: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_redraw(terminal)
    monkeypatch.setenv(name, value)
    assert not can_redraw(terminal)
    with redirect_stderr(terminal):
        say("NOTE")
    assert terminal.getvalue() == "NOTE\n"


def test_hidden_notes_leave_errors_and_end_with_their_context(capsys: pytest.CaptureFixture[str]) -> None:
    with hide_notes(True):
        say("a note")
        say("an error", error=True)
        with hide_notes(False):
            say("another note")
        say("a third note")
    say("the last note")
    assert capsys.readouterr().err == "an error\nanother note\nthe last note\n"


def test_wrapped_text_keeps_its_lines() -> None:
    assert wrapped("def f(x):\n    return x\n\n1. one\n2. two", 80, "  ") == (
        "  def f(x):\n      return x\n\n  1. one\n  2. two"
    )
    assert wrapped(" " * 90 + "return value", 40, "") == " " * 20 + "return value"
    assert wrapped("  a long line that goes on", 16, "> ") == ">   a long line\n>   that goes on"
