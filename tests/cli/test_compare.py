"""`spdbench compare` from the outside."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result

from spdbench.cli.reading.compare import DIALECTS, FORMATS, command
from spdbench.errors import InputError, NotComparableError
from spdbench.judge.metrics import dialects
from spdbench.render.table import FORMATS as RENDERED
from tests.builders import (
    ORACLE,
    TRAINED,
    chunk_steps,
    make_backend,
    make_result,
    make_run,
    pipeline_steps,
    write_result,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "results"
VANILLA, SPD, EAGLE = (str(FIXTURES / f"{name}.json") for name in ("vanilla", "spd_oracle", "eagle_with_failure"))


def compare(*args: str) -> Result:
    """Runs the command; an error comes out as an exception, as the main entry would see it."""
    return CliRunner().invoke(command, args, catch_exceptions=False)


def refusal(*args: str) -> str:
    with pytest.raises(InputError) as caught:
        compare(*args)
    return str(caught.value)


def script(*args: str) -> list[str]:
    return [sys.executable, "-c", "from spdbench.cli.reading.compare import command; command()", *args]


def test_compares_and_prints_to_stdout_only() -> None:
    result = compare(VANILLA, SPD, EAGLE)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "synthetic_drafter (spd): " in result.stdout
    assert "4/4" in result.stdout


def test_folder_and_pattern_mean_their_result_files() -> None:
    everything = compare(VANILLA, SPD, EAGLE, "--format", "csv").stdout
    for word in (str(FIXTURES), str(FIXTURES / "*.json")):
        rows = csv.DictReader(io.StringIO(compare(word, "--format", "csv").stdout))
        assert sorted(row["label"] for row in rows) == sorted(
            row["label"] for row in csv.DictReader(io.StringIO(everything))
        )


def test_brackets_in_the_name_of_a_folder_that_exists_mean_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    shutil.copy(VANILLA, folder / "vanilla.json")
    for word in (folder, folder / "*.json", folder / "vanilla.json", tmp_path / "run*" / "*.json"):
        assert compare(str(word)).exit_code == 0


def test_formats_of_the_command_are_those_of_the_renderer() -> None:
    assert (*RENDERED, "parquet") == FORMATS
    for form in FORMATS:
        assert compare(VANILLA, SPD, "--format", form).exit_code == 0


def read_parquet(*args: str) -> list[dict[str, object]]:
    """The records that the command sends to stdout."""
    content = io.BytesIO(compare(*args, "--format", "parquet").stdout_bytes)
    found: list[dict[str, object]] = pyarrow.parquet.read_table(content).to_pylist()
    return found


def test_parquet_holds_what_csv_holds() -> None:
    records = read_parquet(VANILLA, SPD, EAGLE)
    lines = list(csv.DictReader(io.StringIO(compare(VANILLA, SPD, EAGLE, "--format", "csv").stdout)))
    assert len(records) == len(lines) == 3
    for record, line in zip(records, lines, strict=True):
        assert record.keys() == line.keys()
        assert {name: "" if value is None else str(value) for name, value in record.items()} == line


def test_requests_are_the_same_in_all_their_formats() -> None:
    args = (VANILLA, EAGLE, "--by", "request")
    found = json.loads(compare(*args, "--format", "json").stdout)
    assert read_parquet(*args) == found
    lines = list(csv.DictReader(io.StringIO(compare(*args, "--format", "csv").stdout)))
    assert [{name: "" if value is None else str(value) for name, value in each.items()} for each in found] == lines
    runs = [run for file in (VANILLA, EAGLE) for run in json.loads(Path(file).read_text())["runs"]]
    kept = ("prompt_id", "turn", "repeat", "category", "error", "prompt_sha256")
    assert [[each[name] for name in kept] for each in found] == [[run.get(name) for name in kept] for run in runs]
    for each, run in zip(found, runs, strict=True):
        failed = run["error"] is not None
        names = ("num_prompt_tokens", "num_new_tokens", "ttft_s", "decode_s")
        assert [each[name] for name in names] == [None if failed else run[name] for name in names]
        assert each["accepted"] == (None if failed else sum(run["steps"]["accepted"][1:]))
    assert any(each["error"] for each in found)


def test_a_files_name_need_not_be_unicode(tmp_path: Path) -> None:
    file = tmp_path / "odd\udcff.json"
    shutil.copy(VANILLA, file)
    for by in ([], ["--by", "request"]):
        assert str(read_parquet(str(file), *by)[0]["file"]).endswith("odd\\udcff.json")


def test_what_single_requests_do_not_go_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give --format csv, json, parquet, not table" in refusal(VANILLA, "--by", "request")
    assert "neither --baseline" in refusal(VANILLA, "--by", "request", "--format", "csv", "--baseline", "vanilla")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "needs pyarrow, which is not installed; " in refusal(VANILLA, "--format", "parquet")


def test_goodput_is_a_column_and_a_note() -> None:
    rows = list(csv.DictReader(io.StringIO(compare(VANILLA, SPD, "--goodput", "e2el:1e9", "--format", "csv").stdout)))
    assert all(0 < float(row["goodput"]) <= 1 for row in rows)
    said = compare(VANILLA, SPD, "--goodput", "ttft:500,tpot:50", "--format", "github").stdout
    assert "goodput: share of all requests with ttft up to 500 ms, tpot up to 50 ms" in said
    assert re.search(r"\| +goodput +\|", said)
    assert "unknown time" in refusal(VANILLA, "--goodput", "itl:5")


def test_category_rows() -> None:
    rows = list(csv.DictReader(io.StringIO(compare(VANILLA, SPD, "--by", "category", "--format", "csv").stdout)))
    assert [row["category"] for row in rows] == ["math", "math", "writing", "writing", "", ""]


def test_baseline_by_label_and_by_file() -> None:
    for baseline in ("spd", SPD):
        tables = json.loads(compare(VANILLA, SPD, "--baseline", baseline, "--format", "json").stdout)["tables"]
        assert tables[0]["baseline"] == "spd"


def test_wrong_input_is_named(tmp_path: Path) -> None:
    assert "did you mean 'vanilla'" in refusal(VANILLA, "--baseline", "vanill")
    assert "nothing.json: cannot be read" in refusal(str(tmp_path / "nothing.json"))
    assert "no file matches this pattern" in refusal(str(tmp_path / "*.json"))
    assert "no result files (*.json) in this folder" in refusal(str(tmp_path))
    (tmp_path / "half.json").write_text('{"schema": ')
    assert "half.json: is not JSON" in refusal(VANILLA, str(tmp_path / "half.json"))


def test_wrong_usage_is_exit_code_2() -> None:
    assert compare().exit_code == 2
    assert compare(VANILLA, "--by", "colour").exit_code == 2
    assert compare(VANILLA, "--format", "xml").exit_code == 2


def test_a_dialect_that_nobody_speaks_is_refused_naming_those_that_are_known() -> None:
    refused = compare(VANILLA, "--dialect", "foo")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "'foo' is not one of" in refused.stderr
    assert all(f"'{name}'" in refused.stderr for name in [*dialects.DIALECTS, "all"])


def test_dialects_of_the_command_are_those_of_the_judge() -> None:
    assert tuple(dialects.DIALECTS) == DIALECTS


@pytest.fixture
def worked_example(tmp_path: Path) -> str:
    """docs/metrics.md's: chunks of 1, 4, 3, 4 and 2 ids, the first from prefill."""
    result = make_result([make_run(chunk_steps([1, 4, 3, 4, 2]))], make_backend("draft_verify"), drafter=TRAINED)
    return str(write_result(result, tmp_path / "eagle.json"))


@pytest.mark.parametrize(
    ("dialect", "value"), [("vllm", "3.25"), ("sglang", "3.50"), ("nvidia", "2.80"), ("eagle", "4.33")]
)
def test_one_dialect_takes_the_place_of_tau_and_says_by_which_rule(
    worked_example: str, dialect: str, value: str
) -> None:
    text = compare(worked_example, "--dialect", dialect, "--format", "github").stdout
    assert f"tau {dialect}" in text
    assert f" {value} |" in text
    assert f"tau as {dialect} prints it: {dialects.DIALECTS[dialect].rule}." in text
    assert "tau |" not in text


def test_all_dialects_stand_side_by_side_in_every_format(worked_example: str) -> None:
    for form in ("table", "github", "latex"):
        text = " ".join(compare(worked_example, "--dialect", "all", "--format", form).stdout.split())
        for name in dialects.DIALECTS:
            assert name in text
        assert all(value in text for value in ("3.25", "3.50", "2.80", "4.33"))
        assert "sglang: N / verify steps" in text
    [row] = csv.DictReader(io.StringIO(compare(worked_example, "--dialect", "all", "--format", "csv").stdout))
    assert (row["acceptance_length_sglang"], row["acceptance_length_spd"]) == ("3.5", "")
    assert row["acceptance_length_spec_bench"] == row["acceptance_length"] == "3.25"
    [table] = json.loads(compare(worked_example, "--dialect", "all", "--format", "json").stdout)["tables"]
    assert table["dialects"].keys() == dialects.DIALECTS.keys()
    assert table["rows"][0]["metrics"]["acceptance_length_nvidia"] == pytest.approx(2.8)
    assert table["rows"][0]["metrics"]["acceptance_length_spd"] is None


def test_without_a_dialect_nothing_is_said_of_any(worked_example: str) -> None:
    assert "prints it" not in compare(worked_example).stdout
    assert "acceptance_length_vllm" not in compare(worked_example, "--format", "csv").stdout
    assert json.loads(compare(worked_example, "--format", "json").stdout)["tables"][0]["dialects"] == {}


def test_dialects_go_by_category_as_well(worked_example: str) -> None:
    text = compare(worked_example, "--dialect", "eagle", "--by", "category", "--format", "csv").stdout
    assert [row["acceptance_length_eagle"][:4] for row in csv.DictReader(io.StringIO(text))] == ["4.33", "4.33"]


def test_width_follows_the_columns_variable_and_pipes_have_no_colour() -> None:
    for columns in (80, 120):
        done = subprocess.run(
            script(VANILLA, SPD),
            env={"COLUMNS": str(columns), "PYTHONIOENCODING": "ascii", "TERM": "xterm"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert max(map(len, done.stdout.splitlines())) <= columns
        assert "\x1b" not in done.stdout
        assert done.stderr == ""


def test_label_that_the_terminal_cannot_encode_is_no_crash(tmp_path: Path) -> None:
    path = write_result(make_result([make_run()], make_backend(label="τ")), tmp_path / "a.json")
    done = subprocess.run(script(str(path)), env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_reader_that_has_had_enough_gets_no_traceback(tmp_path: Path) -> None:
    runs = [make_run(pipeline_steps([True] * 5, 3), prompt=f"p{i}", category=f"c{i}") for i in range(200)]
    path = write_result(make_result(runs, make_backend("pipeline"), drafter=ORACLE), tmp_path / "a.json")
    with subprocess.Popen(
        script(str(path), "--by", "category", "--format", "json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_full_disk_is_felt_before_the_command_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main entry answers it; at interpreter exit it would be too late for a message and an exit code."""
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError) as caught:
            command.main([VANILLA], standalone_mode=False)
        assert caught.value.errno == errno.ENOSPC


def test_baseline_file_that_serves_no_table_is_exit_code_4(tmp_path: Path) -> None:
    other = write_result(make_result([make_run()], dtype="bfloat16"), tmp_path / "other.json")
    with pytest.raises(NotComparableError, match=r"dtype \(bfloat16, not float32\)") as caught:
        compare(VANILLA, "--baseline", str(other))
    assert caught.value.exit_code == 4


def test_compare_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from spdbench.cli.reading.compare import command;"
        f"assert CliRunner().invoke(command, [{VANILLA!r}, {SPD!r}]).exit_code == 0;"
        "print([name for name in ('torch', 'transformers', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
