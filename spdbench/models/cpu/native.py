"""The compiled functions of decoding as machine code from the cache, which is made by numba once.

Importing numba and what it needs to call its own cached functions takes as long as importing torch; a file of machine
code is loaded by LLVM alone in a hundredth of that. A file is named by what it was made from: the sources, the versions
of numba and LLVM, and the processor with its instructions. It begins with a checksum; a damaged one is made anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from spdbench.models.checkpoints.folders import optional_cache_folder
from spdbench.output_files import cached_file

MODULES = (
    "amx",
    "attention",
    "claims",
    "compile",
    "head_vectors",
    "kernels",
    "native_build",
    "packed_gemm",
    "parallel_for",
    "vectors",
    "worker_pool",
)
"""Their sources decide what the machine code is."""
NUM_ARGUMENTS = {"parallel_for": 6, "argmax": 5, "top_k": 8}
"""The functions; all arguments are whole numbers of 8 bytes, and none returns anything."""
NEVER_CALLED = ("numba_gil_ensure", "numba_gil_release", "NRT_MemInfo_call_dtor")
"""What numba's code for errors names. Without numba LLVM must have an address for it, else it links nothing at all."""
KEPT_FILES = 8
"""How many files stay in the cache: those that were used last."""
Objects = Mapping[str, tuple[str, bytes]]
"""Function -> its name in the machine code, and the machine code."""


class NativeFunctions(NamedTuple):
    """Called without the interpreter's lock; see `parallel_for.parallel_for`, `kernels.argmax` and `kernels.top_k`."""

    parallel_for: Callable[[int, int, int, int, int, int], None]
    argmax: Callable[[int, int, int, int, int], None]
    top_k: Callable[[int, int, int, int, int, int, int, int], None]


@cache
def native_functions() -> NativeFunctions | None:
    """The functions; None where numba is missing, switched off, or does not know this processor."""
    try:
        return _load(_objects())
    except Exception:  # each of these fails in its own way
        return None


def _objects() -> Objects:
    """From the cache, else compiled, and then kept."""
    name = f"{_key()}.bin"
    for folder in _folders():
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = _unpack((folder / name).read_bytes())
            with suppress(OSError):
                os.utime(folder / name)
            return found
    from spdbench.models.cpu.native_build import compile_functions

    objects = compile_functions()
    for folder in _folders():
        with suppress(OSError):  # where no folder can be written, every start compiles
            _keep(folder / name, objects)
            break
    return objects


def _folders() -> list[Path]:
    """Where files are kept, as numba keeps its own: the user's choice, else next to the sources, else the cache."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(chosen)]
    cache = optional_cache_folder()
    return [Path(__file__).parent / "__pycache__", *([] if cache is None else [cache / "kernels"])]


def _keep(path: Path, objects: Objects) -> None:
    """Raises `OSError` where the file cannot be written."""
    with cached_file(path) as file:
        file.write(_pack(objects))
    if not _works_without_numba(path):
        path.unlink(missing_ok=True)
    newest = sorted(path.parent.glob("*.bin"), key=lambda other: other.stat().st_mtime, reverse=True)
    for other in newest[KEPT_FILES:]:
        other.unlink(missing_ok=True)


def _works_without_numba(path: Path) -> bool:
    """Tries a file in a process of its own: machine code that names a function which nothing defines would crash."""
    code = f"from spdbench.models.cpu import native; native.try_out({str(path)!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def try_out(path: str) -> None:
    """Computes attention over one slot, and so calls what the machine code of a file needs from elsewhere."""
    import numpy as np

    from spdbench.models.cpu import worker_pool as pool

    query, key, value, out = (np.full(2, number, np.float32) for number in (1.0, 1.0, 3.0, 0.0))
    zeros, slot = np.zeros(8, np.int64), np.zeros(pool.SLOT_WORDS, np.int64)
    at = [array.ctypes.data for array in (query, key, value, zeros, zeros, out, zeros)]
    kind = 2 * pool.TaskKind.ATTENTION + 1
    task = pool.AttentionTask._make([kind, 1, *at, 1, 1, 2, 1, 0, 0])
    words = pool.task_words([task])
    functions = _load(_unpack(Path(path).read_bytes()))
    functions.parallel_for(slot.ctypes.data, words.ctypes.data, 1, 0, pool.CALLER, 1)
    if out.tolist() != value.tolist():
        raise ValueError(f"{path}: computes {out.tolist()}, expected {value.tolist()}")


def _pack(objects: Objects) -> bytes:
    header = json.dumps([(name, symbol, len(code)) for name, (symbol, code) in objects.items()]).encode()
    content = header + b"\n" + b"".join(code for _, code in objects.values())
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _unpack(packed: bytes) -> Objects:
    """Raises `ValueError` for a damaged file."""
    digest, _, content = packed.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("damaged")
    header, _, code = content.partition(b"\n")
    objects, begin = {}, 0
    for name, symbol, size in json.loads(header):
        objects[name] = symbol, code[begin : begin + size]
        begin += size
    return objects


def _key() -> str:
    """16 hex digits over everything that the machine code depends on."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    chosen = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NUMBA_")]
    made_from = (version("numba"), version("llvmlite"), llvm.get_process_triple(), llvm.get_host_cpu_name(), features)
    return hashlib.sha256(repr((*made_from, *chosen, source_digest())).encode()).hexdigest()[:16]


@cache
def source_digest() -> str:
    """16 hex digits over the sources of the machine code: with others, times measured before mean nothing."""
    sources = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in MODULES]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


_engines: list[Any] = []
"""What owns the loaded machine code."""


def _load(objects: Objects) -> NativeFunctions:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name in NEVER_CALLED:
        if llvm.address_of_symbol(name) is None:  # numba gives its own when it first compiles
            llvm.add_symbol(name, ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value)
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
    for _, code in objects.values():
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    found = {}
    for name, (symbol, _) in objects.items():
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * NUM_ARGUMENTS[name])
        found[name] = kind(engine.get_function_address(symbol))
    return NativeFunctions(**found)
