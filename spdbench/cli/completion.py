"""`spdbench completion`: the script that makes a shell complete commands, options, suites and backends."""

from __future__ import annotations

from dataclasses import dataclass

import click
from click.shell_completion import get_completion_class

from spdbench.cli.options import argument, takes

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """For which shell."""

    shell: str = argument("bash|zsh|fish", type=click.Choice(SHELLS))


@click.command("completion", short_help="Print what makes a shell complete words of spdbench.")
@takes(CompletionOptions)
def command(options: CompletionOptions) -> None:
    """Print what makes a shell complete words of spdbench. For bash:

    eval "$(spdbench completion bash)"
    """
    from spdbench.cli.main import COMPLETE, spdbench

    found = get_completion_class(options.shell)
    assert found is not None
    click.echo(found(spdbench, {}, "spdbench", COMPLETE).source())
