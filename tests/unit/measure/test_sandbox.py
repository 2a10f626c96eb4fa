"""The sandbox: what a program may do, what it may not, and that its verdict cannot be had by leaving early."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from spdbench.errors import InputError
from spdbench.measure import sandbox
from spdbench.measure.sandbox import Limits, passes, require_sandbox, run_program

HARMLESS = {
    "sums": "assert sum(range(5)) == 10",
    "library": "import collections, dataclasses, datetime, decimal, functools, heapq, itertools, json, math, re",
    "types": "from typing import List\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)",
    "own file": "open('x', 'w').write('hi')\nassert open('x').read() == 'hi'",
    "no main": "if __name__ == '__main__':\n    raise SystemExit(1)",
    "talks": "print('a' * 100000)",
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


@pytest.mark.parametrize("program", FORBIDDEN.values(), ids=FORBIDDEN)
def test_program_cannot_reach_beyond_its_folder(program: str) -> None:
    assert not passes(program)


@pytest.mark.parametrize("program", FAILS.values(), ids=FAILS)
def test_program_that_fails_or_leaves_early_does_not_pass(program: str) -> None:
    assert not passes(program)


@pytest.mark.parametrize("name", ["socket", "process", "fork", "kill", "user's files", "folders", "elsewhere"])
def test_python_itself_refuses_where_the_kernel_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    code = "import runpy, sys; sys.argv[0]; jail = runpy.run_path({!r}); main = jail['main']; "
    code += "main.__globals__.update(_guard_calls=lambda *_: False, _guard_files=lambda *_: False); main()"
    script = tmp_path / "unguarded.py"
    script.write_text(code.format(str(sandbox.JAIL)))
    monkeypatch.setattr(sandbox, "COMMAND", (*sandbox.COMMAND[:-1], str(script)))
    assert not passes(FORBIDDEN[name])
    assert all(passes(program) for program in (HARMLESS["own file"], HARMLESS["library"], HARMLESS["types"]))
    assert "NOT guaranteed, only asked of Python: no network" in require_sandbox()


def test_endless_and_sleeping_programs_end() -> None:
    start = time.monotonic()
    assert not run_program("while True: pass", Limits(cpu_s=1)).finished
    assert not run_program("import time\ntime.sleep(60)", Limits(wall_s=1)).finished
    assert time.monotonic() - start < 15


def test_memory_has_a_limit() -> None:
    assert not run_program("x = bytearray(2**29)", Limits(memory_bytes=2**28)).finished
    assert run_program("x = bytearray(2**20)", Limits(memory_bytes=2**28)).finished


def test_secrets_in_the_environment_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert passes("import os\nassert 'hf_secret' not in os.environ.values() and 'PATH' not in os.environ")


def test_folder_is_empty_at_first_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes("import os\nassert not os.listdir('.')\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.chmod('a', 0)")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the guards are Linux's")
def test_guards_in_force_are_told() -> None:
    told = require_sandbox()
    assert told.startswith("guaranteed by the system: no network")


def test_sandbox_in_which_nothing_works_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "COMMAND", (sys.executable, "-c", "pass"))
    with pytest.raises(InputError, match="a program that does nothing fails"):
        require_sandbox()
    monkeypatch.setattr(sandbox, "COMMAND", ("/no/such/python",))
    with pytest.raises(InputError, match="cannot be run here"):
        require_sandbox()
