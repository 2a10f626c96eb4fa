"""Small helpers around torch: tensors as numpy arrays, numbers to the device, freed memory, measured times."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from spdbench.errors import InputError

T = TypeVar("T")


def array(tensor: Tensor) -> Any:
    """A CPU tensor's memory as numpy sees it; bfloat16, which numpy does not have, as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def to_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """`numbers` on `device`, without waiting for a GPU: a copy out of memory that is not pinned would wait until the
    GPU had done all its work."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def require_finite(source: str, name: str, tensor: Tensor) -> None:
    """Raises `InputError` for weights that hold NaN or infinity, whose outputs would be measured like any others."""
    if tensor.numel() and tensor.is_floating_point() and not tensor.is_meta:  # a meta tensor holds no numbers
        bounds = torch.stack(torch.aminmax(tensor))  # NaN if any number is
        if not bool(bounds.isfinite().all()):
            raise InputError(f"{source}: tensor {name} holds numbers that are not finite in {tensor.dtype}")


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system, which the process would otherwise keep (glibc: malloc_trim(3)):
    converting weights needs a lot for a while."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@torch.inference_mode()
def median_seconds(
    work: Callable[[], object],
    rounds: int = 8,
    threads: int | None = None,
    between: Callable[[], object] = lambda: None,
) -> float:
    """Median seconds that `work` takes, with `threads` threads if given.

    `between` runs before each round and is not timed: what work takes depends on what the processor's caches hold.
    Neither may return before it is done.
    """
    times = []
    with torch_threads(threads or torch.get_num_threads()):
        for _ in range(rounds):
            between()
            began = perf_counter()
            work()
            times.append(perf_counter() - began)
    return median(times)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch computes with so many threads of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operators on the calling thread alone: in a decoding step they take microseconds, and threads of torch's
    that wake for them keep the processors from the worker pool for much longer."""
    with torch_threads(1):
        yield


def with_threads(items: Iterator[T], threads: int) -> Iterator[T]:
    """The items, each computed with so many threads in this process."""
    with torch_threads(threads):
        yield from items
