"""`spdbench completion`: the script that makes a shell complete commands, options, suites, backends and files; and what
it offers for words whose kind click does not know.

The scripts are our own where click's lose words: theirs drop names next to files, and what stands before a `=`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from spdbench.cli.options import argument, complete_files, takes

RECIPES = "spdbench.recipes"


def complete_suites(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem[str]]:
    """What a shell offers for SUITE: shipped suites, and files."""
    from spdbench.prompts.suite import shipped_suites

    return [*_beginning(begun, shipped_suites()), *complete_files(context, parameter, begun)]


def complete_backends(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem[str]]:
    """What a shell offers for `-b [LABEL=]BACKEND`."""
    from spdbench.backend import installed_backends

    label, equals, _ = begun.rpartition("=")
    return _beginning(begun, [label + equals + each for each in installed_backends()])


def complete_methods(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem[str]]:
    """What a shell offers for METHOD of `train`."""
    from importlib.metadata import entry_points  # a slow import, which `--help` does without

    return _beginning(begun, sorted(entry_points(group=RECIPES).names))


def _beginning(begun: str, names: Iterable[str]) -> list[CompletionItem[str]]:
    return [CompletionItem(name) for name in names if name.startswith(begun)]


class _WholeWords(ShellComplete):
    """Completions are whole words as typed: `--dtype=float32`, where click gives what comes behind the `=`."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        found = super().get_completions(args, incomplete)
        name, equals, _ = incomplete.partition("=")
        if not (name.startswith("-") and equals):
            return found
        return [CompletionItem(name + equals + each.value, each.type, each.help) for each in found]


@add_completion_class
class Bash(_WholeWords, BashComplete):
    """Words are split as the shell's grammar does. bash itself splits them at `=` and `:` too, and replaces only the
    last piece, so completions are cut there. `-o default` offers files where there is nothing else, and is all of it
    that bash 3.2, macOS's, knows."""

    name: ClassVar[str] = "bash"
    source_template: ClassVar[str] = """\
%(complete_func)s() {
    local IFS=$'\\n' found kind value
    COMPREPLY=()
    found=$(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \
%(complete_var)s=bash_complete "$1" 2>/dev/null)
    while IFS=',' read -r kind value; do
        if [[ $kind == plain ]]; then
            COMPREPLY+=("$value")
        elif [[ $kind == file ]]; then
            COMPREPLY+=($(compgen -f -- "$value"))
            compopt -o filenames 2>/dev/null
        elif [[ $kind == dir ]]; then
            COMPREPLY+=($(compgen -d -- "$value"))
            compopt -o filenames 2>/dev/null
        fi
    done <<< "$found"
    return 0
}
complete -o bashdefault -o default -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null ||
    complete -o bashdefault -o default -F %(complete_func)s %(prog_name)s
"""

    def source(self) -> str:
        return ShellComplete.source(self)  # bash's version does not matter

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        marked = split_arg_string(line + "\1")  # shows where the last word ends, if there is one
        return marked[1:-1], marked[-1].removesuffix("\1")

    def format_completion(self, item: CompletionItem[Any]) -> str:
        _, begun = self.get_completion_args()
        breaks = os.environ.get("COMP_WORDBREAKS", "=:")
        cut = max((begun.rfind(sign) + 1 for sign in "=:" if sign in breaks), default=0)
        kept = item.value[cut:] if item.value.startswith(begun[:cut]) else item.value
        return f"{item.type},{kept}"


@add_completion_class
class Zsh(_WholeWords, ZshComplete):
    """Files are completed behind a `=`."""

    name: ClassVar[str] = "zsh"
    source_template: ClassVar[str] = ZshComplete.source_template.replace(
        "            _path_files -/", "            compset -P '*='; _path_files -/"
    ).replace("            _path_files -f", "            compset -P '*='; _path_files -f")


@add_completion_class
class Fish(_WholeWords, FishComplete):
    """Names with commas stay whole. Files and folders are completed behind a `=` as well, which stays before them."""

    name: ClassVar[str] = "fish"
    source_template: ClassVar[str] = """\
function %(complete_func)s_paths;
    $argv[1] $argv[2];
    set -l head (string match -r '^.*=' -- $argv[2]); or return 0;
    for found in ($argv[1] (string replace -- $head '' $argv[2]));
        echo $head$found;
    end;
end;
""" + re.sub(
        r"(__fish_complete_\w+ \$metadata)",
        r"%(complete_func)s_paths \1",
        FishComplete.source_template.replace('string split ","', 'string split -m1 ","'),
    )


SHELLS: dict[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": Fish}


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """For which shell."""

    shell: str = argument("bash|zsh|fish", type=click.Choice(list(SHELLS)))


@click.command("completion", short_help="Print what makes a shell complete words of spdbench.")
@takes(CompletionOptions)
def command(options: CompletionOptions) -> None:
    """Print what makes a shell complete words of spdbench. For bash:

    eval "$(spdbench completion bash)"
    """
    from spdbench.cli.main import COMPLETE, spdbench

    click.echo(SHELLS[options.shell](spdbench, {}, "spdbench", COMPLETE).source())
