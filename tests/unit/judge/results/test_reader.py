"""The quick way to read results: it says what the model says, or leaves the word to the model."""

from __future__ import annotations

import gc
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spdbench.errors import InputError
from spdbench.judge.loaded import read_results
from spdbench.judge.results import reader, table
from spdbench.judge.results.kept import DraftColumns, SpanColumns
from spdbench.judge.results.reader import NotPlain, read_detailed_runs, read_lines, read_plain, read_runs, reread
from spdbench.judge.results.schema import Result, Run, read_result
from spdbench.judge.results.table import table_from
from spdbench.types import Span
from tests.builders import (
    chunk_steps,
    contents,
    failed_run,
    make_backend,
    make_result,
    make_run,
    make_steps,
    pipeline_steps,
    vanilla_steps,
)

RUNS = [
    make_run(chunk_steps([1, 4, 3])),
    failed_run("p1").model_copy(update={"error": 'it said "t_ns":[1] and \\"steps\\": [2], then "runs":[\n'}),
    make_run(vanilla_steps(20), prompt="p2", category="code", output_ids=[7] * 20),
    make_run(make_steps([1, 1], forwards=[1.0, 0.6666666666666666]), prompt="p3", turn=1, score=0.5),
    make_run(pipeline_steps([True, False, True], 3), prompt="p4", peak_memory_bytes=2**40),
]


def by_lines(result: Result) -> bytes:
    """`result` in the layout that `run` writes."""
    members = {
        name: json.dumps(value, separators=(",", ":")).encode()
        for name, value in result.model_dump(mode="json", by_alias=True).items()
    }
    runs = [json.dumps(run.model_dump(mode="json"), separators=(",", ":")).encode() for run in result.runs]
    members["runs"] = b"[\n" + b",\n".join(runs) + b"\n]"
    return b"{\n" + b",\n".join(b'"%s":%s' % (name.encode(), text) for name, text in members.items()) + b"\n}\n"


LAYOUTS: dict[str, Callable[[Result], bytes]] = {
    "a line a run": by_lines,
    "tight": lambda result: result.model_dump_json(by_alias=True).encode(),
    "spaced": lambda result: json.dumps(result.model_dump(mode="json", by_alias=True)).encode(),
}


@pytest.fixture
def result() -> Result:
    return make_result(RUNS, make_backend("draft_verify"), num_prompts=9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_tells_what_the_model_tells(tmp_path: Path, result: Result, layout: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(LAYOUTS[layout](result))
    head, table = read_runs(path, keep_ids=True)
    assert contents(table) == contents(table_from(read_result(path).runs, keep_ids=True))
    assert head == result.model_copy(update={"runs": []})


def test_only_the_layout_that_run_writes_is_read_the_quick_way(tmp_path: Path, result: Result) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(LAYOUTS["a line a run"](result))
    read_plain(path)
    path.write_bytes(LAYOUTS["tight"](result))
    with pytest.raises(NotPlain):
        read_plain(path)


def test_a_result_without_runs_is_read(tmp_path: Path) -> None:
    empty = make_result([])
    for number, write in enumerate(LAYOUTS.values()):
        path = tmp_path / f"{number}.json"
        path.write_bytes(write(empty))
        assert read_results([path])[0].num_begun == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_new_tokens", 2_000_000, r"num_new_tokens: 2000000, and its steps emit 5"),
        ("output_ids", [1, 2, 3], r"output_ids: 3 ids, and its steps emit 5 tokens"),
        ("ttft_s", 0.001, r"ttft_s: 0\.001, and its steps say 0\.05"),
        ("decode_s", 0.0004, r"decode_s: 0\.0004, and its steps say 0\.04"),
    ],
)
@pytest.mark.parametrize("write", LAYOUTS.values())
def test_totals_that_the_columns_contradict_are_refused(
    tmp_path: Path, field: str, value: Any, message: str, write: Callable[[Result], bytes]
) -> None:
    runs = [make_run(), make_run(prompt="p1").model_copy(update={field: value})]
    (tmp_path / "a.json").write_bytes(write(make_result([]).model_copy(update={"runs": runs})))
    with pytest.raises(InputError, match=rf"a\.json: runs: .*entry 1: {message}"):
        read_runs(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("turn", b"0"),
        ("prompt_id", b'"p0"'),
        ("score", b"1.0"),
        ("output_ids", b"[]"),
        ("t_ns", b"[]"),
        ("steps", b"{}"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_key_that_a_run_has_twice_is_named(
    tmp_path: Path, result: Result, key: str, value: bytes, layout: str
) -> None:
    """Readers differ in which of the two values they use."""
    path = tmp_path / "a.json"
    once = LAYOUTS[layout](result)
    path.write_bytes(re.sub(rb'("%s": ?)' % key.encode(), rb"\g<1>%s,\g<1>" % value, once, count=1))
    assert path.read_bytes() != once
    for read in (read_runs, reread):
        with pytest.raises(InputError, match=rf"a\.json: key '{key}' occurs twice"):
            read(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_of_a_damaged_file_is_what_the_model_reads(tmp_path: Path, data: st.DataObject) -> None:
    """One or two bytes changed, dropped or doubled anywhere: nothing is believed that the model would not believe."""
    text = by_lines(make_result(RUNS[:3], make_backend("draft_verify")))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(text) - 1))
        put = data.draw(
            st.sampled_from([b"", text[at : at + 1] * 2, *(bytes([c]) for c in b'0123456789,.-]["{}e \n:x')])
        )
        text = text[:at] + put + text[at + 1 :]
    path = tmp_path / "a.json"
    path.write_bytes(text)
    try:
        head, table = read_plain(path, keep_ids=True)
    except NotPlain:
        return
    told = read_result(path)
    assert contents(table) == contents(table_from(told.runs, keep_ids=True))
    assert head == told.model_copy(update={"runs": []})


def test_a_column_of_another_part_of_the_file_is_not_taken_for_a_runs_own(tmp_path: Path, result: Result) -> None:
    """Numbers are cut out of the text before anybody knows whose they are."""
    odd = result.model_copy(update={"environment": {"output_ids": [1, 2, 3], "t_ns": [5, 6]}})
    for number, write in enumerate(LAYOUTS.values()):
        path = tmp_path / f"{number}.json"
        path.write_bytes(write(odd))
        assert contents(read_runs(path, keep_ids=True)[1]) == contents(table_from(odd.runs, keep_ids=True))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"accepted":[0,3,2]', b'"accepted":[0,5,2]'),
        (b'"judged":[0,4,3]', b'"judged":[0,5,3]'),
        (b'"t_ns":[50000000,60000000,70000000]', b'"t_ns":[50000000,70000000,60000000]'),
        (b'"emitted":[1,4,3]', b'"emitted":[1,4]'),
        (b'"emitted":[1,4,3]', b'"emitted":[1,4,1048577]'),
        (b'"forwards":[1.0,5.0,5.0]', b'"forwards":[1.0,5.0,-5.0]'),
        (b'"output_ids":[100,', b'"output_ids":[100000000000000000000,'),
        (b'"output_ids":[100,', b'"output_ids":[0100,'),
        (b'"turn":0', b'"turn":-1'),
        (b'"divergence":null', b'"runs":[],\n"divergence":null'),
        (b'"flags":[', b'"flags":[1'),
    ],
)
def test_what_the_model_refuses_or_reads_in_another_way_is_left_to_it(
    tmp_path: Path, result: Result, old: bytes, new: bytes
) -> None:
    text = by_lines(result)
    assert old in text
    path = tmp_path / "a.json"
    path.write_bytes(text.replace(old, new, 1))
    with pytest.raises(NotPlain):
        read_plain(path)


def test_a_file_of_lines_is_gone_through_once(tmp_path: Path, result: Result) -> None:
    """A pipe cannot be read twice."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[by_lines(result)])
    writer.start()
    head, table = read_plain(pipe)
    assert len(table.keys) == len(RUNS)
    assert head.flags == result.flags
    writer.join()


def test_only_a_few_runs_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_RUNS", 10)
    path = tmp_path / "a.json"
    path.write_bytes(by_lines(make_result([make_run(prompt=f"p{index}") for index in range(200)])))
    gc.collect()
    before, most = live_runs(), list[int]()
    original = table.build_table

    def counting(*columns: Any, **more: Any) -> Any:
        most.append(live_runs() - before)
        return original(*columns, **more)

    monkeypatch.setattr(reader, "build_table", counting)
    assert len(read_plain(path)[1].keys) == 200
    assert len(most) == 20
    assert max(most) == 10


def live_runs() -> int:
    return sum(type(thing) is Run for thing in gc.get_objects())


def test_run_that_stands_twice_is_found_in_another_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_RUNS", 1)
    twice = make_result(RUNS).model_copy(update={"runs": [*RUNS, RUNS[0]]})
    path = tmp_path / "a.json"
    path.write_bytes(by_lines(twice))
    with pytest.raises(InputError, match=r"runs: entries 0 and 5 are both prompt 'p0', turn 0, repeat 0"):
        read_results([path])


def test_damage_is_named_as_by_the_model(tmp_path: Path, result: Result) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(by_lines(result).replace(b'"emitted":[1,4,3]', b'"emitted":[1,4]'))
    with pytest.raises(InputError, match=r"a\.json: runs\.0\.steps: columns of different length"):
        read_results([path])


def test_lines_are_read_like_a_file_and_odd_ones_like_the_model_reads_them() -> None:
    lines = [run.model_dump_json().encode() for run in RUNS]
    odd = [json.dumps(run.model_dump(mode="json"), indent=1).encode() for run in RUNS]
    assert contents(read_lines(lines)) == contents(read_lines(odd)) == contents(table_from(RUNS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rereading_gives_every_run_as_json_of_its_own(tmp_path: Path, result: Result, layout: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(LAYOUTS[layout](result))
    head, runs = reread(path)
    assert head == result.model_copy(update={"runs": []})
    assert [(key, Run.model_validate_json(text)) for key, text in runs] == [(run.key, run) for run in RUNS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_runs_with_details_are_read_again(tmp_path: Path, result: Result, layout: str) -> None:
    drafts = DraftColumns.of([None] * len(RUNS[0].steps.t_ns))
    spans = SpanColumns.of([Span(0, "draft", 1, 2, 3, kept=True)], 0)
    named = 'no "spans":{ and no "drafted_tokens":{'
    runs = [
        RUNS[0].model_copy(update={"prompt_id": name, **more})
        for name, more in ((named, {}), ("drafts", {"drafted_tokens": drafts}), ("spans", {"spans": spans}))
    ]
    path = tmp_path / "a.json"
    path.write_bytes(LAYOUTS[layout](result.model_copy(update={"runs": runs})))
    assert list(read_detailed_runs(path)) == runs[1:]
    assert list(read_detailed_runs(Path("elsewhere.json"), path.read_bytes())) == runs[1:]
    [loaded] = read_results([path])
    assert list(loaded.detailed_runs()) == runs[1:]


def test_device_is_no_result() -> None:
    for read in (read_plain, read_result):
        with pytest.raises(InputError, match=r"/dev/zero: cannot be read .a device"):
            read(Path("/dev/zero"))
