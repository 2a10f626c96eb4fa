"""The `spdbench` command as the shell sees it: what it loads, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from spdbench import __version__
from spdbench.cli import main as entry
from spdbench.cli.examples import EXAMPLES
from spdbench.errors import InputError, NotComparableError, SpdbenchError

HEAVY = ("rich", "pydantic", "yaml", "torch", "transformers", "numpy", "tabulate")
RESULTS = Path(__file__).parents[1] / "fixtures" / "results"
LOADED = """
import json, sys
from spdbench.cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def loaded_by(*args: str) -> tuple[int, set[str]]:
    """The exit code of a command line in a fresh process, and the modules it loaded."""
    done = subprocess.run([sys.executable, "-c", LOADED, *args], capture_output=True, text=True, check=True)
    code, names = json.loads(done.stderr.splitlines()[-1])
    return code, set(names)


def spdbench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spdbench", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Replaces every command by one that raises what it is given."""

    def install(error: BaseException) -> None:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setattr(entry.LazyGroup, "get_command", lambda *_: command)

    return install


@pytest.mark.parametrize("args", [("--help",), ("-h",), ("--version",)])
def test_help_and_version_load_only_click(args: tuple[str, ...]) -> None:
    code, names = loaded_by(*args)
    assert code == 0
    assert "click" in names
    assert names.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "args",
    [
        ("compare", str(RESULTS / "vanilla.json"), str(RESULTS / "spd_oracle.json")),
        ("compare", "--help"),
        ("check", "--help"),
        ("run", "--help"),
        ("eval", "--help"),
        ("env", "--help"),
        ("backends",),
        ("suites",),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_loads_neither_torch_nor_transformers(args: tuple[str, ...]) -> None:
    code, names = loaded_by(*args)
    assert code == 0
    assert names.isdisjoint({"torch", "transformers"})


def test_help_names_every_command_and_what_it_does() -> None:
    text = spdbench("--help").stdout
    for name, command in entry.COMMANDS.items():
        assert f"  {name} " in text
        assert command.help in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", list(entry.COMMANDS))
def test_a_commands_help_in_the_overview_is_its_own(name: str) -> None:
    group = entry.LazyGroup("spdbench")
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert command.short_help == entry.COMMANDS[name].help
    assert command.name == name


@pytest.mark.parametrize("name", [name for name in entry.COMMANDS if name != "lm-eval"])  # which prints lm-eval's own
def test_help_ends_with_examples_that_the_command_takes(name: str) -> None:
    shown = spdbench(name, "--help").stdout.partition("Examples:\n")[2].splitlines()
    assert [line.strip() for line in shown] == list(EXAMPLES[name])
    group = entry.LazyGroup("spdbench")
    command = group.get_command(click.Context(group), name)
    assert command is not None
    for line in EXAMPLES[name]:
        program, said, *words = shlex.split(line.partition(" >")[0])
        assert (program, said) == ("spdbench", name)
        command.make_context(name, words).close()


def test_version() -> None:
    assert spdbench("--version").stdout == f"spdbench, version {__version__}\n"


def test_no_arguments_is_wrong_usage_and_shows_the_help() -> None:
    done = spdbench()
    assert done.returncode == 2
    assert "Commands:" in done.stderr


def test_a_message_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted-secret")
    for words in (("compare", "/none/hf_planted-secret"), ("run", "quick", "--limit", "hf_planted-secret")):
        said = spdbench(*words)
        assert said.returncode == 2
        assert "***" in said.stderr
        assert "planted" not in said.stderr


def test_an_unknown_command_is_answered_with_the_nearest_one() -> None:
    done = spdbench("comapre", "x.json")
    assert done.returncode == 2
    assert "unknown command 'comapre'; did you mean 'compare'?" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("run",), "SUITE"),
        (("run", "quick", "--limit", "0"), "--limit"),
        (("run", "quick", "--temperature", "-1"), "--temperature"),
        (("run", "quick", "--no-such-option"), "--no-such-option"),
        (("run", "quik"), "did you mean 'quick'?"),
        (("run", "quick", "-b", "spdd"), "did you mean 'spd'?"),
        (("run", "quick", "-o", "spd.stage=3"), "did you mean 'stages'?"),
        (("run", "quick", "-o", "stages=3"), "LABEL.KEY=VALUE"),
        (("compare",), "RESULT"),
        (("compare", "no-such-file.json"), "no-such-file.json"),
        (("check", "no-such-file.json"), "--baseline"),
        (("backends", "vanila"), "did you mean 'vanilla'?"),
        (("--no-such-option",), "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_says_what_is_wrong_and_exits_with_2(
    args: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry.run(args) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "section"),
    [(SpdbenchError, 1, "something-failed"), (InputError, 2, None), (NotComparableError, 4, "not-comparable")],
)
def test_our_own_errors_are_one_line_an_exit_code_and_where_to_read_on(
    error: type[SpdbenchError],
    code: int,
    section: str | None,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error("it went wrong"))
    with pytest.raises(SystemExit) as caught:
        entry.main(["run"])
    assert caught.value.code == code
    assert capsys.readouterr() == (
        "",
        "Error: it went wrong\n" + (f"See docs/troubleshooting.md#{section}.\n" if section else ""),
    )


def test_an_interrupt_is_one_line_and_exit_code_130(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(KeyboardInterrupt())
    assert entry.run(["run"]) == 130
    printed = capsys.readouterr()
    assert printed.err.strip() == "Interrupted."
    assert printed.out == ""


def test_a_bug_escapes_with_its_traceback_and_exit_code_1() -> None:
    script = (
        "import click\nfrom spdbench.cli import main\n"
        "def broken(): raise ZeroDivisionError('a bug')\n"
        "main.LazyGroup.get_command = lambda *_: click.Command('run', callback=broken)\n"
        "main.main(['run'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")


@pytest.mark.parametrize("args", ["suites", "backends", "suites --json", "--help"])
def test_a_reader_that_has_had_enough_gets_no_traceback(args: str) -> None:
    for reader in ("head -n 1", "true"):  # one that reads a line, one that is gone before the first
        pipe = f"set -o pipefail; {shlex.quote(sys.executable)} -m spdbench {args} | {reader}"
        done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False)
        assert done.returncode in (0, entry.BROKEN_PIPE)
        assert done.stderr == ""


def test_an_early_closed_pipe_ends_as_other_tools_do() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "spdbench", "suites"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (entry.BROKEN_PIPE, "")


def test_listings_are_written_where_the_encoding_is_narrow() -> None:
    command = [sys.executable, "-m", "spdbench", "suites"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("command", ["backends", "suites", "env"])
def test_a_full_stdout_is_one_message(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "spdbench", command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert "Error: the output cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--repeats", "100000000"], ["--warmup", "1000000000"]], ids=" ".join)
def test_a_number_that_would_take_for_ever_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["run", "quick", "-b", "vanilla", *words]) == 2
    assert "is not in the range" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a" * 5000, f"{'a' * 200}/" * 30, "é" * 700])
@pytest.mark.parametrize(
    "words", [["run"], ["compare"], ["results"], ["answers"], ["sweep"], ["train"], ["show"], ["import"]], ids=" ".join
)
def test_a_name_of_thousands_of_letters_is_a_short_message(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"run": ["-b", "vanilla"], "train": ["--data", "x", "--out", "y"]}.get(words[0], [])
    assert entry.run([*words, name, *more]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err) < 700
    assert "characters)" in shown.err
