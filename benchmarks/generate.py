"""Vanilla against transformers' own greedy `generate`: same weights, prompt, dtype, threads and number of tokens.

Why: a speed-up over a slow baseline is worth nothing. Vanilla has to be at least as fast as what everybody has.
Regimes: batch 1, greedy, one short prompt, both dtypes, the threads that torch uses unless --threads says otherwise.
Output: a line a dtype with the medians in ms a token of both sides, their spread, the ratio run by run (its median is
the figure to quote), the share of the measured read bandwidth that vanilla reaches, and whether the ids are equal.
The sides take turns, A B A B, after a warm-up each.

    python benchmarks/generate.py [--rounds 7] [--tokens 64] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spdbench.decoding.autoregressive import decode
from spdbench.measure.environment import read_bandwidth_bytes_per_s
from spdbench.models.target import Target, load_target
from spdbench.prompts.chat import ChatFormat
from spdbench.types import GenerationRequest, Sampling

QUESTION = "Explain in a few sentences how a lighthouse keeper spends a stormy night."


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    for dtype in ("bfloat16", "float32"):
        print(compare(dtype, chosen.rounds, chosen.tokens), flush=True)


def compare(dtype: str, rounds: int, tokens: int) -> str:
    """One line of results."""
    target = load_target("smollm2", dtype, "cpu")
    prompt = ChatFormat(target.tokenizer).encode([{"role": "user", "content": QUESTION}])
    ours, theirs = spdbench_side(target, prompt, tokens), transformers_side(target, prompt, tokens)
    same = ours()[1] == theirs()[1]
    pairs = [(ours()[0], theirs()[0]) for _ in range(rounds)]
    mine, other = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(b / a for a, b in pairs)
    decoder = target.decoder
    share = decoder.bytes_per_token(decoder.layers, head=True) / statistics.median(mine) / read_bandwidth_bytes_per_s()
    return (
        f"{dtype}: vanilla {spread(mine)}, transformers {spread(other)} ms/token; "
        f"vanilla is {ratio:.2f}x as fast, at {share:.0%} of read bandwidth; ids equal: {same}"
    )


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f} ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})"


def spdbench_side(target: Target, prompt: tuple[int, ...], tokens: int) -> Callable[[], tuple[float, list[int]]]:
    request = GenerationRequest(prompt, (), tokens, Sampling(), 0, frozenset())

    def run() -> tuple[float, list[int]]:
        start = time.perf_counter()
        ids = list(decode(target.decoder, request))
        return (time.perf_counter() - start) / tokens, ids

    return run


def transformers_side(target: Target, prompt: tuple[int, ...], tokens: int) -> Callable[[], tuple[float, list[int]]]:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(target.files.directory, dtype=target.dtype).eval()
    model.generation_config.eos_token_id = None  # both sides go on to the last token

    def run() -> tuple[float, list[int]]:
        inputs = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return (time.perf_counter() - start) / tokens, ids[0, len(prompt) :].tolist()

    return run


if __name__ == "__main__":
    main()
