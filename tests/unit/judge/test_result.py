"""The result file: what is read, what is refused, and the JSON Schema that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from spdbench.errors import InputError
from spdbench.judge.metrics import summarise
from spdbench.judge.result import SCHEMA_FILE, json_schema, read_result
from tests.builders import make_result, make_run, write_result

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures" / "results").glob("*.json"))


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


def test_unknown_field_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs\.0\.speed: Extra inputs"):
        read_result(edited(tmp_path / "a.json", speed=3))
