"""Writes files whole or not at all, says why nothing can be written, and locks files where locks are."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The error numbers of a full disk, an exhausted quota and a file that is too large."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What `flock` fails with on file systems without locks, as some on networks are."""
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
"""What it fails with while another process has the lock."""


def try_lock(file: IO[Any] | int, *, wait: bool = False) -> bool | None:
    """Locks an open file, until it is closed: True. False while another process has the lock, for which it does not
    `wait`; None where the file system has no locks.

    Raises:
        OSError: locking fails for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in TAKEN:
            return False
        raise
    return True


@contextmanager
def replaced_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file for the content of `path`, which it replaces at the end: after a kill the file is the old one or the
    new one. Of several processes one at a time may write `path`.

    Raises:
        OSError: the file cannot be written. After this and any other error it is as it was.
    """
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # a link there would lead the content into another file
    with _moved_when_whole(part, path) as file:
        yield file


@contextmanager
def cached_file(path: Path) -> Iterator[IO[bytes]]:
    """As `replaced_file`, in a folder that is made, and for several processes at once: the file of the last one stays.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not a file of `tempfile`, which its owner alone can read: a cache may be shared.
    with _moved_when_whole(path.with_name(f"{path.name}.{os.urandom(8).hex()}.part"), path) as file:
        yield file


@contextmanager
def _moved_when_whole(part: Path, path: Path) -> Iterator[IO[bytes]]:
    """The new file `part`, which becomes `path` at the end, or is removed after an error."""
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_obstacle(folder: Path) -> OSError | None:
    """Why no file can be made in `folder`, which is made if it is not there; None where one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def write_failure(error: BaseException, *, behind: bool = False) -> str | None:
    """Why nothing more can be written, in the system's words; None if `error` has another reason. `behind`: libraries
    raise errors of their own for it, with the system's as their cause.

    Libraries written in Rust raise errors of their own, which end with the system's error number.
    """
    if behind and (cause := error.__cause__ or error.__context__) is not None:
        return write_failure(error) or write_failure(cause, behind=True)
    if isinstance(error, OSError):
        number = error.errno
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    return os.strerror(number) if number in (*FULL, errno.EIO, errno.EROFS) else None
