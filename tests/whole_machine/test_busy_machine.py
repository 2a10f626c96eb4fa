"""Another program that computes on one core while requests are measured: table and result say who and how much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.run_helpers import write_suite

pytestmark = [
    pytest.mark.whole_machine,
    pytest.mark.skipif(sys.platform != "linux", reason="processor time of other processes is Linux's"),
]
LIMIT_S = 300
"""Against hanging; the run takes seconds."""
HOG = f"import time\nend = time.monotonic() + {LIMIT_S}\nwhile time.monotonic() < end: pass"


@pytest.fixture
def cores() -> Iterator[list[int]]:
    """At most two processors, to which this process and what it starts are confined."""
    before = os.sched_getaffinity(0)
    chosen = sorted(before)[:2]
    os.sched_setaffinity(0, chosen)
    yield chosen
    os.sched_setaffinity(0, before)


@pytest.fixture
def hog(cores: list[int]) -> Iterator[int]:
    """The number of a process that keeps one of `cores` busy."""
    process = subprocess.Popen([sys.executable, "-c", HOG])
    os.sched_setaffinity(process.pid, cores[-1:])
    yield process.pid
    process.kill()
    process.wait()


def test_a_program_that_keeps_a_core_busy_is_a_flag_in_table_and_result(tmp_path: Path, hog: int) -> None:
    # Answers of some tenths of a second: idle time is counted in ticks of 10 ms, so less is no sign of a disturbance.
    model = tiny.make_model(tmp_path / "model", max_position_embeddings=4096)
    suite = write_suite(tmp_path, num_prompts=3, decoding={"max_new_tokens": 3000})
    words = [str(suite), "-m", str(model), "--dtype", "float32", "-b", "vanilla", "-b", "ngram", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "spdbench", "run", *words, "--results", str(tmp_path / "r")],
        env=os.environ | {"SPDBENCH_CACHE": str(tmp_path / "cache"), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "busy_machine" in done.stdout
    for label in ("vanilla", "ngram"):
        result = json.loads(next((tmp_path / "r").glob(f"*__{label}__*.json")).read_bytes())
        [flag] = [each for each in result["flags"] if each["name"] == "busy_machine"]
        assert Path(f"/proc/{hog}/comm").read_text().strip() in flag["reason"]
        assert "of the time in which requests were measured" in flag["reason"]
