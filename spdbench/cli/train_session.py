"""A training run from words to files: data, target, recipe and loop put together.

Where training and harness are wired; parses nothing and knows no method.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spdbench.cli.model_options import ModelOptions
from spdbench.cli.train_progress import TrainingProgress
from spdbench.errors import FULL, InputError
from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.checkpoints.folders import cache_folder
from spdbench.models.target import Target, find_device, load_target
from spdbench.prompts.chat import ChatFormat
from spdbench.training import checkpoint
from spdbench.training.checkpoint import State
from spdbench.training.conversations import Conversations, read_conversations
from spdbench.training.features import Features
from spdbench.training.log import is_finished, mark_finished
from spdbench.training.loop import Training
from spdbench.training.recipe import (
    Provenance,
    Recipe,
    RecipeOptions,
    Teacher,
    check_layout,
    find_recipe,
    parse_recipe_options,
)
from spdbench.training.schedule import Data, Limits, Plan, split_held_out
from spdbench.training.space import (
    GB,
    checkpoint_bytes,
    is_writable,
    require_disk,
    require_memory,
    teacher_bytes,
    training_bytes,
)
from spdbench.training.tokens import TokenSequence, draft_vocabulary, ending_token, tokenised

EPOCHS = 3.0
MOST_HELD_OUT_TOKENS = 20_000
SHARE_OF_DISK = 0.5


@dataclass(frozen=True)
class Wishes:
    """What `train` was asked for, beside the model."""

    method: str
    data: Path
    out: Path
    stages: int | None
    budget: float | None
    epochs: float | None
    layout: str
    lr: float
    seed: int
    batch_tokens: int
    accumulate: int
    held_out: float | None
    draft_vocab: int
    max_length: int
    feature_cache: int | None


def train(wishes: Wishes, chosen: ModelOptions, started: float, *, resume: bool) -> None:
    """A whole run, from words to files; `started` is when the budget's clock was."""
    recipe_class = find_recipe(wishes.method)
    options = parse_recipe_options(chosen.options, recipe_class.Options)
    check_layout(recipe_class, wishes.layout)
    conversations = read_conversations(wishes.data)
    if not is_writable(wishes.out):
        raise InputError(f"--out {wishes.out}: cannot be written")
    torch.set_num_threads(chosen.threads)
    target = _target(chosen)
    identity = _identity(wishes, options, target, conversations.sha256)
    if resume and _nothing_is_left(wishes, identity):
        return
    made_by = (conversations.header or {}).get("model", {}).get("sha256", target.files.sha256)
    if made_by != target.files.sha256:
        _say(f"NOTE: {wishes.data} holds what another model said; a drafter learns best from its own model.")
    sequences = _sequences(conversations, target, wishes)
    torch.manual_seed(wishes.seed)
    recipe, features = _prepared(recipe_class, options, target, sequences, wishes)
    data, plan = _data(sequences, wishes), _plan(wishes)
    if not resume and checkpoint.set_aside(wishes.out):
        _say(
            f"An unfinished run is set aside as {checkpoint.ASIDE} until this one has finished; --resume would have "
            "gone on with it."
        )
    training = Training(recipe, features, data, plan, wishes.out, identity, TrainingProgress(), started=started)
    with _resumable(wishes.out):
        state = training.run(resume=resume)
        _finish(state, recipe, target, wishes, conversations.sha256, started)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Says how to go on after an interruption or a full disk."""
    try:
        yield
    except KeyboardInterrupt:
        if (out / checkpoint.NAME).exists():
            _say(f"{out}: the same command with --resume goes on from the last step that is kept.")
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); make room, then the same command with --resume"
        ) from None


def _nothing_is_left(wishes: Wishes, identity: Mapping[str, Any]) -> bool:
    """True if the run that is to be resumed has come to its end."""
    if (wishes.out / checkpoint.NAME).exists():
        return False
    if is_finished(wishes.out, identity, wishes.layout):
        checkpoint.remove(wishes.out)
        _say(f"{wishes.out}: this run is finished.")
        return True
    _say("Nothing to resume, so this is a new run.")
    return False


def _target(chosen: ModelOptions) -> Target:
    """The model, its weights still on disk."""
    devices = chosen.devices or (("cuda:0",) if torch.cuda.is_available() else ("cpu",))
    for device in devices:
        find_device(device)
    target = load_target(chosen.model or "smollm2", chosen.dtype, devices[0])
    if not isinstance(target.config, ModelConfig):
        raise InputError(f"{target.files.id}: drafters are made of spdbench's own layers, which do not know this model")
    require_memory(teacher_bytes(target.num_bytes, target.config), target.device, f"the model {target.files.id}")
    return target


def _sequences(conversations: Conversations, target: Target, wishes: Wishes) -> list[TokenSequence]:
    chat = ChatFormat(target.tokenizer)
    if not chat.is_chat:
        _say(f"NOTE: {target.files.id} has no chat template: conversations are learned as plain text.")
    length, eos_ids = min(wishes.max_length, target.config.max_positions), target.config.eos_ids
    end_id = ending_token(chat, eos_ids)
    sequences: list[TokenSequence] = []
    for number, messages in zip(conversations.lines, conversations.messages, strict=True):
        try:
            sequences += tokenised(messages, chat, end_id, length)
        except InputError as error:
            raise InputError(f"{wishes.data} line {number}: {error}") from None
    if len(sequences) < 2:
        raise InputError(
            f"{wishes.data}: {len(sequences)} conversations have an answer within {length} tokens; at least 2 are "
            "needed, one of them to judge by"
        )
    return sequences


def _identity(wishes: Wishes, options: RecipeOptions, target: Target, data_sha256: str) -> dict[str, Any]:
    """What has to be the same for a run to go on where another stopped; the first line of the log."""
    skip = {"data", "out", "feature_cache", "layout"}
    return {
        "schema": "spdbench.train/1",
        **{key: value for key, value in vars(wishes).items() if key not in skip},
        "options": options.model_dump(mode="json"),
        "model": target.files.id,
        "model_sha256": target.files.sha256,
        "dtype": target.dtype_name,
        "device": target.device.type,
        "data_sha256": data_sha256,
    }


def _prepared(
    recipe_class: type[Recipe],
    options: RecipeOptions,
    target: Target,
    sequences: list[TokenSequence],
    wishes: Wishes,
) -> tuple[Recipe, Features]:

    decoder = target.own_decoder
    config = decoder.config
    draft_ids_U = draft_vocabulary(sequences, wishes.draft_vocab, config.vocab_size, config.eos_ids)
    recipe = recipe_class(options, Teacher(decoder), draft_ids_U, wishes.stages)
    recipe.require_layout(wishes.layout)
    require_memory(training_bytes(recipe.module, config, wishes.batch_tokens), target.device, "training")
    require_disk(checkpoint_bytes(recipe.module), wishes.out, "training")
    features = Features(decoder, sequences, recipe.hidden_indices)
    _keep(features, wishes)
    return recipe, features


def _keep(features: Features, wishes: Wishes) -> None:
    """Gives features a place on disk if there is one."""
    folder = next((place for place in (cache_folder(), wishes.out) if is_writable(place)), wishes.out)
    free = shutil.disk_usage(folder).free
    allowed = int(free * SHARE_OF_DISK) if wishes.feature_cache is None else wishes.feature_cache
    if features.num_bytes <= min(allowed, free):
        try:
            features.keep_on_disk(folder)
            return
        except OSError as error:
            _say(f"NOTE: {folder}: {error.strerror}; the model runs again for every batch.")
            return
    if allowed:
        _say(
            f"NOTE: what the model computes takes {features.num_bytes / GB:.1f} GB, more than the "
            f"{allowed / GB:.1f} GB allowed in {folder}: it runs again for every batch. --feature-cache raises that."
        )


def _data(sequences: list[TokenSequence], wishes: Wishes) -> Data:

    lengths = [len(sequence.ids) for sequence in sequences]
    share, most = (0.05, MOST_HELD_OUT_TOKENS) if wishes.held_out is None else (wishes.held_out, sum(lengths))
    return Data(lengths, *split_held_out(lengths, share, wishes.seed, most))


def _plan(wishes: Wishes) -> Plan:

    epochs = wishes.epochs or (None if wishes.budget else EPOCHS)
    return Plan(Limits(epochs, wishes.budget), wishes.lr, wishes.seed, wishes.batch_tokens, wishes.accumulate)


def _finish(state: State, recipe: Recipe, target: Target, wishes: Wishes, data_sha256: str, started: float) -> None:

    about = Provenance(
        model_id=target.files.id,
        model_sha256=target.files.sha256,
        data_sha256=data_sha256,
        trained_tokens=state.best_tokens,
        seed=wishes.seed,
        acceptance_by_position=state.best_rates,
    )
    recipe.write(wishes.out, about, wishes.layout)
    mark_finished(wishes.out, wishes.layout)
    checkpoint.remove(wishes.out)
    rates = ", ".join(f"{rate:.1%}" for rate in state.best_rates)
    _say(
        f"Wrote {wishes.out}: held-out acceptance {rates}; {state.trained_tokens} tokens learned in "
        f"{time.monotonic() - started:.0f} s."
    )
    if not state.best_tokens:
        _say(
            "NOTE: that is the drafter as it began: no step made it better. It takes more time (--budget) or more data."
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
