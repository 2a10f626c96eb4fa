"""Measured costs kept in the user's cache as a profile: measured by the run that needs them first, read by all others.

So a choice by cost (a tree, balanced stages) is the same in every run on a machine, however busy it is, until
`spdbench profile` measures anew. A profile belongs to a model's weights, a dtype and a machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from spdbench.console import say
from spdbench.errors import InputError
from spdbench.models.checkpoints.folders import cache_folder
from spdbench.models.cpu.native import source_digest
from spdbench.models.target import Target
from spdbench.output_files import replaced_file, try_lock
from spdbench.processors import cpu_model, may_use_amx, usable_cores
from spdbench.profiles.profile import ModelShape, Profile, read_profile


def profile_folder() -> Path:
    """`$SPDBENCH_PROFILES`, else `profiles` in the cache. May not exist yet."""
    own = os.environ.get("SPDBENCH_PROFILES")
    return Path(own) if own else cache_folder() / "profiles"


def device_name(device: torch.device) -> str:
    """The name of the processor or of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


class StoredCosts:
    """The stored costs of `target`, decoded with `threads` threads."""

    def __init__(self, target: Target, threads: int) -> None:
        self._target = target
        self._threads = threads if target.device.type == "cpu" else 0

    @property
    def path(self) -> Path:
        """Of the profile, whether it is there or not."""
        files, dtype = self._target.files, self._target.dtype_name
        name = re.sub(r"[^A-Za-z0-9.-]", "-", Path(files.id).name)[:60]
        return profile_folder() / f"{name}-{files.sha256[:12]}-{dtype}-{self._machine}.json"

    @property
    def _machine(self) -> str:
        """12 hex digits over what makes costs comparable."""
        device, kernels = self._target.device, self._target.decoder.kernels
        sources, amx = (source_digest(), may_use_amx()) if device.type == "cpu" else ("", False)
        same = [device_name(device), usable_cores(), self._threads, torch.__version__, kernels, sources, amx]
        return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]

    def empty(self) -> Profile:
        """The profile before anything is measured."""
        target = self._target
        return Profile(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            origin="measured",
            device=device_name(target.device),
            machine=self._machine,
            threads=self._threads,
            model=ModelShape(
                id=target.files.id,
                sha256=target.files.sha256,
                dtype=target.dtype_name,
                num_layers=target.config.num_layers,
                hidden_size=target.config.hidden_size,
            ),
        )

    def read(self) -> Profile:
        """The stored profile; an empty one where there is none, or a damaged one."""
        try:
            return read_profile(self.path)
        except InputError:
            return self.empty()

    def forget(self) -> None:
        """Removes the stored profile, so that everything is measured anew."""
        with contextlib.suppress(OSError, InputError):
            self.path.unlink()

    def seconds(self, keys: Sequence[str], measure: Callable[[], Sequence[float]]) -> list[float]:
        """The costs of `keys`, in their order; where one of them is not stored, all are measured, and those that were
        missing are stored. Of several processes one measures, and the others wait for it."""
        found = self.read().seconds
        if all(key in found for key in keys):
            return [found[key] for key in keys]
        with self._lock():
            profile = self.read()  # another process may have measured meanwhile
            if any(key not in profile.seconds for key in keys):
                measured = dict(zip(keys, measure(), strict=True))
                profile = profile.model_copy(update={"seconds": profile.seconds | measured | profile.seconds})
                self._write(profile)
            return [profile.seconds[key] for key in keys]

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("ab")
        except (OSError, InputError):  # `_write` reports it
            yield
            return
        with lock:
            try_lock(lock, wait=True)  # where there are no locks, two processes measure the same
            yield

    def _write(self, profile: Profile) -> None:
        try:
            with replaced_file(self.path) as file:
                file.write(profile.to_json().encode())
        except (OSError, InputError) as error:
            why = f"in {self.path.parent} ({error.strerror})" if isinstance(error, OSError) else f"({error})"
            say(f"NOTE: measured costs cannot be kept {why}: the next run measures anew, and may choose another tree")
