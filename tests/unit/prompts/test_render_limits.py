"""The limit on what a chat template may allocate is the process's, while several threads render conversations."""

from __future__ import annotations

import resource
import sys
from threading import Event, Thread

import pytest

from spdbench.prompts.render_limits import memory_limit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has")


def test_a_limit_that_another_thread_asks_for_meanwhile_waits() -> None:
    """Otherwise it would take the first one for what the process had before, and set it for good."""
    before, entered, release = resource.getrlimit(resource.RLIMIT_DATA), Event(), Event()

    def limit() -> None:
        with memory_limit(2**29):
            entered.set()
            release.wait(10)

    other = Thread(target=limit)
    with memory_limit(2**29):
        assert resource.getrlimit(resource.RLIMIT_DATA) != before
        other.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    release.set()
    other.join()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_an_error_inside_gives_the_limit_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), memory_limit(2**20):
        bytearray(2**28)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
