"""Machine code that was just compiled and machine code from disk give the same bits."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

config = pytest.importorskip("numba").config
compile_module = pytest.importorskip("spdbench.models.cpu.compile")

SCRIPT = """
import hashlib
import torch
from spdbench.models.kv_cache import KVCache
from spdbench.models.attention_context import AttentionContext
from spdbench.models.rotary import Rotary, plain_frequencies
from spdbench.models.cpu.cpu_ops import CpuOps
from spdbench.models.layer_ops import Geometry

torch.set_num_threads(1)
cpu, found = torch.device("cpu"), hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    ops, cache = CpuOps(Geometry(9, 3, 64, 1e-5), dtype), KVCache(range(1), 3, 64, 128, dtype, cpu)
    angles = Rotary(plain_frequencies(10000.0, 64), 1.0, dtype, cpu)
    for count in (60, 40):
        qkv = torch.randn(count, 960, generator=torch.Generator().manual_seed(count)).to(dtype)
        mixed = ops.attention(qkv, None, None, AttentionContext(angles, cache.length, count), cache, 0)
        gated = ops.gate(qkv)
        cache.advance(count)
        for tensor in (mixed, gated):
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(found.hexdigest())
"""


MODULE = """
from spdbench.models.cpu.compile import compiled
@compiled
def one_more(number):
    return number + 1
"""


def test_an_entry_is_compiled_anew_when_what_it_inlines_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numba's cache looks at the date of the entry's own file."""
    (tmp_path / "entry.py").write_text(MODULE)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))

    def loaded_from_disk() -> bool:
        sys.modules.pop("entry", None)
        entry = importlib.import_module("entry").one_more
        assert entry(1) == 2
        return bool(entry.stats.cache_hits)

    assert [loaded_from_disk(), loaded_from_disk()] == [False, True]
    monkeypatch.setattr(compile_module, "source_digest", lambda: "other sources")
    assert [loaded_from_disk(), loaded_from_disk()] == [False, True]


def test_fresh_code_and_code_from_disk_round_alike(tmp_path: Path) -> None:
    """They did not when inner functions were there twice, and two processes of one run gave different tokens."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert list(tmp_path.rglob("*.bin"))
