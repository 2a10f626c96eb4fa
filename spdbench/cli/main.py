"""The `spdbench` command: its commands, and the exit code of each way in which one ends.

Commands are imported when they are called, so that `--help` needs click and nothing else.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click
from click.shell_completion import shell_complete

from spdbench import __version__
from spdbench.cli.defaults import file_options
from spdbench.cli.examples import epilog
from spdbench.cli.terminal import Terminated
from spdbench.console import printable
from spdbench.errors import InputError, SpdbenchError, did_you_mean
from spdbench.measure.privacy import hide_secrets
from spdbench.output_files import write_failure

INTERRUPTED = 130  # 128 + SIGINT, as shells count
TERMINATED = 143  # 128 + SIGTERM
IMPOSSIBLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""Error numbers of paths that no file can have, wherever they came from."""
LONG_WORD = re.compile(r"(\S{60})\S{540,}")
COMPLETE = "_SPDBENCH_COMPLETE"
"""The variable by which a shell asks for completions, as click's scripts set it."""
BROKEN_PIPE = 141  # 128 + SIGPIPE: what any other tool in a pipe would end with


class LazyCommand(NamedTuple):
    """A command by where it is defined, `MODULE` as `command` or `MODULE:NAME`; `help` is its own short help."""

    place: str
    help: str


COMMANDS = {
    "run": LazyCommand("spdbench.cli.run.command", "Measure backends on a suite and compare them."),
    "sweep": LazyCommand("spdbench.cli.sweep.command", "Run a grid or a list of runs, here or on a cluster."),
    "train": LazyCommand("spdbench.cli.train.command", "Train a drafter on conversations."),
    "compare": LazyCommand("spdbench.cli.reading.compare", "Compare results: speed-ups, acceptance, outputs."),
    "report": LazyCommand("spdbench.cli.reading.report", "Draw a comparison: one HTML page, or one chart as a file."),
    "trace": LazyCommand("spdbench.cli.reading.trace", "Write what every lane did as a trace for Perfetto."),
    "show": LazyCommand("spdbench.cli.reading.show", "Show an answer token by token, with its drafts."),
    "answers": LazyCommand("spdbench.cli.reading.answers", "Show what was answered, label by label."),
    "results": LazyCommand("spdbench.cli.reading.results", "List result files, filter them, delete them."),
    "check": LazyCommand("spdbench.cli.reading.check", "Judge results against a baseline, for CI."),
    "project": LazyCommand("spdbench.cli.project.project", "Project results to a pipeline of n devices."),
    "profile": LazyCommand("spdbench.cli.project.profile", "Measure what each part of decoding costs on a device."),
    "import": LazyCommand("spdbench.cli.exports.command", "Read exports of aiperf and guidellm into results."),
    "audit": LazyCommand("spdbench.cli.audit.command", "Check that backends give the target's own outputs."),
    "distill": LazyCommand("spdbench.cli.distill.command", "Let the target write training data by itself."),
    "eval": LazyCommand("spdbench.cli.evaluate.eval", "Score backends on lm-eval's tasks."),
    "lm-eval": LazyCommand("spdbench.cli.evaluate.lm_eval", "lm-eval's own command line, with our backends."),
    "backends": LazyCommand("spdbench.cli.listings:backends", "List installed backends and their options."),
    "suites": LazyCommand("spdbench.cli.listings:suites", "List the suites, or show the prompts of one."),
    "completion": LazyCommand("spdbench.cli.completion", "Print what makes a shell complete words of spdbench."),
    "env": LazyCommand("spdbench.cli.env", "Show what results record about this machine, or check it."),
}


WITHOUT_FILE = ("completion", "lm-eval")
"""Commands without options that a file can set: they work whatever is wrong with the file. Shells call `completion`."""


def _asks_for_help(group: click.Context, command: click.Command, words: Sequence[str]) -> bool:
    """True if `words` hold --help as an option, not as the value of another."""
    context = click.Context(command, parent=group, resilient_parsing=True)
    option = command.get_help_option(context)
    try:
        given, _, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError:
        return False
    return option is not None and option.name in given


class LazyGroup(click.Group):
    """A group whose commands are named in `COMMANDS` and imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name or "command")
        command.epilog = epilog(cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"unknown command '{args[0]}'{did_you_mean(args[0], COMMANDS)}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None and not ctx.resilient_parsing:
            try:
                ctx.default_map = {} if name in WITHOUT_FILE else {name: file_options(command, name, COMMANDS)}
            except InputError:
                if not _asks_for_help(ctx, command, rest):
                    raise
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine; 1 a regression, a failed prompt or a wrong output; 2 wrong usage or input; "
    "3 inconclusive; 4 not comparable.",
)
@click.version_option(__version__, prog_name="spdbench")
def spdbench() -> None:
    """Does speculative decoding pay? Measures it against plain decoding on real prompts."""


def main(args: Sequence[str] | None = None) -> None:
    """The console entry point: runs one command line and leaves with its exit code."""
    words = sys.argv[1:] if args is None else args
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit(importlib.import_module("spdbench.cli.ranks").run_rank(words))
    sys.exit(run(words))


def _shown(message: str) -> str:
    """`message` as a terminal or a log may show it, without the middle of words that are no words."""
    shown = printable(hide_secrets(message))
    return LONG_WORD.sub(lambda found: f"{found[1]}... ({len(found[0]):,} characters)", shown)


def run(args: Sequence[str]) -> int:
    """Runs one command line and returns its exit code. An exception that is a bug escapes as it is."""
    try:
        code = _invoke(list(args))
        sys.stdout.flush()
        return code
    except SpdbenchError as error:
        click.echo(f"Error: {_shown(str(error))}", err=True)
        if error.names_page:
            click.echo(f"See {error.see}.", err=True)
        return error.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(_shown(shown.getvalue()), err=True, nl=False)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo("Interrupted.", err=True)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return BROKEN_PIPE
    except Exception as error:  # libraries that are not written in Python have errors of their own
        if isinstance(error, OSError) and error.errno in IMPOSSIBLE_PATH:
            click.echo(f"Error: {_shown(f'{error.filename}: {error.strerror}')}", err=True)
            return InputError.exit_code
        if isinstance(error, FileNotFoundError) and _folder_is_gone():
            click.echo("Error: the current folder was deleted; change to one that is there", err=True)
            return InputError.exit_code
        if (reason := write_failure(error)) is None:
            raise
        _silence_stdout()
        click.echo(f"Error: the output cannot be written ({reason}); what is in files is safe", err=True)
        return InputError.exit_code


def _invoke(args: list[str]) -> int:
    # Not spdbench.main(): click would handle interrupts and broken pipes in its own way.
    if instruction := os.environ.get(COMPLETE):
        importlib.import_module("spdbench.cli.completion")  # defines our shells
        return shell_complete(spdbench, {}, "spdbench", COMPLETE, instruction)
    try:
        with spdbench.make_context("spdbench", args) as context:
            spdbench.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


def _folder_is_gone() -> bool:
    """True if the current folder was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _silence_stdout() -> None:
    """Replaces a stdout that cannot be written, about which Python's last flush at exit would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
