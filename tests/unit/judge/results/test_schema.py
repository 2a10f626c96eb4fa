"""The result file: what is read, what is refused, and the JSON Schema that ships."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from spdbench.errors import InputError
from spdbench.input_files import BOM
from spdbench.judge.loaded import load
from spdbench.judge.results.reader import read_runs
from spdbench.judge.results.schema import SCHEMA_FILE, Steps, json_schema, read_result
from tests.builders import make_result, make_run, summarise, write_result

FIXTURES = sorted((Path(__file__).parents[3] / "fixtures" / "results").glob("*.json"))


def ids(path: Path) -> str:
    return path.stem


def test_there_are_fixtures() -> None:
    assert len(FIXTURES) >= 3


@pytest.mark.parametrize("path", FIXTURES, ids=ids)
def test_files_of_older_versions_are_still_read(path: Path) -> None:
    assert read_result(path).runs


@pytest.mark.parametrize("path", FIXTURES, ids=ids)
def test_files_of_older_versions_still_mean_the_same(path: Path) -> None:
    result = read_result(path)
    now = summarise(result.runs, result.backend, result.environment["read_bandwidth_bytes_per_s"]).overall
    for name, value in result.summary.overall.items():
        if not name.endswith("_ci"):  # numpy may change how it draws
            assert now[name] == (value if value is None else pytest.approx(value)), name


@pytest.mark.parametrize("path", FIXTURES, ids=ids)
def test_files_fit_the_json_schema_that_ships(path: Path) -> None:
    jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(json.loads(path.read_text()))


def test_json_schema_that_ships_is_up_to_date() -> None:
    """Write it anew with json.dumps(json_schema(), indent=2) after a change of the schema."""
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema()


def test_result_comes_back_from_its_file_unchanged(tmp_path: Path) -> None:
    result = make_result([make_run(), make_run(prompt="p1")])
    assert read_result(write_result(result, tmp_path / "a.json")) == result


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """An editor of Windows writes one."""
    path = tmp_path / "a.json"
    path.write_bytes(BOM + make_result([make_run()]).model_dump_json(by_alias=True).encode())
    assert read_result(path).runs == [make_run()]


def test_missing_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read \(No such file"):
        read_result(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": "spdbench.result/1", "cre', "is not JSON"),
        ('{"a": 1}', "is not a spdbench result"),
        ("[1, 2]", "is not a spdbench result"),
        ('{"schema": "spdbench.result/99"}', "written by a newer spdbench"),
        ('{"schema": "spdbench.result/0"}', "has schema spdbench.result/0, which no spdbench writes; this one reads"),
        ('{"schema": "spdbench.result/new"}', "which no spdbench writes"),
        ('{"schema": "spdbench.result/' + "9" * 5000 + '"}', "which no spdbench writes"),
        ("[" * 100_000, "is not JSON"),
        ('{"schema": "spdbench.result/1", "a": ' + "[" * 500 + "]" * 500 + "}", "cannot be read .*recursion"),
        ('{"schema": "spdbench.result/1"}', "created: Field required"),
    ],
)
def test_what_is_not_a_result_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_result(path)
    assert "\n" not in str(caught.value)


def edited(path: Path, **fields: Any) -> Path:
    """A result file whose first run has other `fields`."""
    data = json.loads(make_result([make_run()]).model_dump_json(by_alias=True))
    data["runs"][0] |= fields
    path.write_text(json.dumps(data))
    return path


def test_step_columns_of_different_length_are_refused(tmp_path: Path) -> None:
    steps = {"t_ns": [1, 2], "emitted": [1], "drafted": [0], "judged": [0], "accepted": [0], "forwards": [1.0]}
    with pytest.raises(InputError, match=r"runs\.0\.steps: .*columns of different length"):
        read_result(edited(tmp_path / "a.json", steps=steps))


GOOD = {
    "t_ns": [1, 2, 2],
    "emitted": [1, 1, 1],
    "drafted": [0, 300, 300],
    "judged": [0, 2, 300],
    "accepted": [0, 1, 300],
    "forwards": [7.0, 301.0, 301.0],
}


def test_steps_of_one_instant_and_deep_drafts_are_read(tmp_path: Path) -> None:
    totals = {"num_new_tokens": 3, "output_ids": [1, 2, 3], "ttft_s": 1e-9, "decode_s": 1e-9}
    assert read_result(edited(tmp_path / "a.json", steps=GOOD, **totals)).runs[0].steps.judged == [0, 2, 300]


@pytest.mark.parametrize(("field", "value"), [("temperature", "NaN"), ("temperature", -1), ("top_p", 0), ("top_k", -1)])
def test_decoding_that_cannot_be_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    data = json.loads(make_result([make_run()]).model_dump_json(by_alias=True))
    data["decoding"][field] = float(value)
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"a\.json: decoding\.{field}: "):
        read_result(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("t_ns", [1, 2, 10**30], r"\.t_ns\.2: .* 9223372036854775807, not 1000000000"),
        ("t_ns", [1, 3, 2], r": t_ns\.2: 2 comes before the 3 of the step before"),
        ("emitted", [1, 1, 10**12], r"\.emitted\.2: .* 1048576, not 1000000000000"),
        ("drafted", [0, 300, 10**12], r"\.drafted\.2: .* 65536, not 1000000000000"),
        ("judged", [0, 2, 10**12], r"\.judged\.2: .* 65536, not 1000000000000"),
        ("judged", [0, 301, 300], r": judged\.1: 301 is more than drafted, which is 300"),
        ("accepted", [0, 3, 300], r": accepted\.1: 3 is more than judged, which is 2"),
        ("accepted", [0, -1, 300], r"\.accepted\.1: .* 0, not -1"),
        ("forwards", [7.0, 1e300, 1.0], r"\.forwards\.1: .*, not 1e\+300"),
    ],
)
def test_damaged_steps_are_refused_with_their_place(
    tmp_path: Path, column: str, values: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=r"a\.json: runs\.0\.steps" + message) as caught:
        read_result(edited(tmp_path / "a.json", steps=GOOD | {column: values}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"turn": 10**30}, "turn"),
        ({"repeat": -1}, "repeat"),
        ({"num_new_tokens": 10**12}, "num_new_tokens"),
        ({"output_ids": [10**30]}, r"output_ids\.0"),
        ({"decode_s": 1e300}, "decode_s"),
        ({"score": float("nan")}, "score"),
    ],
)
def test_numbers_that_no_run_has_are_refused_with_their_place(
    tmp_path: Path, fields: dict[str, Any], where: str
) -> None:
    with pytest.raises(InputError, match=rf"a\.json: runs\.0\.{where}: "):
        read_result(edited(tmp_path / "a.json", **fields))


def test_run_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    result = make_result([make_run(), make_run(prompt="p1")])
    twice = result.model_copy(update={"runs": [*result.runs, result.runs[0]]})
    with pytest.raises(InputError, match=r"runs: entries 0 and 2 are both prompt 'p0', turn 0, repeat 0"):
        read_result(write_result(twice, tmp_path / "a.json"))


@pytest.mark.parametrize("read", [read_result, read_runs])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Programs differ in which of the two they read."""
    path = write_result(make_result([make_run()]), tmp_path / "a.json")
    for old, new in (
        (b'"runs":', b'"runs":[],"runs":'),
        (b'"created":', b'"created":"2026-01-01T00:00:00Z","created":'),
    ):
        path = tmp_path / "twice.json"
        path.write_bytes((tmp_path / "a.json").read_bytes().replace(b'": ', b'":').replace(old, new, 1))
        with pytest.raises(InputError, match=r"twice\.json: key '(runs|created)' occurs twice"):
            read(path)


@pytest.mark.parametrize("bandwidth", [1e-320, float("inf"), -1, 10**400, True, "fast"])
def test_bandwidth_that_no_machine_has_gives_no_roofline_share(bandwidth: Any) -> None:
    result = make_result([make_run()])
    odd = result.model_copy(update={"environment": {"read_bandwidth_bytes_per_s": bandwidth}})
    share = load(odd, "a.json").metrics["roofline_share"]
    assert share is None or bandwidth is True


def test_checking_the_columns_costs_little() -> None:
    """16,000 runs of 256 steps are 200 files of 80 prompts; a thousandth of a second a run is 16 s, far too slow."""
    column = list(range(256))
    runs = [Steps(t_ns=column, emitted=column, drafted=column, judged=column, accepted=column, forwards=[1.0] * 256)]
    text = runs[0].model_dump_json()
    started = time.perf_counter()
    for _ in range(1000):
        Steps.model_validate_json(text)
    assert time.perf_counter() - started < 1.0


def test_unknown_field_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs\.0\.speed: Extra inputs"):
        read_result(edited(tmp_path / "a.json", speed=3))
