"""Drafting and verifying against plain decoding, with drafts that are always right: the cost of the engine itself.

Why: with `oracle:1.0` and a chain of 4 every round but the last emits 5 tokens for one forward of 5 rows. The
difference from 5x is the more expensive forward and the engine's own overhead.
Regimes: batch 1, greedy, the embedded model, one short prompt, both dtypes; EAGLE's and Medusa's loops, chains of
several depths, and one dynamic tree. Drafts cost nothing here; a trained head's do.
Output: a line a setting: ms a token of vanilla and of the method, the ratio run by run (median, least, most), tokens a
round, and whether the ids are equal. The sides take turns, after a warm-up each.

    python -m benchmarks.speculate [--rounds 7] [--tokens 128] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping

import torch

from benchmarks.shared.workload import run_steps
from spdbench.backend import Backend, BackendContext, find_backend, parse_options
from spdbench.models.target import Target, load_target
from spdbench.prompts.chat import ChatFormat
from spdbench.types import GenerationRequest, Sampling

QUESTION = "Write a long story about a clockmaker who builds a ship."
SETTINGS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("eagle", {"tree": "chain", "depth": "1"}),
    ("eagle", {"tree": "chain", "depth": "4"}),
    ("eagle", {"tree": "chain", "depth": "8"}),
    ("eagle", {"tree": "dynamic", "depth": "5", "top_k": "4", "total_tokens": "16"}),
    ("medusa", {"tree": "chain", "heads": "4"}),
    ("draft_model", {"num_tokens": "4"}),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    for dtype in ("bfloat16", "float32"):
        target = load_target("smollm2", dtype, "cpu")
        prompt = ChatFormat(target.tokenizer).encode([{"role": "user", "content": QUESTION}])
        request = GenerationRequest(prompt, (), chosen.tokens, Sampling(), 0, frozenset())
        for name, options in SETTINGS:
            print(
                f"{dtype} {name} {' '.join(options.values())}: {compare(target, name, options, request, chosen.rounds)}"
            )


def compare(target: Target, name: str, options: Mapping[str, str], request: GenerationRequest, rounds: int) -> str:
    """One line of results."""
    vanilla, method = loaded(target, "vanilla", {}), loaded(target, name, options)
    _, expected, _ = run(vanilla, request)
    _, found, steps = run(method, request)
    pairs = [(run(vanilla, request)[0], run(method, request)[0]) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    mine, plain = (statistics.median(pair[side] for pair in pairs) * 1e3 for side in (1, 0))
    return (
        f"vanilla {plain:.1f}, {name} {mine:.2f} ms/token; {statistics.median(ratios):.2f}x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}); {(request.max_new_tokens - 1) / (steps - 1):.2f} tokens a round; "
        f"ids equal: {found == expected}"
    )


def loaded(target: Target, name: str, options: Mapping[str, str]) -> Backend:
    cls = find_backend(name)
    drafter = "auto" if name == "vanilla" else "oracle:1.0"
    context = BackendContext(name, target, drafter, ("cpu",), torch.get_num_threads(), seed=0)
    backend = cls(parse_options(name, cls.Options, dict(options)), context)
    backend.load()
    return backend


def run(backend: Backend, request: GenerationRequest) -> tuple[float, list[int], int]:
    """Seconds a token after the first, the ids, and the number of steps."""
    seconds, ids, count = run_steps(backend, request)
    return seconds / (request.max_new_tokens - 1), ids[: request.max_new_tokens], count


if __name__ == "__main__":
    main()
