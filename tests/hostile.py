"""Broken and hostile input for property tests: values, damaged documents, odd words; and what readers may do."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

from spdbench.cli.main import run
from spdbench.console import MAX_CHARS, printable
from spdbench.errors import SpdbenchError

MAX_MESSAGE_LENGTH = 10_000
MEMORY_LIMIT = 2 * 2**30
FEWEST = {"harness files": 2300, "model files": 2000, "training files": 900, "words and servers": 2000}
"""How many inputs each file of tests has to try at least."""
TRIED: Counter[str] = Counter()
"""How many inputs each test has really given to its reader."""
RAN: list[str] = []
"""What of an input was run as code: it stays empty."""
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn")
"""Python's audit events of programs that are started."""
CANARY = "tests.fixtures.canary"
"""A module that nothing imports, but inputs name."""
_started = time.perf_counter()
_reading = False


def ran(*_: object) -> str:
    """What inputs try to have called: objects of a pickle, tags of YAML."""
    RAN.append("a function that an input names")
    return ""


class Unpickled:
    """A pickle of it calls `ran` when it is read without care."""

    def __reduce__(self) -> tuple[Callable[..., str], tuple[()]]:
        return ran, ()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _reading:
        return
    is_canary = event == "exec" and getattr(arguments[0], "co_filename", "").endswith("canary.py")
    if is_canary or event in PROGRAMS:
        RAN.append(f"{event} {arguments[0]!r}")


sys.addaudithook(_watch)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Requires that no code of an input is run inside."""
    global _reading
    _reading = True
    try:
        yield
    finally:
        _reading = False
    assert not RAN


ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
ODD_TEXTS = [
    *("", " ", "\n", "\0", "\x1b]0;x\x07", "\u202e", "\ud800", "é", "²", "[/]", "{{ x }}", "%", "|", "=1+1", "-", "~x"),
    *(CANARY, "!!python/object/apply:tests.hostile.ran []", "{{ cycler.__init__.__globals__.os.system('true') }}"),
    *("NaN", "1e999", "null", "true", "../../x", "/dev/full", "/proc/self/mem", "http://.x", "x" * 300, "x" * 20_000),
]
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
leaves = st.one_of(st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.integers(), st.floats(), texts)
deep: st.SearchStrategy[Any] = st.sampled_from([50, 99, 101, 300]).map(lambda levels: _nested(levels))
values: st.SearchStrategy[Any] = st.one_of(
    leaves,
    st.lists(leaves, max_size=3),
    st.dictionaries(texts, leaves, max_size=3),
    st.lists(st.lists(leaves, max_size=2), max_size=2),
    deep,
)


def _nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def settings(examples: int) -> Callable[[Any], Any]:
    """The same inputs in every run, as many times the examples as SPDBENCH_HOSTILE_EXAMPLES says; with that they are
    new ones each time."""
    times = int(os.environ.get("SPDBENCH_HOSTILE_EXAMPLES", "0"))
    return hypothesis.settings(
        max_examples=examples * max(1, times),
        derandomize=not times,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """`valid`, a document of lists and objects, with one to three places replaced, removed, repeated or added to."""
    document = deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(_places(document) or [(None, None)]))
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if parent is None:
            document = draw(values)
        elif action == "replace":
            parent[key] = draw(values)
        elif action == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(texts)] = draw(values)
        else:
            parent.insert(key, draw(st.one_of(values, st.just(parent[key]))))
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (parent, key) in a document, outermost first."""
    places: list[tuple[Any, Any]] = []
    level = [document]
    while level:
        pairs = [
            (parent, key)
            for parent in level
            for key in (list(parent) if isinstance(parent, dict) else range(len(parent)))
        ]
        places += pairs
        level = [parent[key] for parent, key in pairs if isinstance(parent[key], dict | list)]
    return places[:200]


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` with bytes cut out, put in, doubled or replaced, at one to three places; or any bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    text = valid
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.sampled_from([0, 1, 1, 2, 8, 64, len(text)])))
        put = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"\0", b"\xff\xff\xff\xff", b"[" * 5000, b'"']))
        )
        text = text[:begin] + put + text[end:]
    return text


def broken_json(valid: Any) -> st.SearchStrategy[bytes]:
    """JSON that says something else than `valid`, or that is none."""
    return st.one_of(changed(valid).map(_json), damaged(_json(valid)))


def broken_json_lines(valid: list[Any]) -> st.SearchStrategy[bytes]:
    def lines(rows: Any) -> bytes:
        return b"\n".join(map(_json, rows if isinstance(rows, list) else [rows])) + b"\n"

    return st.one_of(changed(valid).map(lines), damaged(lines(valid)))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def read(name: str, reader: Callable[[], object], folder: Path | None = None) -> None:
    """Calls `reader`, which may succeed or raise an error with a message for people, and leaves `folder` as it was."""
    TRIED[name] += 1
    before = contents(folder) if folder else {}
    try:
        with _watched():
            reader()
    except SpdbenchError as error:
        require_message(str(error))
    assert (contents(folder) if folder else {}) == before


def require_message(text: str) -> None:
    assert text.strip()
    assert len(printable(text)) < MAX_MESSAGE_LENGTH


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(name: str, *words: str, folder: Path) -> int:
    """Runs a command line in this process. It ends with a documented exit code, shows nothing that is obeyed, runs no
    code of its inputs, and leaves `folder` as it was."""
    TRIED[name] += 1
    before = contents(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _watched():
        code = run(list(words))
    assert contents(folder) == before
    assert code in (0, 1, 2, 3, 4)
    for text in (out.getvalue(), err.getvalue()):
        lines = text.split("\n")
        assert all(printable(line[:MAX_CHARS]) == line[:MAX_CHARS] for line in lines)
        assert max(map(len, lines)) < 10 * MAX_MESSAGE_LENGTH
    if code == 2:
        require_message(err.getvalue())
    return code


def require_tried(file: str, *, within: int) -> None:
    """Requires that the tests of a file, whose names in `TRIED` are `within`, have tried as many inputs as `FEWEST`
    says, in memory that any machine has, and that all files try 5,000. Passes where only some tests were asked for."""
    print(f"{file}: {TRIED.total()} inputs in {time.perf_counter() - _started:.0f} s")  # of which nothing is required
    assert sum(FEWEST.values()) >= 5000
    if len(TRIED) >= within:
        assert TRIED.total() >= FEWEST[file], TRIED
    TRIED.clear()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MEMORY_LIMIT
