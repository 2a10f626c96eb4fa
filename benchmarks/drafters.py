"""Trains the drafters that ship with spdbench, and others to compare them with, on the same data for as many epochs.

Why: a comparison of methods is fair only if their drafters saw the same data. The target's features of the data, which
take longer than any drafter's own training, are computed once for all of them here.
Regimes: the embedded model, conversations of its own (`spdbench distill`), a draft vocabulary of 8,192, the target's
own head rows; one decoder layer for EAGLE-3, two for pipeline drafters; all matrices are stored in 8 bits.
Output: one folder per drafter in `--out`, each with its log `train.jsonl`; on stderr what `spdbench train` prints.
Several processes of one thread each (`--processes`) share the work: two threads on one matrix multiplication wait for
each other.

    python -m benchmarks.drafters --data data.jsonl [--out spdbench/drafters] [--epochs 2] [--only eagle3 spd-3 | --all]
                                  [--start FOLDER] [--budget SECONDS]  # goes on from the drafters there

With `--store-again int8` (or `bfloat16`) it trains nothing: the folders in `--out` are rewritten so.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from spdbench.cli.progress import TrainingProgress
from spdbench.models.checkpoints.folders import cache_folder
from spdbench.models.checkpoints.layer_tensors import SCALE
from spdbench.models.target import Target, load_target
from spdbench.prompts.chat import ChatFormat
from spdbench.training import checkpoint
from spdbench.training.conversations import read_conversations
from spdbench.training.features import Features
from spdbench.training.loop import Training
from spdbench.training.recipe import Provenance, Recipe, Teacher, find_recipe, parse_recipe_options
from spdbench.training.schedule import Data, Plan, split_held_out
from spdbench.training.tokens import TokenSequence, ending_token, most_frequent_tokens, tokenised
from spdbench_backends.drafter_files.folder import read_config, read_tensors, store_again

MODEL, DTYPE = "smollm2", "bfloat16"
DRAFT_VOCABULARY = 8192
LENGTH = 1024
HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.05, 20_000


class Drafter(NamedTuple):
    """A drafter to train: its folder, its method, the stages that it drafts for, and the recipe's options."""

    name: str
    method: str
    stages: int | None
    options: Mapping[str, str]


IN_8_BITS = {"storage": "int8"}
TWO_LAYERS = {"layers": "2", "init_layers": "27,29", **IN_8_BITS}
SHIPPED = (  # the longest training first
    Drafter("spd-3", "spd", 3, TWO_LAYERS),
    Drafter("spd-2", "spd", 2, TWO_LAYERS),
    Drafter("eagle3", "eagle3", None, IN_8_BITS),
    Drafter("ppsd-3", "ppsd", 3, TWO_LAYERS),
    Drafter("medusa", "medusa", None, IN_8_BITS),
)
MEASURED = tuple(Drafter(f"spd-{stages}", "spd", stages, TWO_LAYERS) for stages in (5, 6, 10))
"""For pipelines of more stages than two cores can run well."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = arguments.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path)
    what.add_argument("--store-again", choices=["int8", "bfloat16"])
    arguments.add_argument("--out", type=Path, default=Path("spdbench/drafters"))
    arguments.add_argument("--epochs", type=float, default=2.0)
    arguments.add_argument("--budget", type=float, help="seconds for each drafter, in place of --epochs")
    arguments.add_argument("--lr", type=float, default=2e-3)
    arguments.add_argument("--batch-tokens", type=int, default=512)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--processes", type=int, default=torch.get_num_threads())
    arguments.add_argument("--only", nargs="+", choices=[each.name for each in (*SHIPPED, *MEASURED)])
    arguments.add_argument("--all", action="store_true", help="also those that do not ship")
    arguments.add_argument("--start", type=Path, help="a folder of drafters to go on from")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    known = (*SHIPPED, *MEASURED)
    drafters = [each for each in known if each.name in chosen.only] if chosen.only else known if chosen.all else SHIPPED
    if chosen.store_again:
        for each in drafters:
            store_again(chosen.out / each.name, chosen.store_again)
        return
    target = load_target(MODEL, DTYPE, "cpu")
    conversations = read_conversations(chosen.data)
    sequences = sequences_of(conversations.messages, target)
    recipes = {each.name: recipe_of(each, target, sequences, chosen.seed) for each in drafters}
    features = SharedFeatures(
        target.own_decoder, sequences, {k for recipe in recipes.values() for k in recipe.hidden_indices}
    )
    features.keep_on_disk(cache_folder())
    features.share()
    tokens = [len(sequence.ids) for sequence in sequences]
    together(chosen.processes, lambda process: prepare(features, tokens, process, chosen.processes))
    features.know_all()
    next_drafter = multiprocessing.get_context("fork").Value("i", 0)

    def train_in_turn(_process: int) -> None:
        while True:
            with next_drafter.get_lock():
                index = next_drafter.value
                next_drafter.value += 1
            if index >= len(drafters):
                return
            each = drafters[index]
            train(each, recipes[each.name], features, sequences, target, conversations.sha256, chosen)

    together(chosen.processes, train_in_turn)


def together(count: int, work: Callable[[int], None]) -> None:
    """Calls `work` with 0 to `count` - 1, each in a process that begins as a copy of this one."""
    children = []
    for process in range(1, count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(process)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    work(0)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a process failed")


class SharedFeatures(Features):
    """Features that several processes compute together, for several drafters."""

    def share(self) -> None:
        """Makes features visible between processes that are forked from now on; `know_all` says that they are there."""
        self._argmax_T.share_memory_()  # type: ignore[no-untyped-call]

    def know_all(self) -> None:
        """Marks all sequences as computed, by this process or another."""
        self._known.update(range(len(self._sequences)))

    def only(self, hidden_indices: Collection[int]) -> Features:
        """A view whose batches hold only these states and the last layer's, for one of several drafters."""
        view = copy.copy(self)
        view._given = sorted({*hidden_indices, self._decoder.config.num_layers})
        return view


def sequences_of(messages: list[tuple[Mapping[str, str], ...]], target: Target) -> list[TokenSequence]:
    chat = ChatFormat(target.tokenizer)
    end_id = ending_token(chat, target.eos_ids)
    return [each for conversation in messages for each in tokenised(conversation, chat, end_id, LENGTH)]


def recipe_of(each: Drafter, target: Target, sequences: list[TokenSequence], seed: int) -> Recipe:
    decoder = target.own_decoder
    config = decoder.config
    torch.manual_seed(seed)
    kind = find_recipe(each.method)
    draft_ids_U = most_frequent_tokens(sequences, DRAFT_VOCABULARY, config.vocab_size, target.eos_ids)
    options = parse_recipe_options([f"{key}={value}" for key, value in each.options.items()], kind.Options)
    return kind(options, Teacher(decoder), draft_ids_U, each.stages)


def prepare(features: Features, tokens: Sequence[int], process: int, num_processes: int) -> None:
    """Runs the frozen target over this process's share of the conversations."""
    mine = range(process, len(tokens), num_processes)
    done, began = 0, time.monotonic()
    for count, index in enumerate(mine, 1):
        features.prepare([index])
        done += tokens[index]
        if count % 50 == 0 or count == len(mine):
            total = sum(tokens[i] for i in mine)
            took = time.monotonic() - began
            say(f"process {process}: the target has read {done:,} of {total:,} tokens in {took:.0f} s")


def train(
    each: Drafter,
    recipe: Recipe,
    features: SharedFeatures,
    sequences: list[TokenSequence],
    target: Target,
    data_sha256: str,
    chosen: argparse.Namespace,
) -> None:
    began, folder = time.monotonic(), chosen.out / each.name
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(sequence.ids) for sequence in sequences]
    data = Data(lengths, *split_held_out(lengths, HELD_OUT_SHARE, chosen.seed, HELD_OUT_TOKENS))
    epochs = None if chosen.budget else chosen.epochs
    plan = Plan(epochs, chosen.budget, chosen.lr, chosen.seed, chosen.batch_tokens)
    learned_before = start_from(recipe, chosen.start / each.name, each.method) if chosen.start else 0
    identity = {
        "schema": "spdbench.train/1",
        **each._asdict(),
        "model": target.files.id,
        "model_sha256": target.files.sha256,
        "dtype": target.dtype_name,
        "data_sha256": data_sha256,
        **{key: getattr(chosen, key) for key in ("lr", "batch_tokens", "seed")},
        "epochs": epochs,
        "budget_s": chosen.budget,
        "learned_before": learned_before,
    }
    torch.manual_seed(chosen.seed)
    training = Training(recipe, features.only(recipe.hidden_indices), data, plan, folder, identity, TrainingProgress())
    state = training.run(resume=(folder / checkpoint.NAME).exists())
    about = Provenance(
        target.files.id,
        target.files.sha256,
        data_sha256,
        learned_before + state.best_tokens,
        chosen.seed,
        state.best_rates,
    )
    recipe.write(folder, about, "spdbench")
    checkpoint.remove(folder)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    rates = json.dumps([round(rate, 3) for rate in state.best_rates])
    say(f"{each.name}: {rates}, {state.trained_tokens:,} tokens in {time.monotonic() - began:.0f} s, {size:.1f} MB")


def start_from(recipe: Recipe, folder: Path, method: str) -> int:
    """Gives the recipe the weights of a drafter of the same shapes; returns how many tokens that one learned from."""
    module, tensors = recipe.module, read_tensors([folder / "model.safetensors"])
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE)}
    module.load_state_dict(dict(module.named_buffers()) | weights)
    return int(read_config(folder, method)["trained_tokens"])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
