"""A training run from options to files: data, target, recipe and loop put together. Knows no method."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from spdbench.cli.files import file_identity
from spdbench.cli.progress import TrainingProgress
from spdbench.cli.setup import chat_format, find_one_device, load_model, report_joined
from spdbench.cli.train.command import TrainOptions
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.models.checkpoints.folders import optional_cache_folder
from spdbench.models.target import Target
from spdbench.output_files import FULL, write_obstacle
from spdbench.prompts.chat import ConversationRefusedError, parse_template_args
from spdbench.prompts.templates import find_template
from spdbench.training import checkpoint
from spdbench.training.checkpoint import State
from spdbench.training.conversations import Conversations, read_conversations, skipped_note
from spdbench.training.features import Features
from spdbench.training.log import first_line, is_finished, mark_finished
from spdbench.training.loop import Training
from spdbench.training.recipe import (
    Provenance,
    Recipe,
    RecipeOptions,
    Teacher,
    check_recipe,
    find_recipe,
    parse_recipe_options,
)
from spdbench.training.schedule import Data, Plan, split_held_out
from spdbench.training.space import (
    GB,
    checkpoint_bytes,
    require_disk,
    require_memory,
    teacher_bytes,
    training_bytes,
)
from spdbench.training.tokens import TokenSequence, ending_token, most_frequent_tokens, tokenised

EPOCHS = 3.0
MAX_HELD_OUT_TOKENS = 20_000
FRESH = ".drafter-"
SHARE_OF_DISK = 0.5
WEIGHTS = (".safetensors", ".bin", ".gguf")
MAY_DIFFER = ("data", "out", "feature_cache", "layout", "resume")
"""Options that a resumed run need not share with the one that it continues."""


def train(options: TrainOptions, started: float) -> None:
    """A whole run, from options to files; its budget counts from `started`."""
    recipe_class = find_recipe(options.method)
    recipe_options = parse_recipe_options(options.options, recipe_class.Options)
    check_recipe(recipe_class, options.layout, options.stages)
    conversations = read_conversations(options.data)
    if write_obstacle(options.out) is not None:
        raise InputError(f"--out {options.out}: cannot be written")
    target = _target(options)
    identity = _identity(options, recipe_options, target, conversations.sha256)
    if options.resume and _nothing_is_left(options, identity):
        return
    _require_own_folder(options, target)
    made_by = (conversations.header or {}).get("model", {}).get("sha256", target.files.sha256)
    if made_by != target.files.sha256:
        say(f"NOTE: {options.data} holds what another model said; a drafter learns best from its own model.")
    grouped = _sequences(conversations, target, options)
    sequences, data = [sequence for group in grouped for sequence in group], _data(grouped, options)
    torch.manual_seed(options.seed)
    recipe, features = _prepared(recipe_class, recipe_options, target, sequences, data, options)
    plan = _plan(options)
    if not options.resume and checkpoint.set_aside(options.out):
        say(
            f"An unfinished run is set aside as {checkpoint.ASIDE} until this one has finished; --resume would have "
            "gone on with it."
        )
    training = Training(recipe, features, data, plan, options.out, identity, TrainingProgress(), started=started)
    with _resumable(options.out):
        state = training.run(resume=options.resume)
        _finish(state, recipe, target, options, conversations.sha256, started)


def _require_own_folder(options: TrainOptions, target: Target) -> None:
    """Raises `InputError` where the run would overwrite a model, its own data, or a drafter that is not its like."""
    out = options.out
    if any(file_identity(path) == file_identity(options.data) for path in out.iterdir()):
        raise InputError(f"--out {out}: holds the file of --data, which training could overwrite; choose another --out")
    if not any(path.name == "config.json" or path.suffix in WEIGHTS for path in out.iterdir()):
        return
    run = first_line(out)
    if (run.get("method"), run.get("model_sha256")) != (options.method, target.files.sha256):
        raise InputError(
            f"--out {out}: holds a model, or a drafter of another method or for another model, which training would "
            "overwrite; choose another --out"
        )


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Reports how to continue after an interruption or a full disk."""
    try:
        yield
    except KeyboardInterrupt:
        if (out / checkpoint.NAME).exists():
            say(f"{out}: the same command with --resume goes on from the last step that is kept.")
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"{out}: cannot be written ({error.strerror}); make room, then the same command with --resume"
        ) from None


def _nothing_is_left(options: TrainOptions, identity: Mapping[str, Any]) -> bool:
    """True if the run to be resumed is finished."""
    if (options.out / checkpoint.NAME).exists():
        return False
    if is_finished(options.out, identity, options.layout):
        checkpoint.remove(options.out)
        say(f"{options.out}: this run is finished.")
        return True
    say("Nothing to resume, so this is a new run.")
    return False


def _target(options: TrainOptions) -> Target:
    """The model, its weights still on disk."""
    target = load_model(options, find_one_device(options, "trains the drafter"))
    require_memory(teacher_bytes(target.num_bytes, target.config), target.device, f"the model {target.files.id}")
    return target


def _sequences(conversations: Conversations, target: Target, options: TrainOptions) -> list[list[TokenSequence]]:
    """The sequences of each conversation that has any: one, or one a turn where a template changes earlier turns."""
    chat = chat_format(target, options)
    length, eos_ids = min(options.max_length, target.config.max_positions), target.eos_ids
    end_id = ending_token(chat, eos_ids)
    grouped: list[list[TokenSequence]] = []
    skipped = list(conversations.skipped)
    for place, messages in zip(conversations.places, conversations.messages, strict=True):
        try:
            if sequences := list(tokenised(messages, chat, end_id, length)):
                grouped.append(sequences)
        except ConversationRefusedError as error:  # many templates refuse two turns of one role in a row
            skipped.append(f"{options.data} {place}: {error}")
        except InputError as error:
            raise InputError(f"{options.data} {place}: {error}") from None
    if skipped and not grouped:
        raise InputError(skipped[-1])
    if skipped:
        say(skipped_note(f"--data {options.data}", skipped, len(conversations.places) + len(conversations.skipped)))
    if conversations.num_without_thoughts:
        say(
            f"NOTE: --data {options.data}: {conversations.num_without_thoughts:,} conversations hold thoughts "
            "(reasoning_content), which are not learned; their answers are."
        )
    report_joined(chat, conversations.messages)
    if len(grouped) < 2:
        raise InputError(
            f"{options.data}: {len(grouped)} conversations have an answer within {length} tokens; at least 2 are "
            "needed, one of them to judge by"
        )
    return grouped


def _identity(options: TrainOptions, recipe_options: RecipeOptions, target: Target, data_sha256: str) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that it continues; the first line of the log."""
    return {
        "schema": "spdbench.train/1",
        **{key: getattr(options, key) for key in TrainOptions.__annotations__ if key not in MAY_DIFFER},
        "options": recipe_options.model_dump(mode="json"),
        "model": target.files.id,
        "model_sha256": target.files.sha256,
        "dtype": target.dtype_name,
        "device": target.device.type,
        "data_sha256": data_sha256,
        **({"template_args": args} if (args := parse_template_args(options.template_args)) else {}),
        **({"chat_template": template.text} if (template := find_template(options.chat_template)) else {}),
    }


def _prepared(
    recipe_class: type[Recipe],
    recipe_options: RecipeOptions,
    target: Target,
    sequences: list[TokenSequence],
    data: Data,
    options: TrainOptions,
) -> tuple[Recipe, Features]:
    ends = target.ends
    config = ends.config
    learned = [sequences[index] for index in data.learned]
    draft_ids_U = most_frequent_tokens(learned, options.draft_vocab, config.vocab_size, target.eos_ids)
    recipe = recipe_class(recipe_options, Teacher(ends), draft_ids_U, options.stages)
    recipe.require_layout(options.layout)
    require_memory(training_bytes(recipe.module, config, options.batch_tokens), target.device, "training")
    require_disk(checkpoint_bytes(recipe.module), options.out, "training")
    features = Features(target.decoder, sequences, recipe.hidden_indices)
    _keep(features, options)
    return recipe, features


def _keep(features: Features, options: TrainOptions) -> None:
    """Keeps features on disk if there is room."""
    cache = optional_cache_folder()
    folder = options.out if cache is None or write_obstacle(cache) is not None else cache
    free = shutil.disk_usage(folder).free
    allowed = int(free * SHARE_OF_DISK) if options.feature_cache is None else options.feature_cache
    if features.num_bytes <= min(allowed, free):
        try:
            features.keep_on_disk(folder)
        except OSError as error:
            say(f"NOTE: {folder}: {error.strerror}; the model runs again for every batch.")
    elif allowed:
        say(
            f"NOTE: what the model computes takes {features.num_bytes / GB:.1f} GB, more than the "
            f"{allowed / GB:.1f} GB allowed in {folder}: it runs again for every batch. --feature-cache raises that."
        )


def _data(grouped: list[list[TokenSequence]], options: TrainOptions) -> Data:
    """Whole conversations are held out."""
    lengths = [[len(sequence.ids) for sequence in group] for group in grouped]
    ends = list(accumulate(map(len, lengths)))
    sums = [sum(group) for group in lengths]
    share, most = (0.05, MAX_HELD_OUT_TOKENS) if options.held_out is None else (options.held_out, sum(sums))
    learned, held_out = (
        [index for group in side for index in range(ends[group] - len(lengths[group]), ends[group])]
        for side in split_held_out(sums, share, options.seed, most)
    )
    return Data([length for group in lengths for length in group], learned, held_out)


def _plan(options: TrainOptions) -> Plan:
    epochs = options.epochs or (None if options.budget else EPOCHS)
    return Plan(epochs, options.budget, options.lr, options.seed, options.batch_tokens, options.accumulate)


def _keep_former(out: Path) -> None:
    """Renames the drafter that a former run left in `out`, which is about to be replaced."""
    former = [path for path in out.iterdir() if path.name == "config.json" or path.suffix in (*WEIGHTS, ".pt")]
    former = sorted(path for path in former if path.name != checkpoint.NAME)
    for path in former:
        path.replace(path.with_name(f"{path.name}.old"))
    if former:
        say(
            f"NOTE: the drafter that was in {out} is kept there, as {', '.join(f'{path.name}.old' for path in former)}."
        )


def _finish(
    state: State, recipe: Recipe, target: Target, options: TrainOptions, data_sha256: str, started: float
) -> None:
    about = Provenance(
        model_id=target.files.id,
        model_sha256=target.files.sha256,
        data_sha256=data_sha256,
        trained_tokens=state.best_tokens,
        seed=options.seed,
        acceptance_by_position=state.best_rates,
    )
    for left in options.out.glob(f"{FRESH}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=options.out, prefix=FRESH) as fresh:
        recipe.write(Path(fresh), about, options.layout)
        mark_finished(options.out, options.layout)  # what follows needs no room: the former drafter is safe until then
        _keep_former(options.out)
        for path in sorted(Path(fresh).iterdir(), reverse=True):
            path.replace(options.out / path.name)
    checkpoint.remove(options.out)
    rates = ", ".join(f"{rate:.1%}" for rate in state.best_rates)
    say(
        f"Wrote {options.out}: held-out acceptance {rates}; {state.trained_tokens} tokens learned in "
        f"{time.monotonic() - started:.0f} s."
    )
    if not state.best_tokens:
        say(
            "NOTE: that is the drafter as it began: no step made it better. It takes more time (--budget) or more data."
        )
