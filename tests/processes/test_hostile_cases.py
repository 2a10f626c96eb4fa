"""Replays recorded cases of hostile and broken input, each in its own folder with the command in `how.txt`.

A case passes if the command ends by itself with a documented exit code and a message, without a traceback, within
time and memory, runs no code of the input, loses no file, and prints nothing that a terminal would obey.

    SPDBENCH_HOSTILE_CASES=FOLDER python -m pytest tests/processes/test_hostile_cases.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from spdbench.console import printable

CASES = Path(os.environ.get("SPDBENCH_HOSTILE_CASES", "no-folder"))
FOLDERS = sorted(path.parent for path in CASES.glob("*/how.txt"))
BASELINES = Path(__file__).parents[2] / "results" / "baselines"
CPU_LIMIT_S, WALL_LIMIT_S = 30, 120
"""A command that computes without end is found by the first, however busy the machine; one that waits by the second."""
MEMORY_LIMIT = 2 * 2**30
MAX_OUTPUT_LENGTH = 50_000
"""In characters; no message of a file shows a megabyte of it."""

EXIT_CODES = {
    "03-calibrate-markup-in-label": 0,  # unusual names, and nothing wrong with the numbers
    "04-deep-hashes": 0,  # hashes that are kept are only a shortcut
    "04-deep-summary": 0,  # counts that are lost begin at 0, and the data goes on
    "11-index-name-too-long": 0,  # the weights that the index should name are there
    "16-server-metrics-position": 0,  # counters that cannot be read are not reported
    "17-summary-of-a-file-name-that-is-not-utf8": 0,
    "18-summary-infinite": 0,
    "18-summary-seconds-text": 0,
    "45-data-file-lone-CR-truncates": 0,
    "50-journal-outcome-of-no-request": 0,  # the recorded run has put its journal into a result; see test_journal.py
    "51-journal-lines-of-another-label": 0,
    "52-journal-cut-behind-its-header": 0,
    "54-calibration-spread-without-bound": 1,  # a regression, which the calibration hid
    "62-latex-newline-in-a-model-id": 0,
}
"""Where it is not 2, wrong input."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is None if it had to be stopped."""

    code: int | None
    output: str
    peak_bytes: int
    folder: Path

    def files(self) -> dict[str, bytes]:
        return _files(self.folder)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        os.fsdecode(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("how.txt", "seen.txt")
    }


def copy_of(case: Path, scratch: Path) -> Path:
    """A copy of the case without what its recorded run left behind, beside the model that commands name."""
    shutil.copytree(CASES / "tiny", scratch / "tiny")
    folder = scratch / case.name
    shutil.copytree(case, folder, symlinks=True)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200)
    (folder / "RAN").unlink(missing_ok=True)
    if "--resume" not in (case / "how.txt").read_text():
        shutil.rmtree(folder / "results", ignore_errors=True)
    if "make first: ln -s" in (case / "how.txt").read_text():
        (folder / "loop").symlink_to("loop")
    if "--calibrate" in (case / "how.txt").read_text():
        (folder / "base" / "calibration.json").unlink()
    if "BASELINES" in (case / "how.txt").read_text():
        shutil.copytree(folder / "new" if (folder / "new").exists() else BASELINES, folder / "BASELINES")
    return folder


def replay(folder: Path) -> Ended:
    command = (folder / "how.txt").read_text().partition("\n")[0]
    # The command is one line of the recorded cases, written for a shell; servers that it starts end with it.
    settings = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SPDBENCH_CACHE": str(folder.parent / "own-cache"),
        "SPDBENCH_DRAFTERS": str(folder.parent / "no-drafters"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (folder.parent / "output").open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end, peak, cpu_s = time.monotonic() + WALL_LIMIT_S, 0, 0.0
    try:
        while process.poll() is None and time.monotonic() < end and cpu_s < CPU_LIMIT_S and peak < MEMORY_LIMIT:
            used, cpu_s = _used_by_group(process.pid)
            peak = max(peak, used)
            time.sleep(0.05)
        code = process.poll()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ended(code, (folder.parent / "output").read_text(errors="backslashreplace"), peak, folder)


def _used_by_group(group: int) -> tuple[int, float]:
    """Resident bytes of all processes of a process group, and their CPU seconds with those of children that ended."""
    total, ticks = 0, 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[2]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGESIZE")
            ticks += sum(map(int, fields[11:15]))
    return total, ticks / os.sysconf("SC_CLK_TCK")


def lost_files(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """The files whose content is gone. Logs that a command continues may grow; summaries and what is
    kept of hashes are renewed."""
    lost = []
    for name, content in before.items():
        now = after.get(name)
        if now == content or name.endswith(".summary.json") or name.startswith(("results/", "cache/")):
            continue
        if name == "d.jsonl" and now is not None and _conversations(content) <= _conversations(now):
            continue
        if content:  # an empty file has nothing to lose
            lost.append(name)
    return lost


def _conversations(content: bytes) -> set[bytes]:
    """The complete lines of a data file behind its header."""
    return set(content.split(b"\n")[1:-1])


@pytest.mark.skipif(not FOLDERS, reason="SPDBENCH_HOSTILE_CASES names no folder with cases")
@pytest.mark.parametrize("case", FOLDERS or [Path("none")], ids=lambda case: case.name)
def test_a_hostile_input_gives_a_message_and_does_no_harm(case: Path, tmp_path: Path) -> None:
    folder = copy_of(case, tmp_path)
    before = _files(folder)
    ended = replay(folder)
    shown = f"exit {ended.code}, {ended.peak_bytes / 2**20:.0f} MiB\n{printable(ended.output)}"
    print(shown)
    assert ended.code is not None, f"stopped after {CPU_LIMIT_S} s of CPU, {WALL_LIMIT_S} s or at 2 GiB: {shown}"
    assert "Traceback" not in ended.output, shown
    assert ended.code == EXIT_CODES.get(case.name, 2), shown
    assert ended.peak_bytes < MEMORY_LIMIT, shown
    assert len(ended.output) < MAX_OUTPUT_LENGTH
    raw = [char for char in ended.output if printable(char) != char]
    assert not raw, f"raw characters {raw[:5]}: {shown}"
    assert not (folder / "RAN").exists(), "code of the input has run"
    assert not (lost := lost_files(before, ended.files())), f"lost {lost}: {shown}"
    if check := FURTHER_CHECKS.get(case.name):
        check(ended)


def _no_line_outside_of_a_comment(ended: Ended) -> None:
    lines = ended.output.splitlines()
    assert all(line.startswith(("%", "\\")) or line.rstrip().endswith("\\\\") or not line for line in lines)


def _is_not_called_output(ended: Ended) -> None:
    assert "output cannot be written" not in ended.output


def _has_a_summary(ended: Ended) -> None:
    assert "spdbench check" in (ended.folder / "out.md").read_text(encoding="utf-8")


def _calibration_is_there(ended: Ended) -> None:
    found = json.loads((ended.folder / "base" / "calibration.json").read_bytes())
    assert found["schema"] == "spdbench.calibration/1"


FURTHER_CHECKS = {
    "42-check-json-over-calibration": _calibration_is_there,
    "17-summary-of-a-file-name-that-is-not-utf8": _has_a_summary,
    "57-unreadable-input-is-called-output": _is_not_called_output,
    "62-latex-newline-in-a-model-id": _no_line_outside_of_a_comment,
}
