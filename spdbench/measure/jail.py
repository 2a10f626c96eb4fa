"""The child's side of `sandbox.py`: gives up every right that a program does not need, then runs the program.

A stand-alone script: it imports nothing of ours. Three guards are the kernel's, so the program cannot get round them:
seccomp refuses all system calls except those listed here, Landlock
(https://docs.kernel.org/userspace-api/landlock.html) limits files, and rlimits limit sizes. An audit hook inside Python
comes on top. It is the only guard where the kernel lacks seccomp or Landlock, and deliberate code can get round it.

stdin: {"program", "token", "limits"}. stdout: the guards in force as a line of JSON, then, if the program finishes,
`token` as another. The program runs in this process, so one that searches for `token` finds it.
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
from collections.abc import Mapping
from typing import Any

SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
TIME_ZONES = "/usr/share/zoneinfo"

NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2
NEW_USER, NEW_NET, NEW_IPC = 0x10000000, 0x40000000, 0x08000000

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine -> its AUDIT_ARCH number, and its column in `CALLS`."""

CALLS: dict[str, tuple[int | None, int | None]] = {
    "brk": (12, 214), "madvise": (28, 233), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216),
    "msync": (26, 227), "munmap": (11, 215),

    "access": (21, None), "chdir": (80, 49), "close": (3, 57), "close_range": (436, 436), "copy_file_range": (326, 285),
    "creat": (85, None), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "faccessat": (269, 48),
    "faccessat2": (439, 439), "fadvise64": (221, 223), "fallocate": (285, 47), "fchdir": (81, 50), "fcntl": (72, 25),
    "fdatasync": (75, 83), "flock": (73, 32), "fstat": (5, 80), "fstatfs": (138, 44), "fsync": (74, 82),
    "ftruncate": (77, 46), "getcwd": (79, 17), "getdents64": (217, 61), "ioctl": (16, 29), "lseek": (8, 62),
    "lstat": (6, None), "mkdir": (83, None), "mkdirat": (258, 34), "newfstatat": (262, 79), "open": (2, None),
    "openat": (257, 56), "pread64": (17, 67), "preadv": (295, 69), "preadv2": (327, 286), "pwrite64": (18, 68),
    "pwritev": (296, 70), "pwritev2": (328, 287), "read": (0, 63), "readlink": (89, None), "readlinkat": (267, 78),
    "readv": (19, 65), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "rmdir": (84, None),
    "sendfile": (40, 71), "stat": (4, None), "statfs": (137, 43), "statx": (332, 291), "umask": (95, 166),
    "unlink": (87, None), "unlinkat": (263, 35), "write": (1, 64), "writev": (20, 66),

    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "epoll_wait": (232, None), "eventfd2": (290, 19), "getpeername": (52, 205),
    "getsockname": (51, 204), "getsockopt": (55, 209), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "pselect6": (270, 72), "recvfrom": (45, 207), "select": (23, None), "sendto": (44, 206),
    "shutdown": (48, 210), "socketpair": (53, 199),

    "alarm": (37, None), "clock_getres": (229, 114), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115),
    "getitimer": (36, 102), "gettimeofday": (96, 169), "nanosleep": (35, 101), "setitimer": (38, 103),
    "time": (201, None), "times": (100, 153),

    "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98), "getcpu": (309, 168), "getegid": (108, 177),
    "geteuid": (107, 175), "getgid": (104, 176), "getgroups": (115, 158), "getpgid": (121, 155), "getpid": (39, 172),
    "getppid": (110, 173), "getrandom": (318, 278), "getrlimit": (97, 163), "getrusage": (98, 165),
    "getsid": (124, 156), "gettid": (186, 178), "getuid": (102, 174), "pause": (34, None),
    "restart_syscall": (219, 128), "rt_sigaction": (13, 134), "rt_sigpending": (127, 136), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "sigaltstack": (131, 132), "sysinfo": (99, 179),
    "uname": (63, 160),
}  # fmt: skip
"""The system calls that a program may use: memory, files, waiting, clocks, its own process. All others are refused,
those of future kernels too."""

ACCESS_MODE, TRUNCATING = 0o3, 0o1000
OPENED = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | TRUNCATING, os.O_RDWR | TRUNCATING)
"""Allowed modes of `open`. Landlock before version 3 checks reading and writing only, and a file can be truncated
without either."""
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
"""Commands on descriptors, their flags and locks; not those that choose a signal or its receiver."""
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Terminal attributes and size, readable bytes, blocking, close on exec."""
UNIX, STREAM, NONBLOCK_OR_CLOEXEC = 1, 1, 0o2004000
"""Only pairs of stream sockets: they stay connected to each other, while datagrams could go to any address."""
WORD = 0xFFFFFFFF

CONDITIONS: dict[str, tuple[tuple[int, int, tuple[int, ...]], ...]] = {
    "open": ((1, ACCESS_MODE | TRUNCATING, OPENED),),
    "openat": ((2, ACCESS_MODE | TRUNCATING, OPENED),),
    "fcntl": ((1, WORD, FCNTL),),
    "ioctl": ((1, WORD, IOCTL),),
    "socketpair": ((0, WORD, (UNIX,)), (1, WORD ^ NONBLOCK_OR_CLOEXEC, (STREAM,))),
}
"""Conditions on a call's arguments: index, mask of the bits that count, and allowed values under that mask."""

LOAD_WORD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050026, 0x80000000
"""seccomp's actions: allow; fail with ENOSYS, for which C libraries have a fallback; kill the process."""
NUMBER_AT, MACHINE_AT, ARGUMENTS_AT = 0, 4, 16

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_FILE, TRUNCATE = 16, 32, 128, 256, 2**14
READING = EXECUTE | READ_FILE | READ_DIR
WRITING = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_FILE | TRUNCATE
RIGHTS_BY_VERSION = ((1, 13), (2, 14), (3, 15), (5, 16))
"""(version of Landlock, number of rights that exist from it on)."""
NO_ABSTRACT_SOCKETS_NO_SIGNALS, SCOPED_SINCE = 3, 6

FORBIDDEN_EVENTS = (
    "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.getnameinfo", "socket.send",
    "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "ctypes.", "pty.",
    "signal.pthread_kill", "resource.", "fcntl.fcntl", "fcntl.ioctl",
)  # fmt: skip
PATH_EVENTS = (
    "os.chdir", "os.chmod", "os.chown", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.removexattr", "os.scandir", "os.setxattr", "os.symlink", "os.truncate", "os.utime", "shutil.",
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
    places = {folder: WRITING, **_library()}
    guards = _limit(request["limits"])
    files = calls = False
    if sys.platform == "linux":
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if libc.unshare(NEW_USER | NEW_NET | NEW_IPC) == 0:
            guards.append("namespaces")
        files = _guard_files(libc, places)
        calls = _guard_calls(libc)
    # Landlock does not protect modes, owners and times of files; only with seccomp are files safe.
    guards += ["files"] * (files and calls) + ["calls"] * calls
    _hook(places)
    os.write(verdict, json.dumps(guards).encode() + b"\n")
    if _finishes(request["program"]):
        os.write(verdict, request["token"].encode() + b"\n")
    os._exit(0)


def _finishes(program: str) -> bool:
    module = types.ModuleType("answer")  # not __main__, so that examples under `if __name__ == ...` do not run
    sys.modules["answer"] = module
    try:
        exec(compile(program, "answer", "exec"), module.__dict__)
    except BaseException:
        return False
    return True


def _library() -> dict[str, int]:
    """The standard library and the files that it needs -> a program's rights to each."""
    stdlib = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    found = dict.fromkeys((*stdlib, *SHARED_LIBRARIES, TIME_ZONES), READING)
    found |= {"/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE}
    return {os.path.realpath(path): rights for path, rights in found.items() if os.path.exists(path)}


def _limit(limits: dict[str, int]) -> list[str]:
    """Sets each limit irrevocably; returns the names of those that are in force."""
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
    """Refuses all system calls except `CALLS`, by seccomp. False where it is not available."""
    if platform.machine() not in ARCHITECTURES:
        return False
    audit, column = ARCHITECTURES[platform.machine()]
    lines = [(LOAD_WORD, 0, 0, MACHINE_AT), (JUMP_IF_EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL)]
    lines += [(LOAD_WORD, 0, 0, NUMBER_AT)]
    for name, numbers in CALLS.items():
        if (number := numbers[column]) is not None:
            answer = _answer(name)
            lines += [(JUMP_IF_EQUAL, 0, len(answer), number), *answer]
    lines += [(RETURN, 0, 0, REFUSE)]
    text = b"".join(struct.pack("HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(text, len(text))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(buffer)))
    return bool(libc.prctl(SET_SECCOMP, FILTER, ctypes.byref(head), 0, 0) == 0)


def _answer(name: str) -> list[tuple[int, int, int, int]]:
    """The filter's lines for one call. They check the lower words of arguments, as the kernel itself does for these."""
    lines = []
    for place, mask, values in CONDITIONS.get(name, ()):
        lines += [(LOAD_WORD, 0, 0, ARGUMENTS_AT + 8 * place), (AND, 0, 0, mask)]
        lines += [(JUMP_IF_EQUAL, len(values) - at, 0, value) for at, value in enumerate(values)]
        lines += [(RETURN, 0, 0, REFUSE)]
    return [*lines, (RETURN, 0, 0, ALLOW)]


def _guard_files(libc: Any, places: Mapping[str, int]) -> bool:
    """Limits file access to `places` and their rights, by Landlock. False where it is not available."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    number = [count for since, count in RIGHTS_BY_VERSION if since <= version][-1]
    every = (1 << number) - 1
    scoped = NO_ABSTRACT_SOCKETS_NO_SIGNALS if version >= SCOPED_SINCE else 0
    attributes = struct.pack("QQQ", every, 0, scoped)  # older kernels accept trailing zeros
    rules = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return False
    for path, rights in places.items():
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights & every, place), 0) != 0:
            return False
        os.close(place)
    return bool(libc.syscall(RESTRICT_SELF, rules, 0) == 0)


def _hook(places: Mapping[str, int]) -> None:
    """Python's audit hook, which refuses much of the same and cannot be removed."""

    def within(path: Any, right: int) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))
        return any(rights & right and (real + os.sep).startswith(place + os.sep) for place, rights in places.items())

    busy = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            if event.startswith(FORBIDDEN_EVENTS) or (event == "socket.__new__" and arguments[1] != UNIX):
                raise PermissionError(f"{event} is not for answers")
            if event == "open":
                path, _, flags = arguments
                writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
                if not within(path, WRITE_FILE if writes else READ_FILE):
                    raise PermissionError("answers have a folder of their own")
            if event.startswith(PATH_EVENTS):
                paths = [item for item in arguments if isinstance(item, str | bytes | os.PathLike)]
                if not all(within(path, READ_DIR if event in READS else MAKE_FILE) for path in paths):
                    raise PermissionError("answers have a folder of their own")
        finally:
            busy = False

    sys.addaudithook(watch)


if __name__ == "__main__":
    main()
