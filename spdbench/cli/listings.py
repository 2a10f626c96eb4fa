"""The commands that list things: `backends` with their `-o` options, and `suites`.

Each prints text for people, or JSON. No model is loaded.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click

from spdbench.cli.completion import complete_backends, complete_suites
from spdbench.cli.files import encodable, show_text
from spdbench.cli.options import PATH
from spdbench.cli.parameters import Argument, Option
from spdbench.console import printable, wrapped
from spdbench.errors import InputError, SpdbenchError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pydantic.fields import FieldInfo

    from spdbench.prompts.suite import SuiteListing

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_facts(facts: Any, lines: Iterable[str], as_json: bool) -> None:
    """`facts` as JSON, or `lines` for people, in which no text commands the terminal."""
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        text = "".join(f"{printable(line)}\n" for part in lines for line in part.split("\n"))
        show_text(text, lambda shown: click.echo(encodable(shown), nl=False))  # whose closed pipe ends the command


@click.command("backends", short_help="List installed backends and their options.")
@click.argument("name", cls=Argument, metavar="[NAME]", required=False, shell_complete=complete_backends)
@AS_JSON
def backends(name: str | None, as_json: bool) -> None:
    """List the installed backends, or only NAME, with what each takes as -o LABEL.KEY=VALUE."""
    from spdbench.backend import installed_backends

    points = installed_backends()
    if name is not None and name not in points:
        raise InputError(f"unknown backend '{name}'{did_you_mean(name, points)}")
    found = [listing(point) for point in points.values() if name in (None, point.name)]
    print_facts(found, ["\n\n".join(map(_text, found))], as_json)


@click.command("suites", short_help="List the suites, or show the prompts of one.")
@click.argument("name", cls=Argument, metavar="[SUITE]", required=False, shell_complete=complete_suites)
@click.option("--data", cls=Option, type=PATH, metavar="DIR", help="Where the suite's files lie.")
@AS_JSON
def suites(name: str | None, data: Path | None, as_json: bool) -> None:
    """List the suites that come with spdbench, and where each takes its prompts from; or show the prompts of SUITE.

    SUITE is the name of a shipped suite or a YAML file. The sources are tried in order, and the first that is there is
    used; a path is looked up below --data.
    """
    from spdbench.prompts.suite import list_suites, load_suite

    if name is not None:
        suite = load_suite(name, data)
        prompts = [asdict(prompt) for prompt in suite.prompts]
        title = f"{suite.name} v{suite.version}, from {suite.source}"
        print_facts(prompts, chain([title], map(_prompt_text, prompts)), as_json)
        return
    found = list_suites()
    print_facts([asdict(suite) for suite in found], map(_suite_text, found), as_json)


def _suite_text(suite: SuiteListing) -> str:
    count = "" if suite.num_prompts is None else f"  ({suite.num_prompts} prompts)"
    about = click.wrap_text(suite.description, 80, initial_indent="    ", subsequent_indent="    ")
    sources = (click.wrap_text(f"from {source}", 80, "    ", "      ") for source in suite.sources)
    return "\n".join([f"{suite.name}{count}", about, *sources])


def _prompt_text(prompt: Mapping[str, Any]) -> str:
    given = [f"[{message['role']}] {message['content']}" for message in prompt["context"]]
    texts = (wrapped(text, 80, "    ") for text in [*given, *prompt["turns"]])
    return "\n".join([f"{prompt['id']}  ({prompt['category']})", *texts])


def listing(point: EntryPoint) -> dict[str, Any]:
    """The facts of one installed backend; with an `error`, its kind, description and options are unknown."""
    from spdbench.backend import find_backend

    package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
    facts: dict[str, Any] = {
        "name": point.name,
        "package": package,
        "kind": None,
        "description": "",
        "options": [],
        "error": None,
    }
    try:
        found = find_backend(point.name)
        options = [option_facts(key, field) for key, field in found.Options.model_fields.items()]
        about = (inspect.getdoc(found) or "").partition("\n")[0]
        return {**facts, "kind": found.kind, "description": about, "options": options}
    except SpdbenchError as error:
        return {**facts, "error": str(error)}
    except Exception as error:  # a third party's options may be of any type
        return {**facts, "error": f"{point.value} cannot be imported: {type(error).__name__}: {error}"}


def option_facts(key: str, field: FieldInfo) -> dict[str, Any]:
    """The facts of one `-o` key; `type` and `help` are for people."""
    from pydantic_core import to_jsonable_python

    required = field.is_required()
    default = None if required else to_jsonable_python(field.get_default(call_default_factory=True), fallback=str)
    return {
        "key": key,
        "type": _type_name(field.annotation),
        "default": default,
        "required": required,
        "help": field.description or "",
    }


def _type_name(kind: Any) -> str:
    """A type in the words of a command line: `int`, `inline|process`, `int,int,...`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, UnionType):
        return "|".join(_type_name(part) for part in inner if part is not NoneType)
    if origin in (tuple, list, set, frozenset):
        part = _type_name(inner[0]) if inner else "text"
        return f"{part},{part},..."
    return {"str": "text", "bool": "true|false"}.get(name := getattr(kind, "__name__", str(kind)), name)


def _text(facts: Mapping[str, Any]) -> str:
    lines = [f"{facts['name']}  {facts['kind'] or 'cannot be used'}  (from {facts['package']})"]
    if about := facts["error"] or facts["description"]:
        lines.append(click.wrap_text(about, 80, "    ", "    "))
    for option in facts["options"]:
        lines.append(f"    -o {facts['name']}.{option['key']}={option['type']}  {default_text(option)}".rstrip())
        lines.append(click.wrap_text(option["help"], 80, "        ", "        "))
    return "\n".join(filter(None, lines))


def default_text(option: Mapping[str, Any]) -> str:
    """`[required]`, or what holds where the option is not given; empty where its help says that."""
    if option["required"]:
        return "[required]"
    return "" if option["default"] is None and "default:" in option["help"] else f"[default {_word(option['default'])}]"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_word, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
