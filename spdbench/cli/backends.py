"""`spdbench backends`: what is installed, and the `-o` options of each. Loads classes, never models or torch."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pydantic.fields import FieldInfo

    from spdbench.backend import BackendOptions


@dataclass(frozen=True)
class Option:
    """One `-o` key. `required` has no default; `type` and `help` are for people."""

    key: str
    type: str
    default: Any
    required: bool
    help: str


@dataclass(frozen=True)
class Listing:
    """One installed backend; with an `error`, the rest of it is not known."""

    name: str
    package: str
    kind: str | None
    description: str
    options: tuple[Option, ...]
    error: str | None


@click.command("backends", short_help="List installed backends and their options.")
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the installed backends, or only NAME, with what each takes as -o LABEL.KEY=VALUE."""
    from spdbench.backend import installed_backends
    from spdbench.errors import InputError, did_you_mean

    points = installed_backends()
    if name is not None and name not in points:
        raise InputError(f"unknown backend '{name}'{did_you_mean(name, points)}")
    listings = [_listing(point) for point in points.values() if name in (None, point.name)]
    if as_json:
        click.echo(json.dumps([asdict(listing) for listing in listings], indent=2))
    else:
        click.echo("\n\n".join(map(_text, listings)))


def _listing(point: EntryPoint) -> Listing:
    from spdbench.backend import find_backend
    from spdbench.errors import SpdbenchError

    package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
    try:
        found = find_backend(point.name)
        options = tuple(_options(found.Options))
        about = (inspect.getdoc(found) or "").partition("\n")[0]
        return Listing(point.name, package, found.kind, about, options, None)
    except SpdbenchError as error:
        reason = str(error)
    except Exception as error:  # another's package may fail to import in any way; the list goes on
        reason = f"{point.value} cannot be imported: {type(error).__name__}: {error}"
    return Listing(point.name, package, None, "", (), reason)


def _options(options: type[BackendOptions]) -> list[Option]:
    return [_option(key, field) for key, field in options.model_fields.items()]


def _option(key: str, field: FieldInfo) -> Option:
    from pydantic_core import to_jsonable_python

    required = field.is_required()
    default = None if required else to_jsonable_python(field.get_default(call_default_factory=True), fallback=str)
    return Option(key, _type_name(field.annotation), default, required, field.description or "")


def _type_name(kind: Any) -> str:
    """A type in the words of a command line: `int`, `inline|process`, `int,int,...`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, UnionType):
        return "|".join(_type_name(part) for part in inner if part is not NoneType)
    if origin in (tuple, list, set, frozenset):
        part = _type_name(inner[0]) if inner else "text"
        return f"{part},{part},..."
    return {"str": "text", "bool": "true|false"}.get(name := getattr(kind, "__name__", str(kind)), name)


def _text(listing: Listing) -> str:
    lines = [f"{listing.name}  {listing.kind or 'cannot be used'}  (from {listing.package})"]
    if about := listing.error or listing.description:
        lines.append(click.wrap_text(about, 80, "    ", "    "))
    for option in listing.options:
        shown = "required" if option.required else f"default {_word(option.default)}"
        lines.append(f"    -o {listing.name}.{option.key}={option.type}  [{shown}]")
        lines.append(click.wrap_text(option.help, 80, "        ", "        "))
    return "\n".join(filter(None, lines))


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_word, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
