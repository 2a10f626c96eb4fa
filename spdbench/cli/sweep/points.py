"""A sweep's YAML file as points: each is one `spdbench run`, checked as far as that goes without weights.

Keys are the options of `run` under their names in `RunOptions`, so that each option of `run` can be swept.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spdbench.backend import find_backend, parse_options
from spdbench.cli.defaults import file_options
from spdbench.cli.main import COMMANDS
from spdbench.cli.options import LABEL, parse_backend_options, parse_drafters, parse_labels, require_concurrent
from spdbench.cli.run.command import DEFAULT_BACKENDS, RunOptions, command
from spdbench.cli.run.settings import SETTINGS, Settings, merged, parse_words, run_words
from spdbench.decoding.drafter_choice import parse_drafter
from spdbench.errors import InputError, did_you_mean, first_problem
from spdbench.input_files import parse_yaml, read_input
from spdbench.prompts.suite import load_suite

OWN = {"results", "name", "resume", "quiet", "events"}
"""Options of `run` that a sweep sets itself."""
KEYS = [name for name in SETTINGS if name not in OWN]
MOST_POINTS = 10_000
LONGEST_SLUG = 60
ADDRESS = re.compile(r"(?:^|(?<=[.]))base_url=.*", re.DOTALL)
"""Where a server is, in an option's word."""


class SweepFile(BaseModel):
    """A sweep as written: `fixed` settings of all points, and those that differ: every one of `points` with every
    combination of `grid`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fixed: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    points: list[dict[str, Any]] = Field([], max_length=MOST_POINTS)
    slurm: dict[str, Any] = {}


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its `words` after `spdbench run`, without where its results go. `name` follows from the words
    and the suite's content, so it stays the same whatever else changes in the file. `settings` are the point's own,
    `all_settings` those of the whole file and of `spdbench.toml` as well, of which the words are made. `model` is the
    one that words or suite name, and `devices` are those that the words name."""

    name: str
    settings: Settings
    all_settings: Settings
    words: tuple[str, ...]
    suite: str
    labels: tuple[str, ...]
    model: str | None
    devices: tuple[str, ...]

    @property
    def num_gpus(self) -> int:
        return sum(device.startswith("cuda") for device in self.devices)

    def command(self, results: Path | str) -> list[str]:
        """The whole command."""
        return [sys.executable, "-m", "spdbench", "run", *self.arguments(results)]

    def arguments(self, results: Path | str) -> list[str]:
        return [*self.words, "--results", str(results), "--name", self.name, "--resume"]

    def shown(self, results: Path) -> str:
        """The command as a person types it."""
        return shlex.join(["spdbench", "run", *self.arguments(results)])


def read_sweep(path: Path) -> tuple[SweepFile, list[Point]]:
    """The file and its points, at least one, each different.

    Raises:
        InputError: a mistake in it; names the key, the value and what is allowed.
    """
    try:
        data = parse_yaml(read_input(path))
    except ValueError as error:
        raise InputError(f"{path}{error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a sweep is a mapping with name, fixed, grid or points")
    try:
        file = SweepFile.model_validate(data)
    except ValidationError as error:
        loc, reason = first_problem(error)
        hint = did_you_mean(loc[0], SweepFile.model_fields) if error.errors()[0]["type"] == "extra_forbidden" else ""
        raise InputError(f"{path}: {'.'.join(loc)}: {'unknown key' + hint if hint else reason}") from None
    if not LABEL.fullmatch(file.name) or file.name.startswith("."):
        raise InputError(
            f"{path}: name: {file.name!r} has to be letters, digits and .+- with single _ between, and no dot first: "
            "it names the folder of the results"
        )
    merged(f"{path}: fixed", {"suite": ""}, file.fixed | {"suite": ""}, KEYS)  # finds unknown keys where they are
    reader = _Reader(file.fixed, file_options(command, "run", COMMANDS))
    points = [reader.point(f"{path}: {where}", own) for where, own in _combinations(path, file)]
    counts = Counter(point.name for point in points)
    if repeated := [point for point in points if counts[point.name] > 1]:
        raise InputError(f"{path}: a point is there twice: {dict(repeated[-1].settings)}")
    return file, points


def _combinations(path: Path, file: SweepFile) -> Iterator[tuple[str, Settings]]:
    """What differs between the points, and where in the file it is."""
    if not file.grid and not file.points:
        raise InputError(f"{path}: nothing to sweep: give a grid (key: [values]) or points (a list of settings)")
    for key, values in file.grid.items():
        if not values:
            raise InputError(f"{path}: grid.{key}: is empty; give at least one value")
    count = max(1, len(file.points))
    for values in file.grid.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise InputError(f"{path}: {count:,} points; {MOST_POINTS:,} are possible")
    for number, listed in enumerate(file.points or [{}]):
        where = f"points.{number}" if file.points else "grid"
        for combination in itertools.product(*file.grid.values()):
            yield where, {**_flat(listed), **_flat(dict(zip(file.grid, combination, strict=True)))}


def _flat(settings: Settings) -> Settings:
    """A mapping of `options` as single settings `options.LABEL.KEY`."""
    nested = settings.get("options")
    if not isinstance(nested, dict):
        return settings
    others = {key: value for key, value in settings.items() if key != "options"}
    return {**others, **{f"options.{key}": value for key, value in nested.items()}}


class _Reader:
    """Makes points of what differs between them. `fixed` is common to all; `defaults` are options that
    `spdbench.toml` sets, which each run reads as well."""

    def __init__(self, fixed: Settings, defaults: Settings) -> None:
        self._fixed = fixed
        self._defaults = defaults
        self._addresses: dict[str, str] = {}
        self._suites: dict[tuple[str, Any], tuple[str, str, str | None]] = {}
        self._backend = cache(find_backend)  # which looks through all installed packages

    def point(self, where: str, own: Settings) -> Point:
        settings: Settings = merged(where, self._fixed, own, KEYS)
        try:
            options = parse_words([*run_words(where, settings)], self._defaults)
            labels = parse_labels(options.backends or DEFAULT_BACKENDS)
            given = parse_backend_options(options.options, list(labels))
            drafters = parse_drafters(options.drafters, list(labels))
            _check_drafters(drafters)
            classes = {label: self._backend(name) for label, name in labels.items()}
            for label, cls in classes.items():
                parse_options(label, cls.Options, given[label])
            if len(levels := options.concurrency or ()) > 1:
                found = ",".join(map(str, levels))
                raise InputError(f"concurrency: {found}: a point has one number of requests at once; list them in grid")
            if levels:
                require_concurrent(levels[0], classes)
            suite_name, sha256, model = self._suite(options)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if self._defaults:
            settings = self._with_defaults(settings, options, given, drafters)
        words = tuple(run_words(where, settings))
        own = {key: self._without_address(key, value) for key, value in own.items()}
        hashed = [*(ADDRESS.sub("", word) for word in words), *(own[key] for key in own if ADDRESS.search(f"{key}="))]
        digest = hashlib.sha256("\0".join([*hashed, sha256]).encode()).hexdigest()[:8]
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", "-".join(f"{_last(key)}-{value}" for key, value in own.items()))
        name = f"{slug[:LONGEST_SLUG].strip('-') or 'point'}_{digest}"
        model, devices = options.model or model, options.devices or ()
        return Point(name, own, settings, words, suite_name, tuple(labels), model, devices)

    def _without_address(self, key: str, value: Any) -> Any:
        """`server 1` for the first address of a server that the points name, and so on: addresses get into no file."""
        if not ADDRESS.search(f"{key}="):
            return value
        return self._addresses.setdefault(str(value), f"server {len(self._addresses) + 1}")

    def _with_defaults(
        self,
        settings: Settings,
        options: RunOptions,
        given: Mapping[str, Mapping[str, str]],
        drafters: Mapping[str, str],
    ) -> Settings:
        """`settings` and what `spdbench.toml` adds to them, so that words and name of a point say all that it is. Of
        the file's drafters and options of backends those of the point's labels."""
        found = {**settings, **{key: getattr(options, key) for key in self._defaults if key in KEYS}}
        if "drafters" in self._defaults:
            found["drafters"] = [f"{label}={what}" for label, what in drafters.items()]
        options_of = {f"{label}.{key}": value for label, each in given.items() for key, value in each.items()}
        return {**found, "options": options_of}

    def _suite(self, options: RunOptions) -> tuple[str, str, str | None]:
        """Name and hash of the point's suite, and the model that it names."""
        key = (options.suite, options.data)
        if key not in self._suites:
            suite = load_suite(options.suite, options.data, may_run_code=options.allow_code_execution)
            self._suites[key] = suite.name, suite.sha256, suite.model
        return self._suites[key]


def _check_drafters(drafters: Mapping[str, str]) -> None:
    """Raises `InputError` for a drafter that no run could use: no acceptance, no such folder."""
    for what in dict.fromkeys(drafters.values()):
        try:
            parse_drafter(what)
        except InputError as error:
            raise InputError(f"drafters: {error}") from None


def _last(key: str) -> str:
    return key.rpartition(".")[2]
