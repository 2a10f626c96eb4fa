"""What runs parts of the GPU benchmark: what they need, processes that are never left behind, the machine's name.

Imports no package, so that it can say which are missing. Must not know what parts measure.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "numpy", "numba", "pydantic", "safetensors", "tabulate")
"""Of the project's dependencies, those that parts import."""

SOURCES = ("spdbench/**/*.py", "backends/**/*.py", "benchmarks/gpu*.py", "benchmarks/sides.py")
GPU = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
TAIL = 1500
"""Characters of an output or a traceback that are kept."""

LOOKS_EVERY_S = 0.5


def missing() -> str:
    """What cannot be imported and how to install it, in one message; empty if all is there."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    wanted = {re.split(r"[<>=!~ ]", each)[0]: each for each in declared}
    absent = [wanted[name] for name in NEEDED if find_spec(name) is None]
    if not absent:
        return ""
    names = ", ".join(absent)
    return f"not installed: {names}. Try: {sys.executable} -m pip install {' '.join(repr(each) for each in absent)}"


def run_apart(command: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """Exit code, None if it ran out of time, and output of a command in a process group of its own, which has ended
    when this returns or raises, whatever raised it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        _end_group(process)
        said, _ = process.communicate()
        return None, said
    except BaseException:
        _end_group(process)
        process.wait()
        raise


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its stages with it


def raise_when_told_to_stop() -> None:
    """SIGTERM and SIGHUP become exceptions, so that what was started is ended; and SIGINT is one in the background as
    well, where shells have it ignored."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with(parent: int) -> None:
    """Ends this process's group soon after its parent is gone, were it by SIGKILL: nothing else would end it then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS_EVERY_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def tail(error: BaseException) -> str:
    """The end of an error's traceback."""
    return "".join(traceback.format_exception(error))[-TAIL:].rstrip()


def gpu_name(limit_s: float = 120) -> str:
    """The card as torch names it, empty if there is none that works. Asked in a process of its own: this one must not
    hold a piece of the card while others measure it."""
    command = [sys.executable, "-W", "ignore", "-c", GPU]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def identity(gpu: str) -> dict[str, str]:
    """What numbers hang on besides settings; those of different identities never stand in one table."""
    found = {"gpu": gpu or "none", "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # on the path, but not installed
            found[package] = "unknown"
    return {**found, "sources": sources()}


def sources(root: Path = ROOT) -> str:
    """A hash of all that is measured and of what measures it. Unlike git's state it tells two unsaved changes apart,
    holds where there is no checkout, and does not change with a document."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
