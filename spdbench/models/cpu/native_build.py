"""Compiles the functions of `native` with numba. Importing this module needs numba."""

from __future__ import annotations

from collections.abc import Callable

from numba import cfunc, types

from spdbench.models.cpu.compile import RELAXED
from spdbench.models.cpu.kernels import argmax, top_k
from spdbench.models.cpu.native import NUM_ARGUMENTS, Objects
from spdbench.models.cpu.parallel_for import parallel_for


def compile_functions() -> Objects:
    """Every function with a C interface, each with all that it calls as one piece of machine code."""
    return {function.__name__: _compile(function) for function in (parallel_for, argmax, top_k)}


def _compile(function: Callable[..., None]) -> tuple[str, bytes]:
    signature = types.void(*[types.int64] * NUM_ARGUMENTS[function.__name__])
    made = cfunc(signature, fastmath=set(RELAXED), error_model="numpy")(function)
    return made.native_name, made._library._get_compiled_object()
