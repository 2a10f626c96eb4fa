"""`spdbench train`: parses and checks, then puts data, target, recipe and loop together.

Where training and harness are wired; knows no method.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench.cli.interrupts import sigterm_interrupts
from spdbench.cli.model_options import FiniteRange, ModelOptions, model_options
from spdbench.cli.quantities import Duration, Size
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.models.target import Target
    from spdbench.training.checkpoint import State
    from spdbench.training.features import Features
    from spdbench.training.loop import Data, Plan
    from spdbench.training.recipe import Recipe, RecipeOptions
    from spdbench.training.tokens import TokenSequence

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


@click.command("train", short_help="Train a drafter on conversations.")
@click.argument("method")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Conversations, one JSON a line."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR", help="Where it goes."
)
@click.option("--stages", type=click.IntRange(min=1), metavar="N", help="Pipeline stages that it is to draft for.")
@click.option("--budget", type=Duration(), metavar="TIME", help="End after so long, all included: 90s, 20m, 1h30m.")
@click.option(
    "--epochs",
    type=FiniteRange(min=0, min_open=True),
    metavar="N",
    help="Rounds over the data. [default: 3; as many as --budget allows]",
)
@click.option("--format", "layout", default="spdbench", metavar="NAME", show_default=True, help="Layout of the files.")
@click.option("--lr", type=FiniteRange(min=0, min_open=True), default=1e-3, show_default=True, help="Learning rate.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens a forward, padded."
)
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Forwards a step.")
@click.option(
    "--held-out",
    type=FiniteRange(min=0, max=1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Of the conversations, never learned from. [default: 0.05, at most 20,000 tokens]",
)
@click.option(
    "--draft-vocab", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens that can be drafted."
)
@click.option(
    "--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a conversation."
)
@click.option(
    "--feature-cache",
    type=Size(),
    metavar="SIZE",
    help="Disk for what the target computed; 0: compute it anew each time. [default: half of what is free]",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@model_options
def command(*, chosen: ModelOptions, resume: bool, **words: Any) -> None:
    """Train a drafter for a model on conversations, best those of the model itself (`spdbench distill`).

    METHOD is spd, ppsd, eagle3 or medusa; -o KEY=VALUE sets its options. DIR gets config.json, model.safetensors and
    train.jsonl, and is what --drafter takes.
    """
    started = time.monotonic()
    with sigterm_interrupts():
        _train(Wishes(**words), chosen, started, resume=resume)


def _train(wishes: Wishes, chosen: ModelOptions, started: float, *, resume: bool) -> None:
    import torch

    from spdbench.training.conversations import read_conversations
    from spdbench.training.registry import check_layout, find_recipe, parse_recipe_options

    if chosen.drafters:
        raise InputError("--drafter: training makes a drafter, it takes none")
    recipe_class = find_recipe(wishes.method)
    options = parse_recipe_options(chosen.options, recipe_class.Options)
    check_layout(recipe_class, wishes.layout)
    conversations = read_conversations(wishes.data)
    if _finished(wishes, resume=resume):
        return
    torch.set_num_threads(chosen.threads)
    target = _target(chosen)
    sequences = _sequences(conversations.messages, target, wishes)
    identity = _identity(wishes, options, target, conversations.sha256)
    torch.manual_seed(wishes.seed)
    recipe, features = _prepared(recipe_class, options, target, sequences, wishes)
    from spdbench.cli.train_progress import TrainingProgress
    from spdbench.training.loop import Training

    data, plan = _data(sequences, wishes), _plan(wishes)
    training = Training(recipe, features, data, plan, wishes.out, identity, TrainingProgress(), started=started)
    _finish(training.run(resume=resume), recipe, target, wishes, conversations.sha256, started)


def _finished(wishes: Wishes, *, resume: bool) -> bool:
    """True if there is nothing left to do. What an unfinished run left is set aside where it is not resumed."""
    from spdbench.training.checkpoint import NAME
    from spdbench.training.space import is_writable

    if not is_writable(wishes.out):
        raise InputError(f"--out {wishes.out}: cannot be written")
    unfinished = wishes.out / NAME
    if resume and not unfinished.exists():
        if (wishes.out / "config.json").exists():
            _say(f"{wishes.out}: this run is finished.")
            return True
        _say("Nothing to resume, so this is a new run.")
    elif not resume and unfinished.exists():
        unfinished.replace(unfinished.with_name(NAME + ".old"))
        _say(f"An unfinished run is set aside as {NAME}.old; --resume would have gone on with it.")
    return False


def _target(chosen: ModelOptions) -> Target:
    import torch

    from spdbench.models.target import find_device, load_target
    from spdbench.training.space import require_memory, teacher_bytes

    devices = chosen.devices or (("cuda:0",) if torch.cuda.is_available() else ("cpu",))
    for device in devices:
        find_device(device)
    target = load_target(chosen.model or "smollm2", chosen.dtype, devices[0])
    if target._known is None:
        raise InputError(f"{target.files.id}: drafters are made of spdbench's own layers, which do not know this model")
    require_memory(teacher_bytes(target.num_bytes, target._known), target.device, f"the model {target.files.id}")
    return target


def _sequences(messages: Any, target: Target, wishes: Wishes) -> list[TokenSequence]:
    from spdbench.prompts.chat import ChatFormat
    from spdbench.training.tokens import ending_token, tokenised

    chat = ChatFormat(target.tokenizer)
    if not chat.is_chat:
        _say(f"NOTE: {target.files.id} has no chat template: conversations are learned as plain text.")
    length, eos_ids = min(wishes.max_length, target.config.max_positions), target.config.eos_ids
    end_id = ending_token(chat, eos_ids)
    sequences = [sequence for conversation in messages for sequence in tokenised(conversation, chat, end_id, length)]
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
    from spdbench.training.features import Features, make_teacher
    from spdbench.training.space import require_memory, training_bytes
    from spdbench.training.tokens import draft_vocabulary

    decoder = target.own_decoder
    config = decoder.config
    draft_ids_U = draft_vocabulary(sequences, wishes.draft_vocab, config.vocab_size, config.eos_ids)
    recipe = recipe_class(options, make_teacher(decoder), draft_ids_U, wishes.stages)
    require_memory(training_bytes(recipe.module, config, wishes.batch_tokens), target.device, "training")
    features = Features(decoder, sequences, recipe.wanted)
    _keep(features, wishes)
    return recipe, features


def _keep(features: Features, wishes: Wishes) -> None:
    """Gives features a place on disk if there is one."""
    import shutil

    from spdbench.models.cache import cache_folder
    from spdbench.training.space import GB, is_writable

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
    from spdbench.training.loop import Data
    from spdbench.training.order import split_held_out

    lengths = [len(sequence.ids) for sequence in sequences]
    share, most = (0.05, MOST_HELD_OUT_TOKENS) if wishes.held_out is None else (wishes.held_out, sum(lengths))
    return Data(lengths, *split_held_out(lengths, share, wishes.seed, most))


def _plan(wishes: Wishes) -> Plan:
    from spdbench.training.loop import Plan
    from spdbench.training.schedule import Limits

    epochs = wishes.epochs or (None if wishes.budget else EPOCHS)
    return Plan(Limits(epochs, wishes.budget), wishes.lr, wishes.seed, wishes.batch_tokens, wishes.accumulate)


def _finish(state: State, recipe: Recipe, target: Target, wishes: Wishes, data_sha256: str, started: float) -> None:
    from spdbench.training import checkpoint
    from spdbench.training.recipe import Provenance

    about = Provenance(
        model_id=target.files.id,
        model_sha256=target.files.sha256,
        data_sha256=data_sha256,
        trained_tokens=state.best_tokens,
        seed=wishes.seed,
        acceptance_by_position=state.best_rates,
    )
    recipe.write(wishes.out, about, wishes.layout)
    checkpoint.remove(wishes.out)
    rates = ", ".join(f"{rate:.1%}" for rate in state.best_rates)
    _say(
        f"Wrote {wishes.out}: held-out acceptance {rates}; {state.trained_tokens} tokens learned in "
        f"{time.monotonic() - started:.0f} s."
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
