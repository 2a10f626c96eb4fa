"""`spdbench run` in a child process that a test stops at a chosen moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.run_helpers import write_suite

SECONDS = 120.0  # a limit against hanging, not an expectation


def react_to_ctrl_c() -> None:
    """Undoes that a shell starts background jobs with SIGINT ignored, which their children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process:
    """`spdbench run` on the tiny model in a child process."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.results = folder / "results"
        self.journals = [self.results / f"mini__{label}__tiny-llama.journal.jsonl" for label in ("vanilla", "spd")]
        suite = write_suite(folder, num_prompts=40, turns=2, decoding={"max_new_tokens": 40})
        self.command = [
            *(sys.executable, "-m", "spdbench", "run", str(suite), "-m", str(model), "--dtype", "float32"),
            *("--threads", "1", "--drafter", "oracle:0.8", "--results", str(self.results), *options),
        ]
        self.environment = {**os.environ, "SPDBENCH_CACHE": str(folder / "cache")}

    def start(self, *words: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=react_to_ctrl_c,
        )

    def lines(self) -> int:
        return sum(path.read_bytes().count(b'\n{"run"') for path in self.journals if path.exists())

    def stop_after(self, num_runs: int, how: signal.Signals, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        self.wait_for(num_runs, process)
        process.send_signal(how)
        _, err = process.communicate(timeout=SECONDS)
        return process.returncode, err

    def wait_for(self, num_runs: int, process: subprocess.Popen[str]) -> None:
        """Waits until `num_runs` requests are in the journals."""
        deadline = time.monotonic() + SECONDS
        while self.lines() < num_runs and process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"it never finished {num_runs} requests: {process.communicate()}")
            time.sleep(0.005)

    def finish(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        _, err = process.communicate(timeout=SECONDS)
        return process.returncode, err
