"""`spdbench env`: the facts on this machine that results record; with `--check`, what would fail in a long run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench import __version__
from spdbench.cli.listings import print_facts
from spdbench.cli.options import FOLDER, flag, option, takes
from spdbench.cli.parameters import MODEL
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.cli.readiness import Finding

WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """What is said of this machine."""

    check: bool = flag("--check", "Say what would fail or disturb a long run, and what to do; exit code 1 if it fails.")
    model: str | None = option("-m --model", MODEL, "MODEL", "With --check: the model of the run. [default: smollm2]")
    results: Path | None = option("--results", FOLDER, "DIR", "With --check: where it writes. [default: results]")
    as_json: bool = flag("--json", "Print JSON.")


@click.command("env", short_help="Show what results record about this machine, or check it.")
@takes(EnvOptions)
def command(options: EnvOptions) -> None:
    """Show what results record about this machine and its software.

    Results compare only where the fingerprint is the same. The read bandwidth is measured now and takes a moment. With
    --check, a line for each thing that a run needs says ok, warn or fail, and what to do.
    """
    if options.check:
        click.get_current_context().exit(_check(options))
    if options.model is not None or options.results is not None:
        raise InputError(f"{'--model' if options.model else '--results'}: goes with --check")
    import torch

    from spdbench.measure.environment import environment, git_state
    from spdbench.processors import usable_cores

    torch.set_num_threads(usable_cores())  # as `spdbench run` does by default
    found = {"spdbench": {"version": __version__, "git": git_state()}, "environment": environment()}
    print_facts(found, _lines(found), options.as_json)


def _check(options: EnvOptions) -> int:
    """The exit code: 1 if a run would fail."""
    from spdbench.cli.readiness import findings

    found = list(findings(options.model, options.results or Path("results")))
    print_facts([asdict(each) for each in found], map(_finding, found), options.as_json)
    return int(any(each.state == "fail" for each in found))


def _finding(found: Finding) -> str:
    head, room = f"{found.state:<5}{found.name + ':':<11}", " " * 16
    lines = [click.wrap_text(found.text, WIDTH, head, room)]
    lines += [click.wrap_text(found.remedy, WIDTH, f"{room}-> ", f"{room}   ")] if found.remedy else []
    return "\n".join(lines)


def _lines(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    git = found["spdbench"]["git"]
    yield _line("spdbench", found["spdbench"]["version"] + (f" (git {git})" if git else ""))
    for name, value in found["environment"].items():
        if isinstance(value, Mapping):
            yield from (_line(key, text) for key, text in value.items())
        elif name == "read_bandwidth_bytes_per_s":
            yield _line("read bandwidth", f"{value / 1e9:.1f} GB/s")
        elif name == "memory_bytes":
            yield _line("memory", f"{value / 2**30:.1f} GiB")
        else:
            yield _line(name, ", ".join(value) if isinstance(value, list) else value)


def _line(name: str, value: object) -> str:
    return f"{name + ':':<16} {'none' if value in (None, '') else value}"
