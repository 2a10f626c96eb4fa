"""Machine code that was just compiled and machine code from disk give the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
