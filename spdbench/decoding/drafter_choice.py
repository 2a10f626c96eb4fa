"""`--drafter`: where drafts come from, and the acceptance of synthetic ones: a rate, rates by position, or a length."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    gets a verdict. The last one also holds at later positions. `num_levels` is how deep drafts must be at least.
    `title` is what results say: `text`, but without the name of a file.
    """

    kind: DrafterKind
    text: str
    rates: tuple[float, ...] = ()
    num_levels: int = 0
    title: str = ""

    @property
    def is_synthetic(self) -> bool:
        return self.kind in ("oracle", "forced")

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
    hint = did_you_mean(kind, ("auto", "oracle:P", "forced:P", "random"))
    raise InputError(f"--drafter {text}: no such file or folder{hint}")


def _synthetic(kind: Literal["oracle", "forced"], text: str, acceptance: str) -> DrafterChoice:
    name = acceptance.partition("#")[0]
    value: Any
    if Path(name).suffix in (".json", ".yaml", ".yml"):
        value, title = _value_in_file(acceptance), ""
    elif acceptance.startswith(LENGTH):
        value, title = _number(acceptance.removeprefix(LENGTH)), text
    else:
        value, title = [_number(word) for word in acceptance.split(",")], text
    if isinstance(value, list):
        rates, num_levels = tuple(map(_rate, value)), 0
        title = title or f"{kind}:{','.join(f'{rate:.4g}' for rate in rates)}"
    else:
        rates, num_levels = _rates_of_length(value)
        title = title or f"{kind}:{LENGTH}{value:g}"
    return DrafterChoice(kind, text, rates, num_levels, title)


def _rates_of_length(length: float) -> tuple[tuple[float, ...], int]:
    """Rates whose mean acceptance length is `length`, and how deep drafts must be for it.

    Of all rates with this mean these vary least, as vLLM, SGLang and ATOM simulate a length: 2.5 accepts one draft
    always and a second one in half of the rounds.
    """
    if not 1.0 <= length <= MAX_LENGTH:
        raise ValueError(f"tau is a length from 1 to {MAX_LENGTH}, not {length:g}")
    always, share = int(length - 1.0), (length - 1.0) % 1.0
    return (*([1.0] * always), *([share] if share else []), 0.0), always + (share > 0)


def _value_in_file(words: str) -> list[Any] | float:
    """Rates by position in a list, or an acceptance length, from a result file or a file of golden values."""
    name, _, keys = words.partition("#")
    path = typed_path(name)
    value = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if isinstance(value, Mapping) and isinstance(summary := value.get("summary"), Mapping):
        overall = summary.get("overall")
        measured = overall if isinstance(overall, Mapping) else {}
        rates = measured.get("acceptance_by_position") or [measured.get("acceptance_rate")]
        if rates == [None]:
            raise ValueError("that result has no acceptance by position, and no acceptance rate")
        return list(rates)
    places = dict(_places(value))
    chosen = places.get(keys) if keys or len(places) != 1 else next(iter(places.values()))
    if chosen is None:
        listed = ", ".join(list(places)[:MAX_NAMED]) or "none"
        raise ValueError(f"which value of the file? After # may come: {listed}")
    return chosen if isinstance(chosen, list) else _number(chosen)


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
