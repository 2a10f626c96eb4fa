"""Weights in 8 bits against weights in bfloat16: multiplications of a few rows, and whole drafts.

Why: on a CPU a draft is bound by reading the drafter's weights, and in 8 bits they are half as many bytes.
Regimes: the embedded model in bfloat16, its shipped drafters, each stored both ways in a temporary folder from its own
matrices; weights come from memory: multiplications go through as many copies as no cache holds, drafts take turns with
forwards of the target.
Output: a line each, microseconds or milliseconds in 8 bits and in bfloat16 (median, least) and their ratio round by
round (median, least, most). The sides take turns, after a warm-up each.

    python -m benchmarks.eight_bits [--rounds 25] [--threads 2] [--only multiplications drafts]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.shared.sides import ratio, spread, take_turns, times
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.tree_builder import chain_builder
from spdbench.models.checkpoints.folders import drafter_folders
from spdbench.models.cpu.linear import linear, row_scales
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_evenly
from spdbench.models.target import load_target
from spdbench.types import Sampling
from spdbench_backends.drafter_files.folder import Storage, store_again
from spdbench_backends.eagle.build import build_eagle
from spdbench_backends.eagle.drafter import Rounds
from spdbench_backends.eagle.formats import read_eagle
from spdbench_backends.medusa.drafter import build_medusa
from spdbench_backends.medusa.formats import read_medusa
from spdbench_backends.spd.exit_formats import build_exit, read_exit
from spdbench_backends.spd.formats import build_head, read_head
from spdbench_backends.spd.head import drafting_seconds

SHAPES = ((8192, 576), (3072, 576), (960, 1152), (576, 1536), (576, 1728), (576, 576))
"""Outputs and inputs: a draft vocabulary's head, and the matrices of SmolLM2's layers and of EAGLE's."""
ROWS = (1, 2, 4, 8, 16)
COPIES_BYTES = 128 << 20
"""Of the copies in 8 bits; in bfloat16 they are twice as large."""
STORAGES: tuple[Storage, ...] = ("int8", "bfloat16")
EAGLE_LEVELS, EAGLE_ROWS, MEDUSA_HEADS = 2, 2, 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=25)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--only", nargs="+", choices=["multiplications", "drafts"])
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    with torch.inference_mode():
        if chosen.only is None or "multiplications" in chosen.only:
            for shape in SHAPES:
                multiplications(shape, chosen.rounds)
        if chosen.only is None or "drafts" in chosen.only:
            drafts(chosen.rounds, chosen.threads)


def multiplications(shape: tuple[int, int], rounds: int) -> None:
    """Each side goes once through all of its copies, so that none of them is in a cache when it is read again."""
    weight = torch.randn(shape).bfloat16()
    scales = {"int8": row_scales(weight), "bfloat16": None}
    count = COPIES_BYTES // weight.numel()
    copies = {storage: [linear(weight, None, scale) for _ in range(count)] for storage, scale in scales.items()}
    for num_rows in ROWS:
        rows = torch.randn(num_rows, shape[1]).bfloat16()

        def microseconds(storage: str, rows: torch.Tensor = rows) -> float:
            began = time.perf_counter()
            for multiply in copies[storage]:
                multiply(rows)
            return (time.perf_counter() - began) / count * 1e6

        report(f"{list(shape)}, {num_rows} rows: us", {each: partial(microseconds, each) for each in STORAGES}, rounds)


def drafts(rounds: int, threads: int) -> None:
    target = load_target("smollm2", "bfloat16", "cpu").own_decoder
    cache = target.new_cache(1)

    def forward() -> None:
        target.forward(target.embed(target.ids((0,))), 0, cache)
        cache.rollback(0)

    with tempfile.TemporaryDirectory() as temporary:
        for name, draft_of in DRAFTS.items():
            sides: dict[str, Callable[[], float]] = {}
            for storage in STORAGES:
                folder = Path(temporary) / storage / name
                shutil.copytree(shipped(name), folder)
                store_again(folder, storage)
                sides[storage] = draft_of(folder, target, threads)

            def milliseconds(storage: str, sides: Mapping[str, Callable[[], float]] = sides) -> float:
                forward()
                return sides[storage]() * 1e3

            report(f"{name}: ms", {each: partial(milliseconds, each) for each in STORAGES}, rounds)


def report(name: str, sides: Mapping[str, Callable[[], float]], rounds: int) -> None:
    found = take_turns(sides, rounds)
    shown = [f"{spread(found[each]).median:.3f} ({min(found[each]):.3f})" for each in STORAGES]
    print(f"{name} {shown[0]} and {shown[1]}; {times(ratio(found['int8'], found['bfloat16']))}", flush=True)


def shipped(name: str) -> Path:
    return next(folder / name for folder in drafter_folders() if (folder / name / "config.json").exists())


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def eagle(folder: Path, target: Decoder, _threads: int) -> Callable[[], float]:
    """A chain behind two new rows, as after one accepted draft."""
    rounds = Rounds(build_eagle(read_eagle(folder), target), chain_builder(EAGLE_LEVELS, target.device), 4096)
    features = torch.randn(EAGLE_ROWS, rounds.weights.fc.plain().shape[1]).to(target.dtype)
    ids, sampler = target.ids((5,) * EAGLE_ROWS), Sampler(Sampling(), 0)

    def draft() -> None:
        rounds.reset()
        rounds.draft(features, ids, EAGLE_LEVELS, sampler).ids_N.tolist()

    return partial(seconds, draft)


def medusa(folder: Path, target: Decoder, _threads: int) -> Callable[[], float]:
    weights = build_medusa(read_medusa(folder), target)
    hidden_1M = torch.randn(1, target.config.hidden_size).to(target.dtype)
    return partial(seconds, lambda: weights.logits(target.normed(hidden_1M), MEDUSA_HEADS).argmax(dim=-1).tolist())


def spd(folder: Path, target: Decoder, threads: int) -> Callable[[], float]:
    weights = build_head(read_head(folder), target, split_evenly(target.config.num_layers, 3))
    return partial(drafting_seconds, weights, threads, target)


def ppsd(folder: Path, target: Decoder, _threads: int) -> Callable[[], float]:
    head = build_exit(read_exit(folder), target, split_evenly(target.config.num_layers, 3))
    cache, hidden_1M = head.new_cache(1), torch.randn(1, target.config.hidden_size).to(target.dtype)

    def draft() -> None:
        cache.rollback(0)
        head.logits(head.forward(hidden_1M, 0, cache)[0]).argmax().item()

    return partial(seconds, draft)


DRAFTS: Mapping[str, Callable[[Path, Decoder, int], Callable[[], float]]] = {
    "eagle3": eagle,
    "medusa": medusa,
    "spd": spd,
    "ppsd-3": ppsd,
}


if __name__ == "__main__":
    main()
