"""The limit on what a chat template may allocate is the process's, while several threads render conversations."""

from __future__ import annotations

import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from spdbench.prompts.render_limits import memory_limit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has")


def test_what_threads_limited_is_as_before_after_all_of_them() -> None:
    before, together = resource.getrlimit(resource.RLIMIT_DATA), Barrier(8)

    def limit(_: int) -> tuple[int, int]:
        together.wait()
        for _ in range(50):
            with memory_limit(2**29):
                inside = resource.getrlimit(resource.RLIMIT_DATA)
        return inside

    with ThreadPoolExecutor(8) as pool:
        inside = list(pool.map(limit, range(8)))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert before not in inside


def test_an_error_inside_gives_the_limit_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), memory_limit(2**20):
        bytearray(2**28)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
