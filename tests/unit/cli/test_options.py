"""Options that are declared as fields: typed, shared by inheritance, and shown with their own first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from spdbench.cli.files import result_path
from spdbench.cli.options import DURATION, PERCENT, SIZE, WHOLE, argument, flag, option, takes


@dataclass(frozen=True, kw_only=True)
class Shared:
    model: str = option("-m --model", None, "MODEL", "The model.", "small")
    depth: int = option("--depth", WHOLE, "N", "How deep.", 1)


@dataclass(frozen=True, kw_only=True)
class Own(Shared):
    word: str = argument("WORD")
    budget: float | None = option("--budget", DURATION, "TIME", "How long.")
    size: int | None = option("--size", SIZE, None, "How much.")
    share: float | None = option("--share", PERCENT, None, "What share.")
    quiet: bool = flag("--quiet", "Say less.")
    depth: int = option("--depth", WHOLE, "N", "How deep, of its own.", 2)


def called(*words: str) -> tuple[Own | None, str]:
    found: list[Own] = []

    @click.command()
    @takes(Own)
    def command(options: Own) -> None:
        """Does something."""
        found.append(options)

    said = CliRunner().invoke(command, words)
    return (found[0] if found else None), said.output


def test_a_command_gets_one_object_with_everything() -> None:
    options, _ = called("x", "--budget", "1h30m", "--size", "8GB", "--share", "0.5%", "--quiet", "-m", "big")
    assert options == Own(model="big", depth=2, word="x", budget=5400.0, size=8 * 10**9, share=0.005, quiet=True)


def test_what_is_not_given_has_its_default() -> None:
    options, _ = called("x")
    assert options == Own(model="small", depth=2, word="x", budget=None, size=None, share=None, quiet=False)


def test_help_shows_own_options_first_and_each_once() -> None:
    _, text = called("--help")
    names = ["--budget TIME", "--size SIZE", "--share PERCENT", "--quiet", "--depth N", "-m, --model MODEL"]
    places = [text.index(name) for name in names]
    assert places == sorted(places)
    assert text.count("--depth") == 1
    assert "[default: 2; x>=0]" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "soon"], "'soon' is not a duration; write 90s, 20m or 1h30m"),
        (["--size", "much"], "'much' is not a size"),
        (["--share", "100%"], "'100%' is not a share"),
        (["--depth", "-1"], "-1 is not in the range"),
        (["--depth", str(2**63)], "a number of 19 digits is too large. Allowed: at most 9223372036854775807."),
        (["--depth", "7" * 400], "a number of 400 digits is too large"),
        (["--budget", "9" * 400 + "h"], "is not a duration"),
        (["--size", "9" * 400], "is not a size"),
    ],
)
def test_wrong_words_are_refused(words: list[Any], said: str) -> None:
    options, text = called("x", *words)
    assert options is None
    assert said in text


def test_names_of_files_have_nothing_that_file_systems_refuse_and_older_ones_are_still_used(tmp_path: Path) -> None:
    assert result_path(tmp_path, "quick", "a", 'own/m:8b"*', None).name == "quick__a__own-m-8b--.json"
    for older in ("quick__a__own-m:8b.journal.jsonl", "quick__a__own-m:8b.json"):
        (tmp_path / older).touch()
        assert result_path(tmp_path, "quick", "a", "own/m:8b", None).name == "quick__a__own-m:8b.json"
        (tmp_path / older).unlink()


def test_names_that_are_too_long_are_cut_and_stay_apart(tmp_path: Path) -> None:
    first, second = (result_path(tmp_path, "quick", "a", "\u65e5" * 300 + end, "n") for end in "ab")
    assert first != second
    assert first == result_path(tmp_path, "quick", "a", "\u65e5" * 300 + "a", "n")
    first.touch()


def test_an_option_that_is_required_is_asked_for_and_one_of_several_values_may_have_none() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Given:
        out: Path = option("--out", click.Path(path_type=Path), "FILE", "Where to.", required=True)
        words: tuple[str, ...] = option("--word", None, "WORD", "Some.", multiple=True)

    found: list[Given] = []
    command = click.command()(takes(Given)(found.append))
    refused = CliRunner().invoke(command, [])
    assert refused.exit_code == 2
    assert "Missing option '--out'" in refused.output
    assert CliRunner().invoke(command, ["--out", "x"]).exit_code == 0
    assert found == [Given(out=Path("x"), words=())]
