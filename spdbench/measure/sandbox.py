"""Runs a program that a model wrote, in its own process with as few rights as the system allows.

The process is a new interpreter (its memory holds no data of ours), in an empty folder that is deleted afterwards, with
an environment without the user's variables, and without site-packages: answers have the standard library. It has limits
on time, memory, file size, open files and processes, and `jail.py` blocks the network, other processes, and all files
except its folder and the standard library. The size of its folder is watched from here.

The child reports that the program has finished by a secret token. The program is not given the token, but it runs in
the process that holds it and so could find it. The verdict is therefore reliable for code that tries to solve its task,
not for code that sets out to deceive the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from spdbench.errors import InputError, NotRunError

JAIL = Path(__file__).with_name("jail.py")
COMMAND = (sys.executable, "-S", "-s", "-P", "-B", str(JAIL))
MAX_REPLY_BYTES = 2**16
START_S, LOOK_S = 60.0, 0.1
"""How long Python may take to start, and how often the size of the program's folder is checked."""

PROMISES = {
    "calls": "no network, no further processes, no signals to others, no changes to how they run (seccomp)",
    "files": "no files but an empty folder and the standard library (Landlock and seccomp)",
    "memory_bytes": "a limit on memory",
}
"""What each guard of the kernel ensures, whatever the program does."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. `wall_s` is for programs that sleep; `entries` are files and folders in its folder."""

    cpu_s: int = 5
    wall_s: int = 15
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    open_files: int = 32
    processes: int = 0
    disk_bytes: int = 2**24
    entries: int = 1000


STANDARD = Limits()


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended; `guards` are those that were in force."""

    finished: bool
    guards: tuple[str, ...]


def run_program(program: str, limits: Limits = STANDARD) -> ExecutionResult:
    """Runs `program`. It has not finished if it ended by an exception, an exit or a limit.

    Raises:
        NotRunError: no process can be started, or no folder made, or Python has not started in time.
    """
    token = secrets.token_hex(16)
    request = json.dumps({"program": program, "token": token, "limits": asdict(limits)})
    try:
        with _folder() as folder, tempfile.TemporaryFile() as question:
            question.write(request.encode("utf-8", "surrogatepass"))
            question.seek(0)
            environment = {"HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
            with subprocess.Popen(
                COMMAND,
                stdin=question,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=environment,
                start_new_session=True,
            ) as process:
                assert process.stdout is not None
                try:
                    reply = _read_reply(process.stdout.fileno(), folder, limits)
                finally:
                    process.kill()
            guards, started, verdict = reply.partition(b"\n")
            if not started:
                raise NotRunError("--allow-code-execution: answers cannot be run here (Python does not start)")
            finished = verdict == token.encode() + b"\n" and not _exceeds_limits(folder, limits)
    except OSError as error:
        raise NotRunError(f"--allow-code-execution: answers cannot be run here ({error.strerror})") from None
    return ExecutionResult(finished, tuple(json.loads(guards)))


def _read_reply(pipe: int, folder: str, limits: Limits) -> bytes:
    """The child's output until its second line is complete, or it ends, or it exceeds a limit. The program's wall time
    starts with the first line, which the child writes once Python is ready."""
    reply, end = b"", time.monotonic() + START_S
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while reply.count(b"\n") < 2 and len(reply) < MAX_REPLY_BYTES and time.monotonic() < end:
            if selector.select(LOOK_S):
                piece = os.read(pipe, MAX_REPLY_BYTES)
                if not piece:
                    break
                if b"\n" in piece and b"\n" not in reply:
                    end = time.monotonic() + limits.wall_s
                reply += piece
            if _exceeds_limits(folder, limits):
                break
    return reply


def _exceeds_limits(folder: str, limits: Limits) -> bool:
    """True if `folder` holds more than it may, or a folder that cannot be read and so may hold anything."""
    folders, entries, size = [folder], 0, 0
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    with contextlib.suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_size
                    if entries > limits.entries or size > limits.disk_bytes:
                        return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """An empty folder, deleted at the end. Nested folders are moved to its top first, since a program may nest them too
    deep for `rmtree`."""
    folder = tempfile.mkdtemp(prefix="spdbench-answer-")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            while inner := _folders_in(folder):
                for path in inner:
                    _folders_in(path)
                    for name in os.listdir(path):
                        os.rename(os.path.join(path, name), os.path.join(folder, secrets.token_hex(16)))
                    os.rmdir(path)
        shutil.rmtree(folder, ignore_errors=True)


def _folders_in(folder: str) -> list[str]:
    """The folders in `folder`, made accessible."""
    with os.scandir(folder) as found:
        folders = [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
    for path in folders:
        os.chmod(path, 0o700)
    return folders


def passes(program: str) -> bool:
    """True if `program` finishes within the standard limits."""
    return run_program(program).finished


def require_sandbox() -> str:
    """A sentence on what is guaranteed on this machine, after an empty program has run.

    Raises:
        InputError: the empty program has not finished.
    """
    outcome = run_program("pass")
    if not outcome.finished:
        raise InputError(
            "--allow-code-execution: a program that does nothing fails in the sandbox; nothing is run here"
        )
    kept = [promise for name, promise in PROMISES.items() if name in outcome.guards]
    lacking = [promise for name, promise in PROMISES.items() if name not in outcome.guards]
    sentence = f"guaranteed by the system: {'; '.join(kept) or 'nothing'}"
    if lacking:
        sentence += f". NOT guaranteed, only asked of Python: {'; '.join(lacking)}. Use a machine that may be lost"
    return f"{sentence}."
