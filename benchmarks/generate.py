"""Vanilla against transformers' own `generate`: same weights, prompts, dtype, threads and number of tokens.

Why: a speed-up over a slow baseline is worth nothing. Vanilla has to be far faster than the usual implementation, and
also than its usual drafting, prompt lookup (up to 10 tokens copied from the context).
Regimes: batch 1, greedy, four prompts of different kinds, both dtypes; a side's time is that of the whole call, the
prompt's own forward included, over the number of new tokens.
Output: a table a dtype, a row a prompt and one for all of them (the sum of each round): medians in ms a token with the
extremes, how many times as fast vanilla is, round by round, as median and quartiles, and how many of the new ids agree
before the first difference. In bfloat16 ids may differ, since sums are rounded in another order.
The sides take turns, A B C A B C, after a warm-up each.

    python -m benchmarks.generate [--rounds 7] [--tokens 64] [--threads 2] [--dtypes float32] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.shared import sides
from benchmarks.shared.sides import (
    Goal,
    Report,
    Row,
    mean_by_round,
    milliseconds,
    ratio,
    show,
    spread,
    take_turns,
    times,
)
from benchmarks.shared.workload import MODEL, Decoded, common_prefix, prompt_ids, vanilla_side
from spdbench.models.hf import library
from spdbench.models.target import Target, load_target

OURS, GREEDY, LOOKUP = "vanilla", "transformers", "prompt lookup"
LOOKUP_TOKENS = 10
FASTER_BY = {"bfloat16": 3.0, "float32": 2.0}
ALL = "all"


def main() -> None:
    sides.run("generate", sides.parser(__doc__, rounds=7, tokens=64).parse_args(), measure)


def measure(chosen: argparse.Namespace, report: Report) -> None:
    for dtype in chosen.dtypes:
        rows = compare(dtype, chosen.rounds, chosen.tokens)
        report.tables[dtype] = rows
        overall = next(row for row in rows if row["prompt"] == ALL and row["side"] == GREEDY)
        report.goals.append(
            Goal(
                f"times as fast as transformers' generate, {dtype}", overall["ratio"].median, at_least=FASTER_BY[dtype]
            )
        )
        print_table(dtype, rows)


def compare(dtype: str, rounds: int, tokens: int) -> list[Row]:
    """A row for each prompt, and for all, and for each side."""
    target = load_target(MODEL, dtype, "cpu")
    prompts = prompt_ids(target)
    turns = take_turns(all_sides(target, prompts, tokens), rounds)
    seconds = {key: [turn.seconds / tokens for turn in decoded] for key, decoded in turns.items()}
    for side in (OURS, GREEDY, LOOKUP):
        seconds[ALL, side] = mean_by_round([seconds[name, side] for name in prompts])
    return [
        {
            "prompt": name,
            "prompt_tokens": len(prompts[name]) if name in prompts else None,
            "side": side,
            "seconds_per_token": spread(values),
            "ratio": ratio(values, seconds[name, OURS]),
            "same_ids": common_prefix(turns[name, OURS][0].ids, turns[name, side][0].ids) if name in prompts else None,
        }
        for (name, side), values in seconds.items()
    ]


def print_table(dtype: str, rows: list[Row]) -> None:
    def cells(name: str) -> list[object]:
        ours, greedy, lookup = (row for row in rows if row["prompt"] == name)
        found: list[object] = [name, ours["prompt_tokens"] or "", milliseconds(ours["seconds_per_token"])]
        for other in (greedy, lookup):
            found += [milliseconds(other["seconds_per_token"]), times(other["ratio"]), other["same_ids"]]
        return found

    headers = ["prompt", "its tokens", f"{OURS}, ms/token"]
    for side in (GREEDY, LOOKUP):
        headers += [f"{side}, ms/token", "vanilla is faster by", "same ids"]
    print(f"{dtype}:")
    show(headers, [cells(name) for name in dict.fromkeys(row["prompt"] for row in rows)])


def all_sides(
    target: Target, prompts: dict[str, tuple[int, ...]], tokens: int
) -> dict[tuple[str, str], Callable[[], Decoded]]:
    with library.quiet():
        model = transformers_model(target)
    found = {}
    for name, ids in prompts.items():
        found[name, OURS] = vanilla_side(target, ids, tokens)
        found[name, GREEDY] = transformers_side(model, ids, tokens)
        found[name, LOOKUP] = transformers_side(model, ids, tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    return found


def transformers_model(target: Target) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target.files.directory, dtype=target.dtype).eval()
    model.generation_config.eos_token_id = None  # all sides decode to the last token
    return model


def transformers_side(model: Any, prompt: tuple[int, ...], tokens: int, **drafting: int) -> Callable[[], Decoded]:
    inputs = torch.tensor([prompt])
    mask = torch.ones_like(inputs)

    def side() -> Decoded:
        with torch.inference_mode(), library.quiet():
            start = time.perf_counter()
            ids = model.generate(
                inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **drafting
            )
            new = tuple(ids[0, len(prompt) :].tolist())
            return Decoded(time.perf_counter() - start, new)

    return side


if __name__ == "__main__":
    main()
