"""Trains the drafters that ship with spdbench, and others to compare them with, on the same data for as many epochs.

Why: a comparison of methods is fair only if their drafters saw the same data. The target's features of the data, which
take longer than any drafter's own training, are computed once for all of them here.
Regimes: the embedded model, conversations of its own (`spdbench distill`), a draft vocabulary of 8,192, the target's
own head rows; one decoder layer for EAGLE-3, two for pipeline drafters; all matrices are stored in 8 bits. One head of
SPD learns in pipelines of 2, 3, 5 and 10 stages in turn, and drafts for any number of them.
Output: one folder per drafter in `--out`, each with its log `train.jsonl`; on stderr what `spdbench train` prints.
Several processes of one thread each (`--processes`) share the work: two threads on one matrix multiplication wait for
each other.

    python -m benchmarks.drafters --data data.jsonl.gz [--out spdbench/drafters] [--epochs 2] [--only spd ... | --all]
        --start FOLDER --more new.jsonl.gz   # goes on from the drafters there, which have learned from --data
        --budget SECONDS                     # for each drafter, in place of --epochs
        --features FOLDER                    # keeps there what the target computes, 8 KB a token, for later runs
        --features-budget SECONDS            # drafters learn from what there is by then
        --judge                              # trains nothing: acceptance of those in --out on what --data holds out
                                             # (with the --more of the run whose --features are read)

With `--store-again int8` (or `bfloat16`) it trains nothing: the folders in `--out` are rewritten so.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spdbench.cli.progress import TrainingProgress
from spdbench.models.checkpoints.folders import cache_folder
from spdbench.models.checkpoints.layer_tensors import SCALE
from spdbench.models.target import Target, load_target
from spdbench.prompts.chat import ChatFormat
from spdbench.training import checkpoint
from spdbench.training.conversations import read_conversations
from spdbench.training.features import Features
from spdbench.training.loop import Training, measure_acceptance
from spdbench.training.recipe import Provenance, Recipe, Teacher, find_recipe, parse_recipe_options
from spdbench.training.schedule import Data, Plan, batches_of, split_held_out
from spdbench.training.tokens import TokenSequence, ending_token, most_frequent_tokens, tokenised
from spdbench_backends.drafter_files.folder import read_config, read_tensors, store_again
from spdbench_backends.spd.trainable import TrainableModule

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
    Drafter("spd", "spd", None, {"stage_counts": "2,3,5,10", **TWO_LAYERS}),
    Drafter("ppsd-3", "ppsd", 3, TWO_LAYERS),
    Drafter("eagle3", "eagle3", None, {"unrolled": "0.3", **IN_8_BITS}),
    Drafter("medusa", "medusa", None, IN_8_BITS),
)
MEASURED = tuple(Drafter(f"spd-{stages}", "spd", stages, TWO_LAYERS) for stages in (2, 3, 5, 6, 10))
"""For pipelines of one number of stages each."""
STARTS = {"spd": "spd-3"}
"""What a drafter can begin as where the folder of `--start` lacks its own."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = arguments.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path)
    what.add_argument("--store-again", choices=["int8", "bfloat16"])
    arguments.add_argument("--judge", action="store_true", help="only say how good the drafters in --out are")
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
    arguments.add_argument(
        "--more", type=Path, help="conversations that drafters of --start have not learned; some are held out"
    )
    arguments.add_argument(
        "--held-out-tokens", type=int, default=HELD_OUT_TOKENS, help="of --more, and of --data then, at most"
    )
    arguments.add_argument("--features", type=Path, help="a folder that keeps what the target computes")
    arguments.add_argument("--features-budget", type=float, default=float("inf"), help="seconds")
    arguments.add_argument("--features-dtype", default=DTYPE, help="float32 where a processor lacks bfloat16")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    known = (*SHIPPED, *MEASURED)
    drafters = [each for each in known if each.name in chosen.only] if chosen.only else known if chosen.all else SHIPPED
    if chosen.store_again:
        for each in drafters:
            store_again(chosen.out / each.name, chosen.store_again)
        return
    if chosen.features:
        train_all(drafters, chosen.features, chosen)
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".features-") as folder:
        train_all(drafters, Path(folder), chosen)


def train_all(drafters: Sequence[Drafter], folder: Path, chosen: argparse.Namespace) -> None:
    target = load_target(MODEL, DTYPE, "cpu")
    texts = [read_conversations(path) for path in (chosen.data, chosen.more) if path]
    by_file = [sequences_of(each.messages, target) for each in texts]
    sequences = [sequence for each in by_file for sequence in each]
    vocabulary = most_frequent_tokens(sequences, DRAFT_VOCABULARY, target.own_decoder.config.vocab_size, target.eos_ids)
    recipes = {each.name: recipe_of(each, target, vocabulary, chosen.seed) for each in drafters}
    lengths = [len(sequence.ids) for sequence in sequences]
    data = Data(lengths, *split(lengths, len(by_file[0]), chosen))
    sha256 = texts[0].sha256
    if chosen.more:
        sha256 = hashlib.sha256("".join(each.sha256 for each in texts).encode()).hexdigest()
    reader = load_target(MODEL, chosen.features_dtype, "cpu").own_decoder
    kinds = {k for recipe in recipes.values() for k in recipe.hidden_indices}
    features = SharedFeatures(reader, sequences, kinds)
    features.keep_in(folder, sha256, chosen.features_dtype)
    learned = [] if chosen.judge else list(data.learned)
    random.Random(chosen.seed).shuffle(learned)
    order = [*data.held_out, *learned]
    together(chosen.processes, lambda process: prepare(features, order[process :: chosen.processes], data, chosen))
    known = features.know_all()
    data = Data(lengths, *([index for index in each if index in known] for each in (data.learned, data.held_out)))
    if chosen.judge:
        judge(drafters, target, features, data, chosen)
        return
    next_drafter = multiprocessing.get_context("fork").Value("i", 0)

    def train_in_turn(_process: int) -> None:
        while True:
            with next_drafter.get_lock():
                index = next_drafter.value
                next_drafter.value += 1
            if index >= len(drafters):
                return
            each = drafters[index]
            train(each, recipes[each.name], features, data, target, sha256, chosen)

    together(chosen.processes, train_in_turn)


def split(lengths: Sequence[int], num_first: int, chosen: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Indices to learn from and held out.

    Drafters to go on from have learned the first `num_first`, those of --data, but for what was held out of these. With
    --more, up to --held-out-tokens of both are held out.
    """
    learned, held = split_held_out(lengths[:num_first], HELD_OUT_SHARE, chosen.seed, HELD_OUT_TOKENS)
    if chosen.judge or not chosen.more:
        return learned, held
    more, held_more = split_held_out(lengths[num_first:], HELD_OUT_SHARE, chosen.seed, chosen.held_out_tokens)
    ends = accumulate(lengths[index] for index in held)
    held = [index for index, end in zip(held, ends, strict=True) if end <= chosen.held_out_tokens]
    return [*learned, *(num_first + index for index in more)], [*held, *(num_first + index for index in held_more)]


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
    """Features that several processes compute together, for several drafters, in files that stay."""

    _known_N: Tensor

    def keep_in(self, folder: Path, data_sha256: str, dtype: str) -> None:
        """Keeps features in files in `folder`, whose number of states may be larger than what is read.

        Exits if the folder holds those of other data.
        """
        about, num_tokens = folder / "about.json", len(self._argmax_T)
        if not about.exists():
            folder.mkdir(parents=True, exist_ok=True)
            about.write_text(json.dumps({"data": data_sha256, "dtype": dtype, "states": self._kinds}) + "\n")
        kept = json.loads(about.read_text())
        if (kept["data"], kept["dtype"]) != (data_sha256, dtype) or not set(self._kinds) <= set(kept["states"]):
            sys.exit(f"--features {folder}: holds other features: {kept}")
        self._kinds = kept["states"]
        width = self._decoder.config.hidden_size
        shape = num_tokens, len(self._kinds), width
        self._states_TKM = in_file(folder / "states.bin", num_tokens * len(self._kinds) * width, torch.bfloat16)
        self._states_TKM = self._states_TKM.view(shape)
        self._argmax_T = in_file(folder / "argmax.bin", num_tokens, torch.int32)
        self._known_N = in_file(folder / "known.bin", len(self._sequences), torch.uint8)
        self.know_all()

    def prepare(self, indices: Sequence[int]) -> None:
        super().prepare(indices)
        self._known_N[list(indices)] = 1

    def know_all(self) -> set[int]:
        """The sequences that were computed, by this process or another."""
        self._known.update(self._known_N.nonzero().flatten().tolist())
        return self._known

    def only(self, hidden_indices: Collection[int]) -> Features:
        """A view whose batches hold only these states and the last layer's, for one of several drafters."""
        view = copy.copy(self)
        view._given = sorted({*hidden_indices, self._decoder.config.num_layers})
        return view


def in_file(file: Path, size: int, dtype: torch.dtype) -> Tensor:
    """A tensor in a file that processes share, of zeros where it is new."""
    with file.open("ab") as handle:
        os.posix_fallocate(handle.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype)


def sequences_of(messages: list[tuple[Mapping[str, str], ...]], target: Target) -> list[TokenSequence]:
    chat = ChatFormat(target.tokenizer)
    end_id = ending_token(chat, target.eos_ids)
    return [each for conversation in messages for each in tokenised(conversation, chat, end_id, LENGTH)]


def recipe_of(each: Drafter, target: Target, draft_ids_U: Tensor | None, seed: int) -> Recipe:
    torch.manual_seed(seed)
    kind = find_recipe(each.method)
    options = parse_recipe_options([f"{key}={value}" for key, value in each.options.items()], kind.Options)
    return kind(options, Teacher(target.own_decoder), draft_ids_U, each.stages)


def prepare(features: SharedFeatures, mine: Sequence[int], data: Data, chosen: argparse.Namespace) -> None:
    """Runs the frozen target over this process's share of the conversations, until the budget is spent."""
    done, began, known = 0, time.monotonic(), features.know_all()
    for count, index in enumerate(mine, 1):
        took = time.monotonic() - began
        if took > chosen.features_budget:
            return
        if index not in known:
            features.prepare([index])
            done += data.lengths[index]
        if count % 100 == 0 or count == len(mine):
            say(f"the target has read {count:,} of {len(mine):,} conversations, {done:,} tokens in {took:.0f} s")


def train(
    each: Drafter,
    recipe: Recipe,
    features: SharedFeatures,
    data: Data,
    target: Target,
    data_sha256: str,
    chosen: argparse.Namespace,
) -> None:
    began, folder = time.monotonic(), chosen.out / each.name
    folder.mkdir(parents=True, exist_ok=True)
    epochs = None if chosen.budget else chosen.epochs
    plan = Plan(epochs, chosen.budget, chosen.lr, chosen.seed, chosen.batch_tokens)
    learned_before = start_from(recipe, start_of(chosen.start, each), each) if chosen.start else 0
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
        "features_dtype": chosen.features_dtype,
        "conversations": len(data.learned),
        "held_out": len(data.held_out),
    }
    torch.manual_seed(chosen.seed)
    own, progress = features.only(recipe.hidden_indices), TrainingProgress()
    training = Training(recipe, own, data, plan, folder, identity, progress, from_scratch=not chosen.start)
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


def start_of(folder: Path, each: Drafter) -> Path:
    """The drafter to go on from: its own, or one that it can begin as."""
    found = [folder / name for name in (each.name, STARTS.get(each.name)) if name and (folder / name).exists()]
    return found[0] if found else sys.exit(f"--start {folder}: holds no {each.name}")


def start_from(recipe: Recipe, path: Path, each: Drafter) -> int:
    """Gives the recipe the weights of a drafter; returns how many tokens that one learned from."""
    tensors, config = read_tensors([path / "model.safetensors"]), read_config(path, each.method)
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE)}
    module = recipe.module
    if isinstance(module, TrainableModule):
        weights = module.widened(weights, config["aggr_feature_bound"])
    module.load_state_dict(dict(module.named_buffers()) | weights)
    return int(config["trained_tokens"])


def judge(
    drafters: Sequence[Drafter], target: Target, features: SharedFeatures, data: Data, chosen: argparse.Namespace
) -> None:
    """Says how many first drafts are accepted on the conversations held out of --data; of a head for several numbers of
    stages, for each of them."""
    batches = batches_of(data.held_out, data.lengths, chosen.batch_tokens)
    for each in drafters:
        path = chosen.out / each.name
        ids = read_config(path, each.method).get("draft_token_ids")
        for count in each.options.get("stage_counts", "").split(","):
            one = each._replace(options={**each.options, "stage_counts": count} if count else each.options)
            recipe = recipe_of(one, target, ids and torch.tensor(ids), chosen.seed)
            start_from(recipe, path, each)
            view = features.only(recipe.hidden_indices)
            counts = measure_acceptance(recipe, view, batches, target.own_decoder.device)
            words = f"{each.name}{f' in {count} stages' if count else ''}"
            say(f"{words}: {', '.join(f'{rate:.1%}' for rate in counts.rates)} of {counts.judged[0]:,} drafts")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
