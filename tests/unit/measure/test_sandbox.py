"""The sandbox: what a program may do, what it may not, and that leaving early is not to come to the end."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from spdbench.errors import InputError, NotRunError
from spdbench.measure import sandbox
from spdbench.measure.sandbox import Limits, passes, require_sandbox, run_program

HARMLESS = {
    "sums": "assert sum(range(5)) == 10",
    "library": "import collections, dataclasses, datetime, decimal, functools, heapq, itertools, json, math, re",
    "types": "from typing import List\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)",
    "own file": "open('x', 'w').write('hi')\nassert open('x').read() == 'hi'",
    "no main": "if __name__ == '__main__':\n    raise SystemExit(1)",
    "talks": "print('a' * 100000)",
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 1\nassert asyncio.run(f()) == 1",
    "time zone": "import datetime, zoneinfo\ndatetime.datetime.now(zoneinfo.ZoneInfo('Europe/Berlin'))",
    "devices": "print('a', file=open('/dev/null', 'w'))\nassert len(open('/dev/urandom', 'rb').read(3)) == 3",
    "host": "import platform, socket\nassert socket.gethostname() == platform.node()",
    "C's integers": "import ctypes\nassert ctypes.c_int32(2**31).value < 0",
    "temporary files": "import tempfile\nwith tempfile.TemporaryDirectory() as a:\n    open(a + '/b', 'w').close()\n"
    "with tempfile.TemporaryFile() as f:\n    f.write(b'a')",
    "database": "import sqlite3\nwith sqlite3.connect('a.db') as c:\n    c.execute('create table a (b)')",
    "alarm": "import signal, time\nrang = []\nsignal.signal(signal.SIGALRM, lambda *_: rang.append(1))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\ntime.sleep(0.1)\nassert rang",
}
FORBIDDEN = {
    "socket": "import socket\nsocket.socket()",
    "connect": "import urllib.error, urllib.request\ntry:\n    urllib.request.urlopen('http://127.0.0.1:9')\n"
    "except urllib.error.URLError as e:\n    if not isinstance(e.reason, ConnectionRefusedError):\n        raise",
    "process": "import subprocess\nsubprocess.run(['/bin/true'])",
    "fork": "import os\nos.fork()",
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "user's files": "open('/etc/passwd').read()",
    "folders": "import os\nos.listdir('/root' if os.geteuid() == 0 else '/home')",
    "other processes": "open(f'/proc/{__import__(\"os\").getppid()}/environ').read()",
    "elsewhere": "open('/tmp/spdbench-was-here', 'w')",
    "large file": "open('x', 'wb').write(b'a' * 3_000_000)\nimport os\nassert os.path.getsize('x') == 3_000_000",
    "many files": "held = [open(f'{i}', 'w') for i in range(100)]",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    "packages": "import pytest",
    "affinity": "import os\nos.sched_setaffinity(os.getppid(), os.sched_getaffinity(os.getppid()))",
    "priority": "import os\nos.setpriority(0, os.getppid(), os.getpriority(0, os.getppid()))",
    "policy": "import os\nos.sched_setscheduler(os.getppid(), os.SCHED_OTHER, os.sched_param(0))",
    "mode": "import os\nos.chmod(VICTIM, 0)",
    "mode of an open file": "import os\nf = os.open(os.__file__, 0)\nos.fchmod(f, os.fstat(f).st_mode)",
    "owner": "import os\nos.chown(VICTIM, -1, -1)",
    "times": "import os\nos.utime(VICTIM, (0, 0))",
    "attribute": "import os\nos.setxattr(VICTIM, 'user.a', b'1')",
    "no attribute": "import os\nos.removexattr(VICTIM, 'user.kept')",
    "truncate": "import os\nos.truncate(VICTIM, 0)",
    "owner of signals": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "which signal": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 10, 0)",
    "owner by ioctl": "import fcntl, os, socket, struct\na, b = socket.socketpair()\n"
    "fcntl.ioctl(a, 0x8901, struct.pack('i', os.getppid()))",
    "signals by ioctl": "import fcntl, os, struct\nfcntl.ioctl(os.pipe()[0], 0x5452, struct.pack('i', 1))",
    "datagrams": "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)",
    "memory file": "import os\nos.memfd_create('a')",
}
FAILS = {
    "assertion": "assert False",
    "syntax": "def f(:",
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "asks": "input()",
    "says so": "import os\nos.write(3, b'x' * 32)\nraise SystemExit",
}


@pytest.mark.parametrize("program", HARMLESS.values(), ids=HARMLESS)
def test_harmless_program_comes_to_its_end(program: str) -> None:
    assert passes(program)


def landlock_version() -> int:
    return int(ctypes.CDLL(None).syscall(444, None, 0, 1))


GUARDED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
PYTHON_REFUSES = (
    "socket", "process", "fork", "kill", "user's files", "folders", "elsewhere", "mode", "owner", "times", "attribute",
    "truncate", "owner of signals", "owner by ioctl",
)  # fmt: skip


@pytest.fixture
def change_jail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets globals of the child's script, given as a call's keywords."""

    def change(keywords: str) -> None:
        script = tmp_path / "changed.py"
        script.write_text(
            f"import runpy\nmain = runpy.run_path({str(sandbox.JAIL)!r})['main']\n"
            f"main.__globals__.update({keywords})\nmain()"
        )
        monkeypatch.setattr(sandbox, "COMMAND", (*sandbox.COMMAND[:-1], str(script)))

    return change


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of the user's, as it has to be afterwards."""
    path = tmp_path / "victim"
    path.write_text("kept")
    with suppress(OSError):  # not every file system has these
        os.setxattr(path, "user.kept", b"1")
    before = path.stat()
    yield path
    after = path.stat()
    assert (after.st_mode, after.st_mtime_ns, path.read_text()) == (before.st_mode, before.st_mtime_ns, "kept")


@pytest.mark.skipif(not GUARDED, reason="no guards of the kernel's")
@pytest.mark.parametrize("name", FORBIDDEN)
def test_kernel_alone_keeps_a_program_in_its_folder(
    change_jail: Callable[[str], None], victim: Path, name: str
) -> None:
    change_jail("_hook=lambda *_: None")
    assert not passes(f"VICTIM = {str(victim)!r}\n{FORBIDDEN[name]}")


@pytest.mark.skipif(not GUARDED, reason="no guards of the kernel's")
@pytest.mark.parametrize(
    "program",
    [
        "os.truncate(VICTIM, 0)",
        "os.open(VICTIM, os.O_RDONLY | os.O_TRUNC)",
        "os.open(VICTIM, 3 | os.O_TRUNC)",
        "os.open(os.__file__, os.O_WRONLY)",
        "os.open(os.__file__, 3)",
    ],
)
def test_files_are_safe_from_being_emptied_where_landlock_is_of_its_first_version(
    change_jail: Callable[[str], None], victim: Path, program: str
) -> None:
    change_jail("_hook=lambda *_: None, RIGHTS_BY_VERSION=((1, 13),)")
    assert not passes(f"import os\nVICTIM = {str(victim)!r}\n{program}")
    assert passes(HARMLESS["own file"])


@pytest.mark.skipif(not GUARDED, reason="no guards of the kernel's")
def test_files_are_not_said_to_be_safe_without_a_guard_on_calls(change_jail: Callable[[str], None]) -> None:
    change_jail("_guard_calls=lambda *_: False")
    assert "NOT guaranteed, only asked of Python: no network" in require_sandbox()
    assert not {"files", "calls"} & set(run_program("pass").guards)


@pytest.mark.skipif(not GUARDED or landlock_version() < 6, reason="Landlock knows nothing of signals before version 6")
def test_landlock_alone_refuses_signals(change_jail: Callable[[str], None]) -> None:
    change_jail("_hook=lambda *_: None, _guard_calls=lambda *_: False")
    assert not passes("import os\nos.kill(os.getppid(), 0)")
    assert passes("import os\nos.kill(os.getpid(), 0)")


@pytest.mark.parametrize("program", FAILS.values(), ids=FAILS)
def test_program_that_fails_or_leaves_early_does_not_pass(program: str) -> None:
    assert not passes(program)


@pytest.mark.parametrize("name", PYTHON_REFUSES)
def test_python_itself_refuses_where_the_kernel_does_not(
    change_jail: Callable[[str], None], victim: Path, name: str
) -> None:
    change_jail("_guard_calls=lambda *_: False, _guard_files=lambda *_: False")
    assert not passes(f"VICTIM = {str(victim)!r}\n{FORBIDDEN[name]}")


@pytest.mark.parametrize("name", ["own file", "library", "types", "asyncio", "devices"])
def test_python_alone_lets_harmless_programs_be(change_jail: Callable[[str], None], name: str) -> None:
    change_jail("_guard_calls=lambda *_: False, _guard_files=lambda *_: False")
    assert passes(HARMLESS[name])


def test_endless_and_sleeping_programs_end() -> None:
    assert not run_program("while True: pass", Limits(cpu_s=1, wall_s=100)).finished
    start = time.monotonic()
    assert not run_program("import time\ntime.sleep(60)", Limits(wall_s=1)).finished
    assert time.monotonic() - start < 60


def test_time_runs_from_when_python_has_started(change_jail: Callable[[str], None]) -> None:
    change_jail("_start=__import__('time').sleep(2)")
    assert run_program("pass", Limits(wall_s=1)).finished


def test_python_that_does_not_start_in_time_gives_no_verdict(
    change_jail: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_jail("_start=__import__('time').sleep(60)")
    monkeypatch.setattr(sandbox, "START_S", 0.2)
    with pytest.raises(NotRunError, match="Python does not start"):
        run_program("pass")


@pytest.mark.parametrize("much", ["open(f'{i}', 'wb').write(b'a' * 2**16)", "os.makedirs(f'{i}/{i}')"])
def test_what_a_program_leaves_on_the_disk_has_a_limit(much: str) -> None:
    program = f"import os, time\nfor i in range(20): {much}\n"
    limits = Limits(disk_bytes=2**20, entries=30, wall_s=50)
    assert not run_program(program, limits).finished
    start = time.monotonic()
    assert not run_program(f"{program}time.sleep(100)", limits).finished
    assert time.monotonic() - start < 50
    assert run_program(program, Limits(disk_bytes=2**21, entries=50)).finished


def test_memory_has_a_limit() -> None:
    assert not run_program("x = bytearray(2**29)", Limits(memory_bytes=2**28)).finished
    assert run_program("x = bytearray(2**20)", Limits(memory_bytes=2**28)).finished


def test_secrets_in_the_environment_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert passes("import os\nassert 'hf_secret' not in os.environ.values() and 'PATH' not in os.environ")


def test_folder_is_empty_at_first_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes("import os\nassert not os.listdir('.')\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.mkdir('c', 0)")
    assert os.listdir(tmp_path) == []


def test_folder_is_gone_however_deep_it_is(
    change_jail: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_jail("_hook=lambda *_: None")  # it takes long for long paths
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('a')\n    os.chdir('a')"
    assert run_program(deep, Limits(entries=2000, disk_bytes=2**30)).finished
    assert os.listdir(tmp_path / "temporary") == []


@pytest.mark.skipif(sys.platform != "linux", reason="the guards are Linux's")
def test_guards_in_force_are_reported() -> None:
    sentence = require_sandbox()
    assert sentence.startswith("guaranteed by the system: no network")


def test_sandbox_in_which_nothing_works_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, reason in (
        ((sys.executable, "-c", "print('[]')"), "a program that does nothing fails"),
        ((sys.executable, "-c", "pass"), "Python does not start"),
        (("/no/such/python",), "cannot be run here"),
    ):
        monkeypatch.setattr(sandbox, "COMMAND", command)
        with pytest.raises(InputError, match=reason):
            require_sandbox()
