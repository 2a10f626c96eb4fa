"""Threads that share a matrix multiplication: what they give is what one gives, and none is at work when there is
nothing to do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from spdbench.models.attention_context import AttentionContext
from spdbench.models.cpu.cpu_ops import CpuOps
from spdbench.models.cpu.linear import linear
from spdbench.models.kv_cache import KVCache
from spdbench.models.layer_ops import Geometry
from spdbench.models.rotary import Rotary, plain_frequencies
from tests.tiny import tensor

pytestmark = pytest.mark.whole_machine
WORKERS = 3


@pytest.fixture
def shared() -> Iterator[None]:
    torch.set_num_threads(WORKERS + 1)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_multiplications_have_the_bits_of_those_done_alone(dtype: torch.dtype) -> None:
    layers = [linear(tensor(outputs, 64, seed=outputs).to(dtype)) for outputs in (16, 48, 200, 1003)]
    rows = tensor(5, 64).to(dtype)
    torch.set_num_threads(1)
    alone = [layer(rows) for layer in layers]
    torch.set_num_threads(WORKERS + 1)
    for _ in range(500):
        for layer, expected in zip(layers, alone, strict=True):
            assert torch.equal(layer(rows), expected)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_attention_has_the_bits_of_that_done_alone(dtype: torch.dtype) -> None:
    """Who does which head hangs on the moment."""
    sizes = Geometry(9, 3, 64, 1e-5)
    ops = CpuOps(sizes, dtype)
    angles = Rotary(plain_frequencies(10000.0, 64), 1.0, dtype, torch.device("cpu"))
    prompt, rows = tensor(60, 15 * 64).to(dtype), tensor(3, 15 * 64, seed=1).to(dtype)

    def mixed() -> torch.Tensor:
        cache = KVCache(range(1), 3, 64, 80, dtype, torch.device("cpu"))
        ops.attention(prompt, None, None, AttentionContext(angles, 0, 60), cache, 0)
        cache.advance(60)
        return ops.attention(rows, None, None, AttentionContext(angles, 60, 3), cache, 0).clone()

    torch.set_num_threads(1)
    alone = mixed()
    torch.set_num_threads(WORKERS + 1)
    assert all(torch.equal(mixed(), alone) for _ in range(100))


@pytest.mark.usefixtures("shared")
def test_threads_that_ask_at_once_do_not_mix() -> None:
    layer = linear(tensor(1003, 64))
    rows = [tensor(3, 64, seed=seed) for seed in range(4)]
    expected = [layer(each) for each in rows]
    wrong: list[int] = []

    def ask(index: int) -> None:
        for _ in range(300):
            if not torch.equal(layer(rows[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("shared")
def test_an_idle_pool_uses_no_processor() -> None:
    linear(tensor(1003, 64))(tensor(1, 64))
    time.sleep(0.5)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.1


@pytest.mark.usefixtures("shared")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_workers_of_its_own() -> None:
    layer, rows = linear(tensor(1003, 64)), tensor(2, 64)
    expected = layer(rows)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(layer(rows), expected) for _ in range(20)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
