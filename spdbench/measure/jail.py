"""The child's side of `sandbox.py`: gives up all that a program does not need, then runs the program.

A script for the interpreter alone: it imports nothing of ours. What the kernel refuses it refuses whatever the program
does: system calls by seccomp, files by Landlock (https://docs.kernel.org/userspace-api/landlock.html), sizes by
rlimits. Where the kernel lacks one of the first two, a hook inside Python stands in, which only code that does not
try to get round it respects.

stdin: {"program", "token", "limits"}. stdout: the guards in force as a line of JSON, then `token` if the program came
to its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig
import types
from collections.abc import Sequence
from typing import Any

SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")

NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
NEW_USER, NEW_NET, NEW_IPC = 0x10000000, 0x40000000, 0x08000000

ARCHITECTURES: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "x86_64": (
        0xC000003E,
        {
            "network": (41, 42, 43, 44, 46, 49, 50, 53, 288, 425),
            "processes": (56, 57, 58, 59, 322, 435),
            "other processes": (62, 101, 129, 200, 234, 297, 310, 311, 312, 424, 434, 438),
            "limits": (160, 302),
            "shared memory": (29, 64, 68),
            "the system": (161, 165, 166, 169, 175, 248, 249, 250, 272, 298, 304, 308, 313, 321, 323),
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "network": (198, 199, 200, 201, 202, 203, 206, 211, 242, 425),
            "processes": (220, 221, 281, 435),
            "other processes": (117, 129, 130, 131, 138, 240, 270, 271, 272, 424, 434, 438),
            "limits": (164, 261),
            "shared memory": (186, 190, 194),
            "the system": (39, 40, 51, 97, 105, 142, 217, 218, 219, 241, 265, 268, 273, 280, 282),
        },
    ),
}
"""Machine -> its number in audit records, and the system calls that a program is refused, by what they are for."""

LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_GREATER_OR_EQUAL, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
"""seccomp's answers: go on; fail with EPERM; end the process."""
OTHER_CALLING_CONVENTION = 0x40000000

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_FILE, TRUNCATE = 16, 32, 128, 256, 2**14
RIGHTS_BY_VERSION = ((1, 13), (2, 14), (3, 15), (5, 16))
"""From which version of Landlock on how many rights there are."""

FORBIDDEN_EVENTS = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "ctypes.",
    "pty.", "signal.pthread_kill", "resource.",
)  # fmt: skip
PATH_EVENTS = (
    "os.chdir", "os.chmod", "os.chown", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.scandir", "os.symlink", "os.truncate", "os.utime", "shutil.",
)  # fmt: skip

READS = ("os.listdir", "os.scandir", "os.chdir")


def main() -> None:
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    folder, verdict = os.getcwd(), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    readable = _library_folders()
    guards = _limit(request["limits"])
    files = calls = False
    if sys.platform == "linux":
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if libc.unshare(NEW_USER | NEW_NET | NEW_IPC) == 0:
            guards.append("namespaces")
        files = _guard_files(libc, folder, readable)
        calls = _guard_calls(libc)
    guards += ["files"] * files + ["calls"] * calls
    if not (files and calls):
        _hook(folder, readable, files=not files, calls=not calls)
    os.write(verdict, json.dumps(guards).encode() + b"\n")
    if _comes_to_its_end(request["program"]):
        os.write(verdict, request["token"].encode())
    os._exit(0)


def _comes_to_its_end(program: str) -> bool:
    module = types.ModuleType("answer")  # no __main__, so that examples below one are left alone
    sys.modules["answer"] = module
    try:
        exec(compile(program, "answer", "exec"), module.__dict__)
    except BaseException:
        return False
    return True


def _library_folders() -> list[str]:
    """What a program may read: the standard library, and the shared libraries below it."""
    found = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *SHARED_LIBRARIES}
    return sorted({os.path.realpath(path) for path in found if os.path.isdir(path)})


def _limit(limits: dict[str, int]) -> list[str]:
    """Sets each limit for good; the names of those that hold."""
    names = {"cpu_s": "CPU", "memory_bytes": "AS", "file_bytes": "FSIZE", "open_files": "NOFILE", "processes": "NPROC"}
    held = []
    for name, value in {**limits, "core": 0}.items():
        kind = getattr(resource, f"RLIMIT_{names.get(name, name.upper())}", None)
        try:
            if kind is not None:
                resource.setrlimit(kind, (value, value))
                held.append(name)
        except (ValueError, OSError):
            continue
    return held


def _guard_calls(libc: Any) -> bool:
    """Refuses the system calls above, by seccomp. False where there is none."""
    if platform.machine() not in ARCHITECTURES:
        return False
    audit, refused = ARCHITECTURES[platform.machine()]
    numbers = sorted(number for group in refused.values() for number in group)
    lines = [(LOAD_WORD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD_WORD, 0, 0, 0)]
    tests = [(JUMP_IF_GREATER_OR_EQUAL, OTHER_CALLING_CONVENTION), *((JUMP_IF_EQUAL, number) for number in numbers)]
    lines += [(code, len(tests) - at, 0, value) for at, (code, value) in enumerate(tests)]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    text = b"".join(struct.pack("HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(text, len(text))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(buffer)))
    return bool(libc.prctl(SET_SECCOMP, FILTER, ctypes.byref(head), 0, 0) == 0)


def _guard_files(libc: Any, folder: str, readable: Sequence[str]) -> bool:
    """Leaves `folder` to be written and `readable` to be read, by Landlock. False where there is none."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    number = [count for since, count in RIGHTS_BY_VERSION if since <= version][-1]
    every = (1 << number) - 1
    attributes = struct.pack("Q", every)
    rules = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return False
    reading = EXECUTE | READ_FILE | READ_DIR
    writing = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_FILE | TRUNCATE
    for path, rights in ((folder, writing & every), *((path, reading) for path in readable)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0) != 0:
            return False
        os.close(place)
    return bool(libc.syscall(RESTRICT_SELF, rules, 0) == 0)


def _hook(folder: str, readable: Sequence[str], *, files: bool, calls: bool) -> None:
    """Python's own hook in the place of `files` and `calls` guards; it cannot be taken off again."""

    def within(path: Any, places: Sequence[str]) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        return any(real == place or real.startswith(place + os.sep) for place in places)

    busy = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            if event.startswith("ctypes.") or (calls and event.startswith(FORBIDDEN_EVENTS)):
                raise PermissionError(f"{event} is not for answers")
            if files and event == "open":
                path, _, flags = arguments
                writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
                if not within(path, [folder] if writes else [folder, *readable]):
                    raise PermissionError("answers have a folder of their own")
            if files and event.startswith(PATH_EVENTS):
                paths = [item for item in arguments if isinstance(item, str | bytes | os.PathLike)]
                if not all(within(path, [folder, *readable] if event in READS else [folder]) for path in paths):
                    raise PermissionError("answers have a folder of their own")
        finally:
            busy = False

    sys.addaudithook(watch)


if __name__ == "__main__":
    main()
