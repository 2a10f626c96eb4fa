"""A model with recurrent layers: vanilla against transformers' `generate`, and what going back costs.

Why: such a model has a state in place of most of its cache, so a rejection needs states that were kept. That must cost
next to nothing, or the gain of drafting is lost on exactly the models that SPD's authors publish heads for.
Regimes: batch 1, greedy, a random Qwen3.5 text model (12 layers, every fourth with attention, width 512, 32,000
tokens), made at the start; the prompt has 64 tokens. transformers' layers run as they come, without kernels of others.
Output: a table a dtype, a row a side: tokens/s and ms a token, first token left out, and how many times as long it
takes as the side it is compared with, round by round, and how many ids agree with vanilla's. `spd` is a pipeline of
three stages in one process, whose drafts are always right, so that it can run without snapshots too, and its time is
that of a cycle. The last rows are parts, with the states of all layers: a forward of one row that keeps 3 of them, one
rollback, and a copy, which we never make.
The sides take turns, A B C A B C, after a warm-up each.

    python -m benchmarks.hybrid [--rounds 5] [--tokens 64] [--threads 2] [--dtypes float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from benchmarks.shared import sides
from benchmarks.shared.sides import Report, Row, ratio, show, spread, take_turns, times
from benchmarks.shared.workload import common_prefix, run_steps
from spdbench.backend import Backend, BackendContext, find_backend, parse_options
from spdbench.models.decoder import Decoder
from spdbench.models.hf import library
from spdbench.models.kv_cache import HybridCache
from spdbench.models.target import Target, load_target
from spdbench.pipeline import inline
from spdbench.types import GenerationRequest, Sampling

SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "num_hidden_layers": 12,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
}
PROMPT_TOKENS = 64
STAGES = 3
SNAPSHOTS = 3
SIDES: dict[str, tuple[str, dict[str, str]]] = {
    "vanilla": ("vanilla", {}),
    "transformers": ("hf", {}),
    "spd": ("spd", {"executor": "inline", "stages": str(STAGES)}),
    "spd without snapshots": ("spd", {"executor": "inline", "stages": str(STAGES)}),
}
COMPARED_WITH = {
    "transformers": "vanilla",
    "spd": "spd without snapshots",
    "forward, 3 snapshots": "forward, no snapshot",
}


def main() -> None:
    sides.run("hybrid", sides.parser(__doc__, rounds=5, tokens=64).parse_args(), measure)


def measure(chosen: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for dtype in chosen.dtypes:
            target = load_target(folder, dtype, "cpu")
            report.tables[dtype] = rows = compare(target, chosen)
            megabytes = target.decoder.snapshot_bytes(target.decoder.layers) / 1e6
            print(f"{dtype}, a snapshot of all layers has {megabytes:.3g} MB:")
            show(["side", "tokens/s", "ms", "takes", "same ids"], [row["cells"] for row in rows])


def make_model(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with library.quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **SIZES), dtype=torch.float32)
        model.save_pretrained(folder)


def compare(target: Target, chosen: argparse.Namespace) -> list[Row]:
    """A row for each side and for each part."""
    generator = torch.Generator().manual_seed(0)
    prompt = tuple(torch.randint(SIZES["vocab_size"], (PROMPT_TOKENS,), generator=generator).tolist())
    request = GenerationRequest(prompt, (), chosen.tokens, Sampling(), 0, frozenset())
    with ExitStack() as open_backends:
        decoding = {}
        for name, (backend_name, options) in SIDES.items():
            backend = loaded(target, backend_name, options, chosen.threads)
            open_backends.enter_context(closing(backend))
            decoding[name] = decoding_side(backend, request, without=name.endswith("without snapshots"))
        turns = take_turns(decoding, chosen.rounds)
    seconds = {name: [s for s, _ in each] for name, each in turns.items()}
    parts = take_turns(part_sides(target.own_decoder, prompt, chosen.tokens), chosen.rounds)
    same = {name: str(common_prefix(each[0][1], turns["vanilla"][0][1])) for name, each in turns.items()}
    return [as_row(name, seconds | parts, name in seconds, same.get(name, "")) for name in (*seconds, *parts)]


def as_row(name: str, seconds: dict[str, list[float]], is_decoding: bool, same: str) -> Row:
    found = spread(seconds[name])
    over = COMPARED_WITH.get(name)
    compared = f"{times(ratio(seconds[name], seconds[over]))} of {over}" if over else ""
    speed = f"{1 / found.median:.1f}" if is_decoding else ""
    ms = f"{found.median * 1e3:.3g} ({found.min * 1e3:.3g} to {found.max * 1e3:.3g})"
    return {"side": name, "seconds": found, "cells": (name, speed, ms, compared, same)}


def loaded(target: Target, name: str, options: dict[str, str], threads: int) -> Backend:
    cls = find_backend(name)
    drafter = "oracle:1.0" if name == "spd" else "auto"
    backend = cls(
        parse_options(name, cls.Options, options), BackendContext(name, target, drafter, ("cpu",), threads, 0)
    )
    backend.load()
    return backend


def decoding_side(
    backend: Backend, request: GenerationRequest, *, without: bool
) -> Callable[[], tuple[float, tuple[int, ...]]]:
    """Seconds of a step after the first one, and the ids."""

    def side() -> tuple[float, tuple[int, ...]]:
        needed = mock.patch.object(inline, "snapshots_in_step", return_value=0) if without else ExitStack()
        with needed:
            seconds, ids, count = run_steps(backend, request)
        return seconds / (count - 1), tuple(ids)

    return side


def part_sides(decoder: Decoder, prompt: tuple[int, ...], repeats: int) -> dict[str, Callable[[], float]]:
    """Seconds of each part, as means of `repeats`."""

    @torch.inference_mode()
    def cache_of(num_snapshots: int) -> HybridCache:
        """After the prompt, and after as many tokens as it can go back by."""
        cache = decoder.new_cache(len(prompt) + SNAPSHOTS + repeats, num_snapshots=num_snapshots)
        decoder.forward(decoder.embed(decoder.ids(prompt)), 0, cache)
        for _ in range(SNAPSHOTS):
            forward(cache)
        return cast(HybridCache, cache)

    @torch.inference_mode()
    def forward(cache: Any) -> None:
        decoder.forward(decoder.embed(decoder.ids(prompt[:1])), cache.length, cache)

    def mean(prepare: Callable[[], object], part: Callable[[], object]) -> float:
        total = 0.0
        for _ in range(repeats):
            prepare()
            began = time.perf_counter()
            part()
            total += time.perf_counter() - began
        return total / repeats

    def forwards(num_snapshots: int) -> Callable[[], float]:
        def side() -> float:
            cache = cache_of(num_snapshots)
            return mean(lambda: None, lambda: forward(cache))

        return side

    def rollbacks() -> float:
        cache = cache_of(SNAPSHOTS)
        length = cache.length

        def ahead() -> None:
            cache.length = length

        return mean(ahead, lambda: cache.rollback(length - SNAPSHOTS))

    def copies() -> float:
        cache = cache_of(1)
        return mean(lambda: None, lambda: (cache._windows[:, 0].clone(), cache._matrices[:, 0].clone()))

    return {
        "forward, no snapshot": forwards(0),
        f"forward, {SNAPSHOTS} snapshots": forwards(SNAPSHOTS),
        f"rollback by {SNAPSHOTS}": rollbacks,
        "copy of the states": copies,
    }


if __name__ == "__main__":
    main()
