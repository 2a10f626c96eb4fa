"""`spdbench check` from the outside: files in, words and an exit code out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from spdbench.judge.results.schema import Run
from tests.builders import MS, ORACLE, failed_run, make_backend, make_result, write_result
from tests.cli.run_helpers import Said, spdbench
from tests.unit.judge.gate.gates import drafted_runs, plain_runs


def write_run(folder: Path, name: str = "", *, eagle_ms: float = 20, runs: Iterable[Run] = (), **more: Any) -> Path:
    """The files of one run of two labels in `folder`."""
    folder.mkdir(exist_ok=True)
    suffix = f"__{name}" if name else ""
    eagle = list(runs) or drafted_runs(step_ns=lambda _: round(eagle_ms * MS))
    write_result(make_result(plain_runs(), **more), folder / f"quick__vanilla__smollm2{suffix}.json")
    backend = make_backend("draft_verify")
    write_result(make_result(eagle, backend, drafter=ORACLE, **more), folder / f"quick__eagle__smollm2{suffix}.json")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_run(tmp_path / "base")


def check(new: Path, base: Path, *words: str | Path) -> Said:
    return spdbench("check", new, "--baseline", base, *words)


def test_equal_results_pass_and_stdout_holds_the_table_only(base: Path, tmp_path: Path) -> None:
    said = check(write_run(tmp_path / "new"), base)
    assert said.code == 0, said.out + said.err
    assert said.err == ""
    assert said.out.startswith("pass (exit code 0)\n")


@pytest.mark.parametrize(
    ("new", "gate", "code"),
    [
        ({"eagle_ms": 30}, "timing", 1),
        ({"eagle_ms": 30}, "exact", 0),
        ({"eagle_ms": 15}, "all", 0),
        ({"runs": drafted_runs(chunks=lambda i: (1, 4, 2, 3) if i else (1, 4, 2, 2, 1))}, "exact", 1),
        ({"runs": [*drafted_runs(9), failed_run("p9", "writing")]}, "exact", 1),
        ({"runs": drafted_runs(9)}, "exact", 4),
        ({"runs": [*drafted_runs(8), failed_run("p9", "writing")]}, "exact", 1),
        ({"runs": drafted_runs(step_ns=lambda i: (10 + 25 * (i % 2)) * MS)}, "timing", 3),
        ({"machine": "b"}, "timing", 4),
        ({"machine": "b"}, "all", 4),
        ({"machine": "b"}, "exact", 0),
        ({"dtype": "bfloat16"}, "exact", 4),
        ({"suite": "gsm8k"}, "exact", 4),
    ],
    ids=str,
)
def test_exit_codes(base: Path, tmp_path: Path, new: dict[str, Any], gate: str, code: int) -> None:
    said = check(write_run(tmp_path / "new", **new), base, "--gate", gate)
    assert said.code == code, said.out + said.err
    assert f"(exit code {code})" in said.out


def test_a_single_file_may_be_the_baseline_of_a_single_file(base: Path, tmp_path: Path) -> None:
    new = write_run(tmp_path / "new") / "quick__eagle__smollm2.json"
    assert check(new, base / "quick__eagle__smollm2.json", "--gate", "exact").code == 0
    said = check(new, base, "--gate", "exact")
    assert said.code == 4
    assert "the new results lack it" in " ".join(said.out.split())


def test_slowdown_that_is_allowed_is_given_as_a_share(base: Path, tmp_path: Path) -> None:
    new = write_run(tmp_path / "new", eagle_ms=22)
    assert check(new, base).code == 1
    assert check(new, base, "--max-slowdown", "12%").code == 0


def test_files_for_other_tools_are_written_beside_the_table(base: Path, tmp_path: Path) -> None:
    new = write_run(tmp_path / "new", eagle_ms=30)
    junit, summary, found, benchmark = (tmp_path / name for name in ("j.xml", "s.md", "f.json", "b.json"))
    words = ("--junit", junit, "--summary", summary, "--json", found, "--benchmark-json", benchmark)
    assert check(new, base, *words, "--by", "category").code == 1
    assert ElementTree.parse(junit).getroot().findall(".//failure")
    assert summary.read_text().startswith("### spdbench check: regression (exit code 1): eagle")
    assert json.loads(found.read_text())["exit_code"] == 1
    assert {entry["unit"] for entry in json.loads(benchmark.read_text())} == {"x", "tokens/s", "%", "tokens"}


# Calibration


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Six runs of the same code, a folder each for their machine's bandwidth to differ."""
    for number, speed in enumerate((20, 20.6, 19.4, 20.2, 19.8, 20.1)):
        write_run(tmp_path / "aa", f"aa{number}", eagle_ms=speed)
    for path in (tmp_path / "aa").iterdir():
        data = json.loads(path.read_text())
        data["environment"]["read_bandwidth_bytes_per_s"] = int(path.stem[-1]) + 1
        path.write_text(json.dumps(data))
    return tmp_path / "aa"


def test_calibration_lies_beside_the_baseline_and_is_read_by_the_next_check(
    base: Path, repeated: Path, tmp_path: Path
) -> None:
    slower = write_run(tmp_path / "new", eagle_ms=22)
    assert check(slower, base, "--gate", "timing").code == 1
    said = check(repeated, base, "--calibrate")
    assert said.code == 0, said.err
    assert "--max-slowdown" in said.out.splitlines()[-1]
    assert "calibration.json" in said.err
    assert check(slower, base, "--gate", "timing").code == 0
    assert check(slower, base, "--gate", "timing", "--max-slowdown", "5%").code == 1
    assert spdbench("compare", base).code == 0, "a folder with a calibration is still a folder of results"


def test_runs_of_the_same_code_may_be_baseline_and_calibration_in_one(repeated: Path, tmp_path: Path) -> None:
    assert check(repeated, repeated, "--calibrate").code == 0
    assert check(write_run(tmp_path / "same", eagle_ms=20.3), repeated).code == 0
    assert check(write_run(tmp_path / "slower", eagle_ms=25), repeated).code == 1


def test_calibration_beside_a_baseline_that_is_a_file(base: Path, repeated: Path) -> None:
    assert check(repeated, base / "quick__eagle__smollm2.json", "--calibrate").code == 0
    assert (base / "calibration.json").exists()


def test_calibrating_another_label_keeps_the_first(base: Path, repeated: Path) -> None:
    def labels() -> set[str]:
        return {each["label"] for each in json.loads((base / "calibration.json").read_text())["thresholds"]}

    assert spdbench("check", repeated / "quick__vanilla*.json", "--baseline", base, "--calibrate").code == 0
    assert labels() == {"vanilla"}
    assert spdbench("check", repeated, "--baseline", base, "--calibrate").code == 0
    assert labels() == {"vanilla", "eagle"}
    assert spdbench("check", repeated / "quick__vanilla*.json", "--baseline", base, "--calibrate").code == 0
    assert labels() == {"vanilla", "eagle"}


def test_calibration_beside_a_baseline_that_is_not_there_is_refused(base: Path, repeated: Path) -> None:
    said = check(repeated, base / "gone.json", "--calibrate")
    assert said.code == 2
    assert "gone.json: does not exist" in said.err
    assert not (base / "calibration.json").exists()


def test_calibrating_replaces_a_damaged_calibration(base: Path, repeated: Path) -> None:
    (base / "calibration.json").write_text("{")
    assert check(repeated, base, "--calibrate").code == 0
    assert json.loads((base / "calibration.json").read_text())["schema"] == "spdbench.calibration/1"


def test_baselines_of_other_work_are_told_of_and_do_not_decide(base: Path, tmp_path: Path) -> None:
    write_run(base, "half", dtype="bfloat16")
    said = check(write_run(tmp_path / "new"), base, "--gate", "exact")
    assert said.code == 0
    assert "2 of 4 baseline results are of work that NEW holds nothing of" in said.err
    assert "quick in bfloat16" in said.err


def test_calibration_of_another_machine_is_replaced_and_that_is_said(base: Path, repeated: Path) -> None:
    (base / "calibration.json").write_text(
        json.dumps({"schema": "spdbench.calibration/1", "created": "then", "fingerprint": "other", "thresholds": []})
    )
    said = check(repeated, base, "--calibrate")
    assert said.code == 0
    assert "was another machine's, and is replaced" in said.err


def test_exact_gate_needs_no_calibration(base: Path, tmp_path: Path) -> None:
    (base / "calibration.json").write_text("{")
    assert check(write_run(tmp_path / "new"), base, "--gate", "exact").code == 0


def test_no_output_takes_the_place_of_a_result_or_of_another_output(base: Path, tmp_path: Path) -> None:
    new = write_run(tmp_path / "new")
    result = base / "quick__eagle__smollm2.json"
    before = result.read_bytes()
    said = check(new, base, "--json", result)
    assert said.code == 2
    assert "is one of the results" in said.err
    assert result.read_bytes() == before
    (tmp_path / "link").hardlink_to(result)
    assert "is one of the results" in check(new, base, "--json", tmp_path / "link").err
    (base / "calibration.json").write_text("{}")
    said = check(new, base, "--gate", "exact", "--json", base / "calibration.json")
    assert said.code == 2
    assert "is the calibration, which --calibrate writes" in said.err
    said = check(new, base, "--json", tmp_path / "same", "--junit", tmp_path / "same")
    assert said.code == 2
    assert "is what --junit writes, too" in said.err or "is what --json writes, too" in said.err


def test_an_output_replaces_only_what_an_earlier_check_wrote(base: Path, tmp_path: Path) -> None:
    options = ("--junit", "--summary", "--json", "--benchmark-json")
    new = write_run(tmp_path / "new")
    for option in options:
        other = tmp_path / "other.yaml"
        other.write_text("name: mine\n")
        said = check(new, base, option, other)
        assert said.code == 2
        assert f"{option} {other}: is there, and no earlier check wrote it" in said.err
        assert other.read_text() == "name: mine\n"
    page = tmp_path / "page.md"
    page.write_text("# Of another step\n")
    files = [word for option in options for word in (option, page if option == "--summary" else tmp_path / option[2:])]
    for _ in range(2):
        assert check(new, base, *files).code == 0


def test_findings_in_a_folder_of_results_are_no_result(base: Path, tmp_path: Path) -> None:
    new = write_run(tmp_path / "new")
    for _ in range(2):
        said = check(new, base, "--gate", "exact", "--json", new / "check.json")
        assert said.code == 0, said.err


def test_damaged_calibration_is_named(base: Path) -> None:
    (base / "calibration.json").write_text('{"schema": "spdbench.calibration/9"}')
    said = check(base, base)
    assert said.code == 2
    assert "calibration.json: is no calibration" in said.err


def test_too_few_runs_to_calibrate(base: Path) -> None:
    said = check(base, base, "--calibrate")
    assert said.code == 2
    assert "5 are the fewest" in said.err


# Wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-slowdown", "abc"), "'abc' is not a share"),
        (("--max-slowdown", "-5%"), "'-5%' is not a share"),
        (("--max-slowdown", "5"), "write 5%"),
        (("--max-slowdown", "100%"), "below 100%"),
        (("--max-acceptance-drop", "nan%"), "is not a share"),
        (("--gate", "speed"), "--gate"),
        (("--by", "colour"), "--by"),
        (("--junit", "no/such/folder/j.xml"), "--junit no/such/folder/j.xml: cannot be written"),
        (("--summary", "/proc/nothing.md"), "--summary /proc/nothing.md: cannot be written"),
        (("--calibrate", "--junit", "j.xml"), "--junit has no effect with --calibrate"),
        (("--calibrate", "--max-slowdown", "3%"), "--max-slowdown has no effect with --calibrate"),
    ],
    ids=" ".join,
)
def test_wrong_option_is_named(base: Path, words: tuple[str, ...], message: str) -> None:
    said = check(base, base, *words)
    assert said.code == 2
    assert message in " ".join(said.err.split())
    assert "Traceback" not in said.err


def test_wrong_input_wins_over_a_regression(base: Path, tmp_path: Path) -> None:
    new = write_run(tmp_path / "new", eagle_ms=30)
    assert check(new, base, "--junit", "no/such/folder/j.xml").code == 2


def test_files_that_cannot_be_judged_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    half, other = tmp_path / "half.json", tmp_path / "other.json"
    half.write_text('{"schema": ')
    other.write_text(
        (base / "quick__eagle__smollm2.json").read_text().replace("spdbench.result/1", "spdbench.result/7")
    )
    for path, message in (
        (tmp_path / "none.json", "none.json: cannot be read"),
        (tmp_path / "empty", "no result files (*.json) in this folder"),
        (half, "half.json: is not JSON"),
        (other, "has schema spdbench.result/7, written by a newer spdbench"),
    ):
        for said in (check(path, base), check(base, path)):
            assert said.code == 2
            assert message in said.err
            assert said.out == ""


def test_baseline_and_results_have_to_be_named(base: Path) -> None:
    assert spdbench("check", base).code == 2
    assert spdbench("check", "--baseline", base).code == 2


def test_check_loads_neither_torch_nor_transformers(base: Path) -> None:
    code = (
        "import sys; from spdbench.cli.main import run;"
        f"assert run(['check', {str(base)!r}, '--baseline', {str(base)!r}]) == 0;"
        "print([name for name in ('torch', 'transformers', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
