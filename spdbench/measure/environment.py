"""The machine and the software behind a result.

Only what affects timing, and nothing that identifies the owner: no host or user name, no path, no environment variable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spdbench.measure.energy import energy_meter
from spdbench.measure.pinning import pinned
from spdbench.processors import cpu_model, cpu_quota, usable_cores

PACKAGES = ("torch", "transformers", "numpy", "numba", "safetensors")
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("spdbench", "backends", "suites", "pyproject.toml")
PROBE_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}  # several times any cache
PROBE_NS = 500_000_000
READ_BYTES = {"cpu": 8 * 2**20, "cuda": 2**30}
"""Bytes of one timed read, on a CPU for each thread: a fraction of a millisecond, so that most are not interrupted."""
RATE_PERCENTILE = 90
GIT_TIMEOUT_S = 10


def environment(device: str = "cpu") -> dict[str, Any]:
    """The `environment` of a result. Takes about a second, since it measures the read bandwidth of `device`.

    Machines with the same `fingerprint` have comparable timings.
    """
    import torch

    quota = cpu_quota()
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        **({} if quota is None else {"cpu_quota": quota}),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "driver": _nvidia_driver() if gpus else None,
        "cuda": torch.version.cuda if gpus else None,
        "system": platform.system(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "versions": {"python": platform.python_version(), **_versions()},
        "energy": [counter.name for counter in energy_meter([f"cuda:{index}" for index in range(len(gpus))]).counters],
        "read_bandwidth_bytes_per_s": read_bandwidth_bytes_per_s(device),
    }
    return {**found, "fingerprint": fingerprint(found)}


def _versions() -> dict[str, str]:
    """Versions of those `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def fingerprint(found: dict[str, Any]) -> str:
    """16 hex digits over what makes timings comparable: processor, cores, a quota of their time, threads, memory, GPUs,
    system and torch."""
    quarter_octaves = round(4 * math.log2(found["memory_bytes"]))  # kernels reserve slightly different amounts
    same = [found[key] for key in ("cpu", "cores", "threads", "gpus", "system", "machine")]
    quota = [found["cpu_quota"]] if "cpu_quota" in found else []  # absent from machines without, as it always was
    text = json.dumps([*same, quarter_octaves, found["versions"]["torch"], *quota])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_bandwidth_bytes_per_s(device: str = "cpu") -> int:
    """How fast `device` reads memory, with torch's current threads, measured for half a second.

    Sums a tensor that is larger than any cache in short pieces, and takes the 90th percentile of their rates: it holds
    even if other programs interrupt most of the sums, and does not depend on a single fast one. On a CPU the threads
    are pinned to different cores meanwhile.
    """
    import torch

    where = torch.device(device)
    num_bytes, num_threads = PROBE_BYTES[where.type], torch.get_num_threads()
    data = torch.empty(num_bytes // 4, dtype=torch.float32, device=where).fill_(1.0)  # zeros might share one page
    apart = pinned(data.sum, num_threads) if where.type == "cpu" else contextlib.nullcontext()
    each = READ_BYTES[where.type] * (num_threads if where.type == "cpu" else 1) // 4
    parts = [data[start : start + each] for start in range(0, len(data), each)]
    with apart:
        return round(_read_rate(parts) * 1e9)


def _read_rate(parts: Sequence[Any]) -> float:
    """Bytes per nanosecond."""
    rates: list[float] = []
    end = time.perf_counter_ns() + PROBE_NS
    while not rates or time.perf_counter_ns() < end:
        rates += [part.nbytes / _sum_ns(part) for part in parts]
    return sorted(rates)[len(rates) * RATE_PERCENTILE // 100]


def _sum_ns(data: Any) -> int:
    start = time.perf_counter_ns()
    data.sum().item()  # `item` waits for a GPU
    return time.perf_counter_ns() - start


def _nvidia_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def git_state(root: Path = ROOT) -> str | None:
    """The commit of spdbench's own checkout, with `+dirty` if its sources differ from it; None without a checkout.

    An installed wheel has none: a repository around it is the user's own, and is not reported.
    """
    if not ((root / ".git").exists() and (root / "pyproject.toml").exists() and (root / "spdbench").is_dir()):
        return None
    commit = git_output(root, "rev-parse", "--short=12", "HEAD")
    changes = git_output(root, "status", "--porcelain", "--", *(name for name in SOURCES if (root / name).exists()))
    if not commit or changes is None:
        return None
    return commit + ("+dirty" if changes else "")


def git_output(root: Path, *args: str) -> str | None:
    """What git prints, or None if there is no git or it fails. `GIT_DIR` and the like are ignored."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(root), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
