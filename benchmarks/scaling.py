"""How a forward pass of vanilla scales, and how close it comes to the machine's limit.

Why: the headline ratios hold for one setting. Fast paths usually fail with long contexts, verification (many rows a
forward) and more threads, and the share of the read bandwidth shows how much could still be gained.
Regimes: both dtypes, batch 1, the head and the argmax included for every row.
  threads   one row at context 64, with 1, 2, 4, ... threads up to all cores
  context   one row at contexts of 64 to 4,096 tokens
  rows      1 to 64 rows at context 256, a chain as verification feeds it
  roofline  one row at context 64: the weights' bytes over the time, over the read bandwidth measured right before and
            right after
Caches are filled with random keys and values, which do not affect times. A turn is the median time of --tokens
forwards.
Output: a table each, a row a dtype and setting: median ms a forward with the extremes, and the time over that of the
first setting, round by round, as median and quartiles; for `roofline` the bandwidth and the share reached, likewise.
The settings take turns, 1, 2, 4, ... 1, 2, 4, ..., after a warm-up each.

    python -m benchmarks.scaling [--parts threads context rows roofline] [--rounds 15] [--tokens 16] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.shared import sides
from benchmarks.shared.sides import Goal, Report, Row, milliseconds, ratio, show, spread, take_turns, times
from benchmarks.shared.workload import MODEL
from spdbench.measure.environment import read_bandwidth_bytes_per_s
from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import KVCache
from spdbench.models.layer_ops import argmax
from spdbench.models.target import load_target

CONTEXTS = (64, 256, 1024, 2048, 4096)
ROWS = (1, 2, 4, 8, 16, 32, 64)
SHORT, MIDDLE = 64, 256
SLOWER_BY = {("context", 1024): 1.25, ("rows", 8): 1.15, ("rows", 16): 1.35}
ROOFLINE_SHARE = {"bfloat16": 0.7}


def main() -> None:
    arguments = sides.parser(__doc__, rounds=15, tokens=16)
    arguments.add_argument("--parts", nargs="+", choices=[*SETTINGS, "roofline"], default=[*SETTINGS, "roofline"])
    sides.run("scaling", arguments.parse_args(), measure)


def measure(chosen: argparse.Namespace, report: Report) -> None:
    for part in chosen.parts:
        if part == "roofline":
            report.tables[part] = roofline(chosen, report)
        else:
            report.tables[part] = [row for dtype in chosen.dtypes for row in scaling(part, dtype, chosen, report)]
            headers = ["dtype", part, "ms/forward", "over the first"]
            rows = report.tables[part]
            show(
                headers, [[row["dtype"], row[part], milliseconds(row["seconds"]), times(row["ratio"])] for row in rows]
            )


def scaling(part: str, dtype: str, chosen: argparse.Namespace, report: Report) -> list[Row]:
    """A row for each setting of `part`."""
    turns = take_turns(SETTINGS[part](dtype, chosen), chosen.rounds)
    first = next(iter(turns.values()))
    rows: list[Row] = []
    for setting, seconds in turns.items():
        slower = ratio(seconds, first)
        rows.append({"dtype": dtype, part: setting, "seconds": spread(seconds), "ratio": slower})
        if most := SLOWER_BY.get((part, setting)):
            what = f"{part} {setting} over {next(iter(turns))}, {dtype}"
            report.goals.append(Goal(what, slower.median, at_most=most))
    return rows


Sides = Mapping[int, Callable[[], float]]


def threads(dtype: str, chosen: argparse.Namespace) -> Sides:
    cores = len(os.sched_getaffinity(0))
    counts = sorted({cores, *(2**power for power in range(cores.bit_length()) if 2**power <= cores)})
    decoder = load_target(MODEL, dtype, "cpu").own_decoder
    return {count: partial(with_threads, count, forward_side(decoder, SHORT, 1, chosen.tokens)) for count in counts}


def with_threads(count: int, side: Callable[[], float]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return side()
    finally:
        torch.set_num_threads(before)


def context(dtype: str, chosen: argparse.Namespace) -> Sides:
    decoder = load_target(MODEL, dtype, "cpu").own_decoder
    return {length: forward_side(decoder, length, 1, chosen.tokens) for length in CONTEXTS}


def rows(dtype: str, chosen: argparse.Namespace) -> Sides:
    decoder = load_target(MODEL, dtype, "cpu").own_decoder
    return {count: forward_side(decoder, MIDDLE, count, chosen.tokens) for count in ROWS}


SETTINGS: dict[str, Callable[[str, argparse.Namespace], Sides]] = {"threads": threads, "context": context, "rows": rows}


class Reading(NamedTuple):
    """The time of a forward, and the bandwidth measured around it."""

    seconds: float
    bytes_per_s: float


def roofline(chosen: argparse.Namespace, report: Report) -> list[Row]:
    decoders = {dtype: load_target(MODEL, dtype, "cpu").own_decoder for dtype in chosen.dtypes}
    sides_by_dtype = {
        dtype: partial(between_readings, forward_side(decoder, SHORT, 1, chosen.tokens))
        for dtype, decoder in decoders.items()
    }
    found: list[Row] = []
    for dtype, readings in take_turns(sides_by_dtype, chosen.rounds).items():
        num_bytes = decoders[dtype].bytes_per_token(decoders[dtype].layers, head=True)
        share = spread(num_bytes / reading.seconds / reading.bytes_per_s for reading in readings)
        found.append(
            {
                "dtype": dtype,
                "bytes_per_token": num_bytes,
                "seconds": spread(reading.seconds for reading in readings),
                "read_bandwidth_bytes_per_s": spread(reading.bytes_per_s for reading in readings),
                "share": share,
            }
        )
        if least := ROOFLINE_SHARE.get(dtype):
            report.goals.append(Goal(f"share of the read bandwidth, {dtype}", share.median, at_least=least))
    print_roofline(found)
    return found


def print_roofline(rows: list[Row]) -> None:
    cells = []
    for row in rows:
        rate, share = row["read_bandwidth_bytes_per_s"], row["share"]
        cells.append(
            [
                row["dtype"],
                f"{row['bytes_per_token'] / 1e6:.0f}",
                milliseconds(row["seconds"]),
                f"{rate.median / 1e9:.1f} ({rate.min / 1e9:.1f} to {rate.max / 1e9:.1f})",
                f"{share.median:.0%} ({share.q1:.0%} to {share.q3:.0%})",
            ]
        )
    show(["dtype", "MB/token", "ms/forward", "read bandwidth, GB/s", "share"], cells)


def between_readings(side: Callable[[], float]) -> Reading:
    before = read_bandwidth_bytes_per_s()
    seconds = side()
    return Reading(seconds, (before + read_bandwidth_bytes_per_s()) / 2)


def forward_side(decoder: Decoder, length: int, num_rows: int, count: int) -> Callable[[], float]:
    """The median seconds of `count` forwards of `num_rows` rows after `length` tokens, without the first one."""
    ids = tuple(range(1000, 1000 + num_rows))
    cache = filled_cache(decoder, length, num_rows)

    @torch.inference_mode()
    def side() -> float:
        seconds = []
        for _ in range(count + 1):
            start = time.perf_counter()
            hidden_SM, _states = decoder.forward(decoder.embed(decoder.ids(ids)), length, cache)
            argmax(decoder.logits(hidden_SM)).tolist()
            seconds.append(time.perf_counter() - start)
            cache.rollback(length)
        return statistics.median(seconds[1:])

    return side


def filled_cache(decoder: Decoder, length: int, num_rows: int) -> KVCache:
    cache, geometry = decoder.new_cache(length + num_rows), decoder.geometry
    for layer in decoder.layers:
        keys, values = torch.randn(2, length, geometry.num_kv_heads, geometry.head_dim).to(decoder.dtype)
        cache.write(layer, keys, values)
    cache.advance(length)
    return cache


if __name__ == "__main__":
    main()
