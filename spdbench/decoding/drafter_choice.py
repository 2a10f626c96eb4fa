"""`--drafter`: where drafts come from, and the acceptance of synthetic ones: a rate, rates by position, or a length."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spdbench.console import counted
from spdbench.errors import InputError, did_you_mean
from spdbench.input_files import parse_yaml, read_input, read_json
from spdbench.models.checkpoints.folders import typed_path

DrafterKind = Literal["auto", "path", "oracle", "forced", "random"]
LENGTH = "tau="
SYNTAX = "an acceptance from 0 to 1, one for each position (0.8,0.6), tau=LENGTH, a result file, or FILE.yaml#KEY/KEY"
MAX_LENGTH = 4096
MAX_NAMED = 8


@dataclass(frozen=True)
class DrafterChoice:
    """The user's choice of a drafter: `--drafter`.

    `rates` are those of a synthetic drafter: the probability that the draft at position 1, 2, ... is accepted if it
    gets a verdict. The last one also holds at later positions, of drafts that may be deeper than `max_levels`.
    `num_levels` is how deep drafts must be at least, `max_levels` how deep they may be, None for any depth. `title` is
    what results say: `text`, but without the name of a file. `note` says what was taken from a result.
    """

    kind: DrafterKind
    text: str
    rates: tuple[float, ...] = ()
    num_levels: int = 0
    title: str = ""
    max_levels: int | None = None
    note: str = ""

    @property
    def is_synthetic(self) -> bool:
        return self.kind in ("oracle", "forced")

    def depth(self, usual: int, largest: int) -> int:
        """How deep to draft where `usual` is the default: as deep as a mean length takes, if `largest` allows it, and
        no deeper than rates are known."""
        return min(max(usual, min(self.num_levels, largest)), self.max_levels or largest)

    @property
    def path(self) -> Path:
        return typed_path(self.text)


def parse_drafter(text: str) -> DrafterChoice:
    """`auto`, `random`, `oracle:P`, `forced:P`, or a path. P is an acceptance, see `SYNTAX`.

    Raises:
        InputError: none of these, or P is no acceptance.
    """
    if text in ("auto", "random"):
        return DrafterChoice("auto" if text == "auto" else "random", text)
    kind, _, acceptance = text.partition(":")
    if kind in ("oracle", "forced"):
        try:
            return _synthetic("oracle" if kind == "oracle" else "forced", text, acceptance)
        except ValueError as error:
            example = "" if acceptance else f" (for example {kind}:0.8)"
            raise InputError(f"--drafter {text}: {kind} needs {SYNTAX}{example}; {error}") from None
    if os.path.exists(typed_path(text)):  # Path.exists raises for names too long to be one
        return DrafterChoice("path", text)
    raise InputError(f"--drafter {text}: no such file or folder{_nearest(text)}")


def _nearest(text: str) -> str:
    """A file or folder next to that path with a name like it, else the word that was meant."""
    folder, name = os.path.split(typed_path(text))
    with suppress(OSError, ValueError):
        if close := difflib.get_close_matches(name, os.listdir(folder or "."), n=1):
            return f"; did you mean '{os.path.join(os.path.dirname(text), close[0])}'?"
    return did_you_mean(text.partition(":")[0], ("auto", "oracle:P", "forced:P", "random"))


def _synthetic(kind: Literal["oracle", "forced"], text: str, acceptance: str) -> DrafterChoice:
    name = acceptance.partition("#")[0]
    value: Any
    max_levels, note, title = None, "", ""
    if Path(name).suffix in (".json", ".yaml", ".yml"):
        value, max_levels, note = _value_in_file(acceptance)
    elif acceptance.startswith(LENGTH):
        value, title = _number(acceptance.removeprefix(LENGTH)), text
    else:
        value, title = [_number(word) for word in acceptance.split(",")], text
    if isinstance(value, list):
        if not value:
            raise ValueError("the list of rates is empty")
        rates, num_levels = tuple(map(_rate, value)), 0
        title = title or f"{kind}:{','.join(f'{rate:.4g}' for rate in rates)}"
    else:
        rates, num_levels = _rates_of_length(value)
        title = title or f"{kind}:{LENGTH}{value:g}"
    return DrafterChoice(kind, text, rates, num_levels, title, max_levels, note)


def _rates_of_length(length: float) -> tuple[tuple[float, ...], int]:
    """Rates whose mean acceptance length is `length`, and how deep drafts must be for it.

    Of all rates with this mean these vary least, as vLLM, SGLang and ATOM simulate a length: 2.5 accepts one draft
    always and a second one in half of the rounds.
    """
    if not 1.0 <= length <= MAX_LENGTH:
        raise ValueError(f"tau is a length from 1 to {MAX_LENGTH}, not {length:g}")
    always, share = int(length - 1.0), (length - 1.0) % 1.0
    return (*([1.0] * always), *([share] if share else []), 0.0), always + (share > 0)


def _value_in_file(words: str) -> tuple[list[Any] | float, int | None, str]:
    """From a result file or a file of golden values: rates by position in a list, or an acceptance length; how many
    positions they are known at, None where that is no limit; and a note on what was taken."""
    name, _, keys = words.partition("#")
    path = typed_path(name)
    value = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if isinstance(value, Mapping) and isinstance(summary := value.get("summary"), Mapping):
        overall = summary.get("overall")
        return _value_in_result(overall if isinstance(overall, Mapping) else {})
    places = dict(_places(value))
    chosen = places.get(keys) if keys or len(places) != 1 else next(iter(places.values()))
    if chosen is None:
        listed = ", ".join(list(places)[:MAX_NAMED]) or "none"
        raise ValueError(f"which value of the file? After # may come: {listed}")
    return (chosen if isinstance(chosen, list) else _number(chosen)), None, ""


def _value_in_result(overall: Mapping[str, Any]) -> tuple[list[Any] | float, int | None, str]:
    """As `_value_in_file`, from a result's metrics: the most exact acceptance that it has. A server may report means
    alone."""
    rates, length, rate = (
        overall.get(name) for name in ("acceptance_by_position", "acceptance_length", "acceptance_rate")
    )
    if isinstance(rates, list) and rates:
        known = f"the result has the acceptance of {counted(len(rates), 'position')}"
        return rates, len(rates), f"{known}: rounds draft no deeper, a pipeline goes on with the last"
    unknown = "the result has no acceptance by position"
    if length is not None:
        return _number(length), None, f"{unknown}: its mean length is taken, tau={_number(length):.4g}"
    if rate is not None:
        return [rate], None, f"{unknown}, and no mean length: its acceptance rate is taken at every position"
    raise ValueError("that result has no acceptance by position, no mean acceptance length and no acceptance rate")


def _read_yaml(path: Path) -> Any:
    return parse_yaml(read_input(path))


def _places(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every number and every list in nested mappings, by the keys on the way to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _places(inner, (*keys, str(key)))
    elif isinstance(value, int | float | list) and not isinstance(value, bool):
        yield "/".join(keys), value


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def _rate(value: Any) -> float:
    rate = _number(value)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{rate:g} is not from 0 to 1")
    return rate
