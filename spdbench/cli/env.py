"""`spdbench env`: the provenance that a result made here would carry."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import click

from spdbench import __version__


@click.command("env", short_help="Show what results record about this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as in a result file.")
def command(as_json: bool) -> None:
    """Show what results record about this machine and its software.

    Results compare only where the fingerprint is the same. The read bandwidth is measured now and takes a moment.
    """
    import torch

    from spdbench.measure.environment import environment, git_state

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # what `spdbench run` takes by default
    found = {"spdbench": {"version": __version__, "git": git_state()}, "environment": environment()}
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


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
