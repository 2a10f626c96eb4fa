"""Options that a file sets, and completion: as a user would see them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spdbench.cli.main import run

TYPO = "not an option that a file can set"


def error_of(
    text: str, file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What `spdbench compare nothing` says in `folder`, where `file` holds `text`; it must end with code 2."""
    (folder / file).write_text(text, "utf-8")
    monkeypatch.chdir(folder)
    assert run(["compare", "nothing.json"]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    return str(shown.err)


def test_a_pipe_in_the_place_of_a_file_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "spdbench.toml")
    monkeypatch.chdir(tmp_path)
    assert run(["compare", "absent.json"]) == 2
    assert "absent.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[compare]\ndetials = true", f"compare.detials: {TYPO}; did you mean 'details'?"),
        ("[comprae]\ndetails = true", "unknown table 'comprae'; did you mean 'compare'?"),
        ("[compare]\ndetails = 1", "compare.details: 1 is not true or false"),
        ("[compare]\nformat = 'word'", "compare.format: 'word' is not one of"),
        ("[compare]\nformat = ['csv']", "compare.format: takes one value, not a list"),
        ("[compare]\nformat = true", "compare.format: takes a value, not true or false"),
        ("[compare]\nformat = {a = 1}", "compare.format: {'a': 1} is not a value of this option"),
        ("compare = 3", "'compare' is int, expected a table of options"),
        ("[compare", "is not TOML"),
        ('compare.baseline = "a\\u0000b"', "compare.baseline: holds a NUL character"),
        (f"compare.baseline = {'[' * 100_000}", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_file_and_key(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = error_of(text, "spdbench.toml", tmp_path, monkeypatch, capsys)
    assert "spdbench.toml: " in shown
    assert expected in shown


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("run", "allow-code-execution = true", TYPO),
        ("run", "events = 'log'", TYPO),
        ("report", "force = true", TYPO),
        ("run", "o = ['openai.base_url=http://elsewhere/v1']", "taken from the command line only"),
    ],
)
def test_a_folder_that_others_made_gives_no_permission(
    command: str,
    text: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "spdbench.toml").write_text(f"[{command}]\n{text}", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert run([command, "quick"]) == 2
    assert expected in capsys.readouterr().err


def test_the_nearest_file_counts_and_the_command_line_beats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.spdbench.run]\nmodel = './of-the-project'\nbackend = ['vanilla']")
    monkeypatch.chdir(inner)
    assert run(["run", "quick"]) == 2
    assert "./of-the-project" in capsys.readouterr().err
    (inner / "pyproject.toml").write_text("[another, tool")  # says nothing of spdbench, so nobody reads it
    assert run(["run", "quick"]) == 2
    assert "./of-the-project" in capsys.readouterr().err
    (inner / "spdbench.toml").write_text("[run]\nmodel = './nearest'")
    assert run(["run", "quick"]) == 2
    assert "./nearest" in capsys.readouterr().err
    assert run(["run", "quick", "-m", "./typed"]) == 2
    assert "./typed" in capsys.readouterr().err


def test_a_file_beats_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, version: 1, model: ./of-the-suite,"
        " prompts: {source: [{inline: [{id: a, category: b, turns: [hi]}]}]}}"
    )
    monkeypatch.chdir(tmp_path)
    assert run(["run", "mine.yaml"]) == 2
    assert "./of-the-suite" in capsys.readouterr().err
    (tmp_path / "spdbench.toml").write_text("[run]\nmodel = './of-the-file'")
    assert run(["run", "mine.yaml"]) == 2
    assert "./of-the-file" in capsys.readouterr().err


def completions(*words: str) -> list[str]:
    env = {
        **os.environ,
        "_SPDBENCH_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["spdbench", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([sys.executable, "-m", "spdbench"], env=env, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_a_shell_completes_commands_options_suites_and_backends() -> None:
    assert completions("co") == ["compare", "completion"]
    assert completions("run", "--keep") == ["--keep-drafts"]
    assert completions("run", "gs") == ["gsm8k"]
    assert completions("run", "quick", "-b", "me") == ["medusa"]
    assert completions("run", "quick", "--dtype", "float3") == ["float32"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_SPDBENCH_COMPLETE=" + shell in capsys.readouterr().out
