"""The `spdbench` command itself: what it imports, and what each way of ending tells the shell."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from spdbench import __version__
from spdbench.cli import main as cli
from spdbench.errors import InputError, NotComparableError, SpdbenchError

HEAVY = ("torch", "transformers", "rich", "pydantic", "numpy", "yaml", "tabulate")


def spdbench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "spdbench", *args], capture_output=True, text=True, check=False)


def imported_by(*args: str) -> set[str]:
    """Top-level modules that are loaded when `spdbench ARGS` is done."""
    script = (
        "import sys\n"
        "from spdbench.cli.main import run\n"
        "run(sys.argv[1:])\n"
        "print(' '.join({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=True)
    return set(done.stderr.split("\n")[-2].split())


def ending_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that raises `error`."""

    @click.command("env")
    def raises() -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: raises)
    return cli.run(["env"])


def test_help_imports_click_and_nothing_heavy() -> None:
    found = imported_by("--help")
    assert "click" in found
    assert not found & set(HEAVY)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_of_every_command_answers_without_torch(command: str) -> None:
    assert not imported_by(command, "--help") & {"torch", "transformers"}


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_one_line_help_in_the_table_is_the_commands_own(name: str) -> None:
    command = importlib.import_module(cli.COMMANDS[name].module).command
    assert (command.name, command.short_help) == (name, cli.COMMANDS[name].help)


def test_help_lists_every_command_and_goes_to_stdout() -> None:
    done = spdbench("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert command.help in done.stdout


def test_version_is_the_packages(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert __version__ in capfd.readouterr().out


def test_unknown_command_is_wrong_usage_and_names_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["comprae"]) == 2
    assert "unknown command 'comprae'; did you mean 'compare'?" in capfd.readouterr().err


@pytest.mark.parametrize("args", [[], ["--nonsense"], ["compare"], ["run", "quick", "--limit", "0"], ["suites", "x"]])
def test_wrong_usage_is_exit_code_2_and_says_so_on_stderr(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Usage: spdbench" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [(SpdbenchError("a"), 1), (InputError("b"), 2), (NotComparableError("c"), 4)],
)
def test_error_of_ours_is_one_message_and_its_own_exit_code(
    error: SpdbenchError, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ending_with(error, monkeypatch) == code
    assert capfd.readouterr() == ("", f"Error: {error}\n")


def test_interrupt_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ending_with(KeyboardInterrupt(), monkeypatch) == 130
    assert capfd.readouterr() == ("", "Interrupted.\n")


def test_commands_own_exit_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ending_with(click.exceptions.Exit(3), monkeypatch) == 3


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        ending_with(ZeroDivisionError(), monkeypatch)


def test_reader_that_stops_early_gets_silence() -> None:
    script = f"{sys.executable} -m spdbench backends --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 128 + signal.SIGPIPE)  # 0 if all was written before `true` ended


def test_broken_pipe_in_the_last_flush_is_silent_too() -> None:
    script = (
        "import os, sys\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "from spdbench.cli.main import main\n"
        "print('something that is still in the buffer')\n"
        "main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_python_dash_m_and_the_console_script_are_the_same_command() -> None:
    script = Path(sys.executable).with_name("spdbench")
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == spdbench("--help").stdout
