"""A profile: seconds of each part of decoding a model on one device, by number of rows and context length.

    layer context=128 rows=1      one layer of the target, the mean over all of them
    head rows=1                   the output head and its argmax
    forward rows=1                all layers and the head at once, as trees are chosen by
    draft method=spd ...          one draft: of a pipeline's drafter with so many stages, or of so many levels of a tree
    verify, host                  a verdict; a cycle's bookkeeping
    message bytes=64              a message from one process to another

A key is a name and its sorted `field=value` words; a part that a machine cannot measure is absent. A backend may keep
costs under names of its own. Imports no torch.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spdbench.errors import InputError, did_you_mean, short_repr, validated
from spdbench.input_files import parse_json, read_input

Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False, strict=True)]
Key = Annotated[str, Field(pattern=r"^[a-z]+( [a-z]+=[^ =]+)*$", max_length=300)]
FIELDS = {
    "layer": {"context", "rows"},
    "head": {"rows"},
    "message": {"bytes"},
    "verify": set(),
    "host": set(),
}
"""Parts that a projection reads by all of their fields."""
NUMBERS = {"context", "rows", "bytes", "levels", "stages"}
NUMBER = re.compile(r"[1-9][0-9]{0,14}")
WORK = {"layer", "head", "forward", "draft"}
"""Parts that take time on any device. A message, a verdict or a host may take none in a what-if."""
LEAST_S = 1e-9
"""Of such a part: simulated times are whole nanoseconds."""
ITEMSIZE = {"float32": 4}
"""Of dtypes that do not take 2 bytes."""


@dataclass(frozen=True)
class RowCosts:
    """Seconds of a target forward by number of rows: linear between and beyond those measured. Beyond them noise must
    not make a cost negative: more rows never take less than the last ones, and fewer than the first take at least their
    share of them."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def rising(cls, rows: Iterable[int], seconds: Iterable[float]) -> RowCosts:
        """Those of measured `seconds`, where each run that falls, which is noise, has its mean (isotonic regression by
        pooling adjacent violators; Ayer et al. 1955, doi:10.1214/aoms/1177728423)."""
        runs: list[tuple[float, int]] = []
        for each in seconds:
            mean, length = each, 1
            while runs and runs[-1][0] > mean:
                before, count = runs.pop()
                mean, length = (before * count + mean * length) / (count + length), count + length
            runs.append((mean, length))
        return cls(tuple(rows), tuple(mean for mean, length in runs for _ in range(length)))

    def __call__(self, num_rows: float) -> float:
        if len(self.rows) == 1:
            return self.seconds[0]
        right = min(max(bisect_left(self.rows, num_rows), 1), len(self.rows) - 1)
        left = right - 1
        slope = (self.seconds[right] - self.seconds[left]) / (self.rows[right] - self.rows[left])
        found = self.seconds[left] + slope * (num_rows - self.rows[left])
        least = self.seconds[-1] if num_rows > self.rows[-1] else self.seconds[0] * min(1.0, num_rows / self.rows[0])
        return max(found, least) if not self.rows[0] <= num_rows <= self.rows[-1] else found


class ModelShape(BaseModel):
    """The model that a profile is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    sha256: str
    dtype: str
    num_layers: int = Field(ge=1, le=2**16)
    hidden_size: int = Field(ge=1, le=2**24)


class Profile(BaseModel):
    """The file's content. `device` is a name for people; `machine` is equal for machines with comparable times."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["spdbench.profile/1"] = Field("spdbench.profile/1", alias="schema")
    created: str
    origin: Literal["measured", "computed"]
    device: str
    machine: str
    threads: int = Field(ge=0, le=2**16)
    model: ModelShape
    seconds: dict[Key, Seconds] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_costs(self) -> Profile:
        for key, seconds in self.seconds.items():
            _require_fields(key)
            if seconds < LEAST_S and parse_key(key)[0] in WORK:
                raise ValueError(f"seconds.{key}: has to be above 0, at least {LEAST_S}")
        sizes = [int(parse_key(key)[1]["bytes"]) for key in self.seconds if key.startswith("message ")]
        if sizes and self.row_bytes not in sizes:
            raise ValueError(
                f"model.hidden_size: a row of {self.model.hidden_size} numbers in {self.model.dtype} takes "
                f"{self.row_bytes} bytes, but messages are of {', '.join(map(str, sorted(sizes)))} bytes"
            )
        return self

    @property
    def row_bytes(self) -> int:
        """Of one hidden state."""
        return self.model.hidden_size * ITEMSIZE.get(self.model.dtype, 2)

    def costs(self, name: str, by: str = "rows", **same: object) -> RowCosts | None:
        """Seconds of `name` by the numbers of its field `by`, the other fields being `same`; None without any."""
        found = {}
        for key, seconds in self.seconds.items():
            title, fields = parse_key(key)
            if title == name and by in fields and {k: v for k, v in fields.items() if k != by} == _words(same):
                found[int(fields[by])] = seconds
        rows = sorted(found)
        return RowCosts(tuple(rows), tuple(found[count] for count in rows)) if rows else None

    def layer_s(self, rows: float, context: float) -> float | None:
        """Seconds of one layer of `rows` rows behind `context` tokens: linear between the contexts measured."""
        contexts = sorted({int(parse_key(key)[1]["context"]) for key in self.seconds if key.startswith("layer ")})
        at = [(each, costs(rows)) for each in contexts if (costs := self.costs("layer", context=each))]
        if not at:
            return None
        return RowCosts(tuple(each for each, _ in at), tuple(seconds for _, seconds in at))(context)

    def attention_s(self, rows: float, context: float) -> float:
        """The part of `layer_s` that grows with the context: keys and values of `context` tokens; 0 where one context
        was measured."""
        contexts = sorted({int(parse_key(key)[1]["context"]) for key in self.seconds if key.startswith("layer ")})
        if len(contexts) < 2:
            return 0.0
        ends = [self.layer_s(rows, each) or 0.0 for each in (contexts[0], contexts[-1])]
        return max(0.0, context * (ends[1] - ends[0]) / (contexts[-1] - contexts[0]))

    def head_s(self, rows: float) -> float | None:
        costs = self.costs("head")
        return costs(rows) if costs else None

    def message_s(self, num_bytes: float) -> float | None:
        costs = self.costs("message", by="bytes")
        return max(costs(num_bytes), 0.0) if costs else None

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def make_key(name: str, **fields: object) -> str:
    """The key of a part: `layer context=128 rows=1`."""
    return " ".join([name, *(f"{field}={value}" for field, value in sorted(_words(fields).items()))])


def parse_key(key: str) -> tuple[str, dict[str, str]]:
    """The name in a key, and its fields."""
    name, *words = key.split(" ")
    return name, dict(word.split("=", 1) for word in words)


def _require_fields(key: str) -> None:
    """Raises `ValueError` for a key without the fields of its part, with others, or with no whole number in one."""
    name, fields = parse_key(key)
    known = FIELDS.get(name)
    if known is not None and (wrong := sorted(fields.keys() - known)):
        raise ValueError(f"seconds.{key}: unknown field {wrong[0]}{did_you_mean(wrong[0], known)}")
    if missing := sorted((known or set()) - fields.keys()):
        raise ValueError(f"seconds.{key}: field {missing[0]} is missing")
    if name == "draft" and not fields.keys() & {"stages", "levels"}:
        raise ValueError(f"seconds.{key}: field stages (of a pipeline) or levels (of a tree) is missing")
    for field in sorted(NUMBERS & fields.keys()):
        if not NUMBER.fullmatch(fields[field]):
            raise ValueError(f"seconds.{key}: {field} is {short_repr(fields[field])}, no whole number above 0")
    if not re.fullmatch("[0-9]{1,9}", fields.get("threads", "0")):
        raise ValueError(f"seconds.{key}: threads is {short_repr(fields['threads'])}, no whole number")


def _words(fields: dict[str, object]) -> dict[str, str]:
    return {field: re.sub(r"[\s=]", "-", str(value)) for field, value in fields.items()}


def read_profile(path: Path) -> Profile:
    """The profile in `path`.

    Raises:
        InputError: it cannot be read, or is no profile.
    """
    raw = read_input(path)
    found = validated(Profile, raw, f"{path}: is no profile that this version reads: ")
    try:
        parse_json(raw)  # no key twice
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return found


def require_model(profile: Profile, source: str, sha256: str, dtype: str, num_layers: int | None, model: str) -> None:
    """Raises `InputError` for a profile of another model or dtype. A computed one depends on the model's shape too."""
    own = profile.model
    for what, found, wanted in (
        ("layers", own.num_layers, num_layers),
        ("dtype", own.dtype, dtype),
        ("weights", own.sha256[:12], sha256[:12]),
    ):
        if found != wanted:
            raise InputError(
                f"--profile {source}: is of {own.id} with {what} {found}, and the results of {model} with {wanted}. "
                f"Make one of that model: spdbench profile -m {model} --dtype {dtype} -o {source}"
            )


def nearest(numbers: Sequence[int], wanted: int) -> int:
    """The number closest to `wanted`, the smaller of two."""
    return min(numbers, key=lambda number: (abs(number - wanted), number))
