"""The Python interface: what `run` and `compare` do, without a command line.

    import spdbench

    results = spdbench.run("quick", backends=["vanilla", "ngram"], limit=4)
    print(spdbench.compare(results))

Errors are those of `spdbench.errors`. All of it is made of the functions that the commands call.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from spdbench.console import hide_notes
from spdbench.errors import InputError, SpdbenchError, did_you_mean, install_command, short_repr

if TYPE_CHECKING:
    from spdbench.judge.comparison.compare import Table
    from spdbench.judge.loaded import LoadedResult
    from spdbench.judge.results.schema import Flag
    from spdbench.judge.results.schema import Result as ResultHead
    from spdbench.render.table import Format

WIDTH = 120
"""Columns of a printed comparison."""
Words = str | Sequence[str]


class RunSettings(TypedDict, total=False):
    """The options of `spdbench run` by name; what is not given has the command's default."""

    backends: Words
    options: Mapping[str, Any]
    drafters: Words
    model: str | Path
    dtype: str
    devices: Words
    threads: int
    chat_template: str | Path
    template_args: Words
    limit: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    data: str | Path
    repeats: int
    remeasure: int
    warmup: int
    results: str | Path
    name: str
    resume: bool
    trace: bool
    keep_drafts: bool
    concurrency: int | Sequence[int]
    log: Words
    allow_code_execution: bool
    quiet: bool
    events: str | Path


@dataclass(frozen=True, eq=False)
class Result:
    """One label's result: a result file in memory."""

    loaded: LoadedResult

    def __repr__(self) -> str:
        return f"<spdbench.Result {self.label!r} of {self.head.suite.name!r}, {len(self.loaded.runs.keys)} requests>"

    @property
    def label(self) -> str:
        """What the run called the backend."""
        return self.loaded.label

    @property
    def file(self) -> str:
        """The result file."""
        return self.loaded.file

    @property
    def head(self) -> ResultHead:
        """All of the file but its requests: suite, model, decoding, backend, drafter, environment."""
        return self.loaded.head

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metrics by name, such as `decode_tokens_per_s`; docs/metrics.md explains each."""
        return self.loaded.metrics

    @property
    def flags(self) -> Sequence[Flag]:
        """What casts doubt on the numbers, each with its reason and a remedy."""
        return self.loaded.flags

    def records(self) -> list[dict[str, Any]]:
        """One record a request, failed ones included, as `spdbench compare --by request --format json` prints them."""
        from spdbench.render.export import request_records

        return request_records([self.loaded])

    def to_pandas(self) -> Any:
        """`records()` as a `pandas.DataFrame`. Raises `SpdbenchError` without pandas."""
        return _frame(self.records())


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results compared: a table for each suite, model, dtype, decoding and machine. `print` shows them."""

    tables: Sequence[Table]

    def __str__(self) -> str:
        return self.render()

    def render(self, form: Format = "table", *, details: bool = False) -> str:
        """What `spdbench compare --format FORM` prints. Raises `InputError` for a form that there is not."""
        from rich.console import Console

        from spdbench.render.table import FORMATS, render

        _require_one_of("form", form, FORMATS)
        return render(self.tables, form, Console(file=io.StringIO(), width=WIDTH), details=details)

    def records(self) -> list[dict[str, Any]]:
        """One record a label (and category), as `spdbench compare --format csv` prints them."""
        from spdbench.render.export import comparison_records

        return comparison_records(self.tables)

    def to_pandas(self) -> Any:
        """`records()` as a `pandas.DataFrame`. Raises `SpdbenchError` without pandas."""
        return _frame(self.records())


def run(suite: str | Path, **settings: Unpack[RunSettings]) -> list[Result]:
    """Measures backends on a suite as `spdbench run` does, writes the result files, and returns the results: one a
    label, in the order of the labels; with several numbers for `concurrency`, one a label and number.

    `settings` are the options of `spdbench run`. `options` are those of backends, such as `{"spd.stages": 3}`. A failed
    prompt is no exception: `metrics["num_failed"]` counts them. Files with defaults (spdbench.toml) are not read.

    Raises:
        InputError: a setting cannot be used; names it, and what is allowed.
        BackendLostError: a backend failed for good; what was finished is kept.
    """
    from spdbench.cli.run.command import prepare
    from spdbench.cli.run.settings import SETTINGS, merged, parse_words, run_words
    from spdbench.cli.terminal import handlers_restored

    where = "spdbench.run"
    words = run_words(where, merged(where, {}, {"suite": suite, **settings}, SETTINGS))
    options = parse_words(list(words))
    with hide_notes(options.quiet), handlers_restored():
        return [Result(each) for each in prepare(options).run(show=False)]


def load(paths: str | Path | Iterable[str | Path]) -> list[Result]:
    """The results in files, patterns, folders and reports, as `spdbench compare` reads them.

    Raises:
        InputError: a file is not there, or is no result; or `paths` are no paths.
    """
    from spdbench.cli.files import result_paths
    from spdbench.judge.loaded import read_results

    words = [str(path) for path in _each("load: paths", paths, str | Path, "a path or a list of paths")]
    return [Result(each) for each in read_results(list(result_paths(words)))]


def compare(
    results: Result | str | Path | Iterable[Result | str | Path],
    *,
    baseline: str | Path | None = None,
    by: Literal["category", "context"] | None = None,
    dialect: str | None = None,
    goodput: str | None = None,
) -> Comparison:
    """Compares results, given as such or as `load` takes them; the other arguments are options of `spdbench compare`.

    Raises:
        InputError: a file is no result, `baseline` is neither a label nor a result file, or another argument is none
            that the option takes; names what is allowed.
        NotComparableError: `baseline` did other work than every result.
    """
    from spdbench.cli.reading.compare import BY, DIALECT_NAMES, compare_results

    _require_one_of("compare: by", by, BY, or_none=True)
    _require_one_of("compare: dialect", dialect, DIALECT_NAMES, or_none=True)
    if not isinstance(goodput, str | None):
        raise InputError(f"compare: goodput: {short_repr(goodput)} is no text; write e.g. 'ttft:500,tpot:50' (ms)")
    if not isinstance(baseline, str | Path | None):
        raise InputError(f"compare: baseline: {short_repr(baseline)} is neither a label nor the path of a result file")
    found: list[LoadedResult] = []
    for each in _each("compare: results", results, Result | str | Path, "a Result, a path, or a list of these"):
        found += [each.loaded] if isinstance(each, Result) else [one.loaded for one in load(each)]
    return Comparison(compare_results(found, None if baseline is None else str(baseline), by, dialect, goodput))


def _require_one_of(where: str, value: Any, allowed: Sequence[str], *, or_none: bool = False) -> None:
    if not (or_none and value is None) and value not in (*allowed,):
        hint = did_you_mean(value, allowed) if isinstance(value, str) else f". Known: {', '.join(allowed)}."
        raise InputError(f"{where}: {short_repr(value)} is not known{hint}")


def _each(where: str, given: Any, kind: Any, expected: str) -> list[Any]:
    """`given` as a list of what is of the `kind`; `InputError` if it is neither one nor several."""
    found = [given] if isinstance(given, kind) else list(given) if isinstance(given, Iterable) else None
    if found is None or isinstance(given, bytes | Mapping):
        raise InputError(f"{where}: {short_repr(given)} is not {expected}")
    if wrong := next(([each] for each in found if not isinstance(each, kind)), None):
        raise InputError(f"{where}: {short_repr(wrong[0])} is in it; expected {expected}")
    return found


def _frame(records: Sequence[Mapping[str, Any]]) -> Any:
    try:
        import pandas
    except ImportError:
        raise SpdbenchError(f"to_pandas: pandas is not installed; {install_command('pandas')}") from None
    return pandas.DataFrame.from_records(records)
