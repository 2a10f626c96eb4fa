"""Child processes: what they know of this one, and that they end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spdbench.pipeline.processes.children import child_process

PARENT = """
import os, signal, sys, time
from tests.unit.pipeline.test_children import write_own_number
from spdbench.pipeline.processes.children import child_process

if __name__ == "__main__":
    child_process(write_own_number, sys.argv[1], name="stopped").start()
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.05)
    os.kill(int(open(sys.argv[1]).read()), signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_mark(file: str) -> None:
    Path(file).write_text(os.environ["SPDBENCH_TEST_MARK"])


def write_own_number(file: str) -> None:
    Path(f"{file}.part").write_text(str(os.getpid()))
    Path(f"{file}.part").rename(file)
    time.sleep(300)


def test_each_child_has_the_environment_of_its_own_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mark in ("first", "second"):
        monkeypatch.setenv("SPDBENCH_TEST_MARK", mark)
        child = child_process(write_mark, str(tmp_path / mark), name="marked")
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert (tmp_path / mark).read_text() == mark


@pytest.mark.skipif(sys.platform != "linux", reason="other systems send no signal")
def test_a_stopped_child_ends_with_a_killed_parent(tmp_path: Path) -> None:
    file = tmp_path / "number"
    done = subprocess.run([sys.executable, "-c", PARENT, str(file)], cwd=Path(__file__).parents[3], timeout=120)
    assert done.returncode == -signal.SIGKILL
    state, deadline = Path(f"/proc/{file.read_text()}/stat"), time.monotonic() + 30
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
