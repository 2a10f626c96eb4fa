"""`spdbench distill`: has the target write training data by itself, or answer prompts from a file.

Parses, checks and wires; conversations, batching and the file are `spdbench.training`'s.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench import __version__
from spdbench.cli.model_options import ModelOptions, target_options
from spdbench.errors import InputError
from spdbench.types import Message

if TYPE_CHECKING:
    from spdbench.models.decoder import Decoder
    from spdbench.models.target import Target
    from spdbench.prompts.chat import ChatFormat
    from spdbench.training.batched import Slots
    from spdbench.training.datafile import DataFile
    from spdbench.training.distil import Distiller, Talk

BYTES_PER_TOKEN = 10
"""Of the file for each token kept: some four letters of the answer, and the user's share."""
SPARE_BYTES = 2**20
SECONDS_BETWEEN_SUMMARIES = 10.0
SLOTS_A_PART = 32
"""A thread gets a part of the conversations if it is at least this one: weights are read once for all of a part."""
TOKENS_PER_SLOT = 100
"""Fewer slots are used for little data: about an answer for each, or short answers alone would be in time."""


@dataclass(frozen=True)
class Asked:
    """A conversation to answer: what comes before its first user turn, and the user's turns."""

    system: tuple[Message, ...]
    turns: tuple[str, ...]


@click.command("distill", short_help="Let the target write training data by itself.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The JSONL file to write.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=500_000,
    metavar="N",
    show_default=True,
    help="Answer tokens to keep.",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Answer these: JSONL with `turns` or `messages`. [default: the model writes user turns]",
)
@click.option(
    "--exclude",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="PATH",
    help="Prompts to keep out, JSONL or a folder of it, beside those of the shipped suites.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="DIR", help="Where the suites' files lie, to keep out."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=8),
    default=256,
    metavar="N",
    show_default=True,
    help="Limit of each answer.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=128,
    metavar="N",
    show_default=True,
    help="Conversations at a time.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="S", show_default=True)
@target_options("smollm2")
def command(
    out: Path,
    tokens: int,
    prompts_file: Path | None,
    exclude: tuple[Path, ...],
    data: Path | None,
    max_new_tokens: int,
    batch: int,
    seed: int,
    chosen: ModelOptions,
) -> None:
    """Let the target write conversations to train drafters on, or answer prompts from a file.

    What is finished is in the file at once; the same command goes on after an interruption.
    """
    from spdbench.training.datafile import open_data

    _check_folder(out, tokens)
    asked = None if prompts_file is None else _read_asked(prompts_file)
    excluded = _excluded(exclude, data)
    target = _target(chosen)
    decoder = target.own_decoder
    with ExitStack() as stack:
        distiller, header = _distiller(target, asked, excluded, max_new_tokens, seed)
        header |= {"tokens": tokens, "batch": batch, "prompts_sha256": _sha256(prompts_file)}
        file = stack.enter_context(open_data(out, header))
        for kept in file.found:
            distiller.seen.add(kept.messages)
        if file.num_conversations:
            _say(f"{out}: goes on after {file.num_conversations:,} conversations, {file.num_tokens:,} tokens.")
        if file.num_tokens < tokens:
            slots = _slots(decoder, batch, tokens - file.num_tokens, distiller.room, chosen.threads)
            _fill(file, tokens, _scripts(distiller, asked, file), slots, chosen.threads)
        _say_end(file, tokens)


def _fill(file: DataFile, tokens: int, scripts: Iterator[Talk], slots: Sequence[Slots], num_threads: int) -> None:
    """Adds conversations until there are enough tokens or no more prompts."""
    from spdbench.cli.distill_progress import DataProgress
    from spdbench.cli.interrupts import ignore_from_now_on, sigterm_interrupts
    from spdbench.training.continuous import Batch
    from spdbench.training.threads import results_of

    lock = threading.Lock()
    batches = [Batch(part, scripts, lock) for part in slots]
    stream = results_of(batches, num_threads)
    progress = DataProgress(tokens, file.num_tokens)
    before = file.num_written, file.seconds
    started = summed = time.monotonic()

    def count() -> int:
        """Brings the file's counts up to date; returns the tokens written since the start."""
        written = sum(batch.num_written for batch in batches)
        file.num_written, file.seconds = before[0] + written, before[1] + time.monotonic() - started
        return written

    with sigterm_interrupts():
        try:
            with progress, closing(stream) as outcomes:
                for outcome in outcomes:
                    if outcome is not None:
                        file.add(outcome)
                    progress.show(file.num_tokens, count(), file.num_conversations, file.dropped.total())
                    if time.monotonic() - summed > SECONDS_BETWEEN_SUMMARIES:
                        summed = time.monotonic()
                        file.write_summary(complete=False)
                    if file.num_tokens >= tokens:
                        break
        except KeyboardInterrupt:
            ignore_from_now_on()
            count()
            file.write_summary(complete=False)
            _say(f"{file.num_tokens:,} tokens are kept; the same command goes on from there.")
            raise
        written = count()
        file.write_summary(complete=True)
    _say(progress.words(file.num_tokens, written, file.num_conversations, file.dropped.total()))


def _say_end(file: DataFile, tokens: int) -> None:
    if file.num_tokens < tokens:
        _say(f"All prompts are used up, {tokens - file.num_tokens:,} tokens before the end.")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in file.dropped.most_common())
    _say(f"Wrote {file.path} (dropped: {reasons or 'nothing'})")


def _slots(decoder: Decoder, batch: int, tokens: int, room: int, num_threads: int) -> list[Slots]:
    """Room for `batch` conversations, or fewer for little data: on a CPU one part for each of a few threads."""
    from spdbench.training.batched import Slots

    num_slots = min(batch, max(1, tokens // TOKENS_PER_SLOT))
    num_parts = max(1, min(num_threads, num_slots // SLOTS_A_PART)) if decoder.device.type == "cpu" else 1
    return [Slots(decoder, num_slots // num_parts + (i < num_slots % num_parts), room) for i in range(num_parts)]


def _scripts(distiller: Distiller, asked: list[Asked] | None, file: DataFile) -> Iterator[Talk]:
    """Conversations that are not in the file yet: new ones without end, or those of the prompts that are left."""
    done = {kept.index for kept in file.found}
    if asked is None:
        index = max(done, default=-1)
        while True:
            index += 1
            yield distiller.invent(index)
    for index, one in enumerate(asked):
        if index not in done:
            yield distiller.reply(index, one.system, one.turns)


def _distiller(
    target: Target, asked: list[Asked] | None, excluded: Mapping[str, tuple[str, ...]], max_new_tokens: int, seed: int
) -> tuple[Distiller, dict[str, Any]]:
    """What all conversations share, and what the file's header says of it."""
    from spdbench.prompts.chat import ChatFormat
    from spdbench.training import distil
    from spdbench.training.continuous import TOP_K
    from spdbench.training.filters import Overlap

    chat = ChatFormat(target.tokenizer)
    if not chat.is_chat:
        _say("NOTE: this model has no chat template: user turns and answers are plain completions of each other.")
    room = min(target.config.max_positions, _longest(chat, asked, max_new_tokens))
    distiller = distil.Distiller(
        chat=chat,
        is_chat=chat.is_chat,
        eos_ids=target.config.eos_ids,
        seed=seed,
        max_new_tokens=max_new_tokens,
        room=room,
        overlap=Overlap(text for texts in excluded.values() for text in texts),
        seen=distil.Seen(),
    )
    texts = repr(sorted(excluded.items())).encode()
    header = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spdbench": __version__,
        "model": {"id": target.files.id, "sha256": target.files.sha256, "dtype": target.dtype_name},
        "template_sha256": chat.template_sha256,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "sampling": {
            "greedy_share": 0.5,
            "temperatures": list(distil.ANSWER_TEMPERATURES),
            "top_p": distil.ANSWER_TOP_P,
            "top_k": TOP_K,
            "user": None if asked else asdict(distil.USER_SAMPLING),
        },
        "excluded": {name: len(prompts) for name, prompts in excluded.items()},
        "excluded_sha256": hashlib.sha256(texts).hexdigest(),
    }
    return distiller, header


def _longest(chat: ChatFormat, asked: list[Asked] | None, max_new_tokens: int) -> int:
    """Tokens that the longest conversation may come to."""
    from spdbench.training.distil import MAX_USER_TOKENS

    spare = 64
    if asked is None:
        return len(chat.encode([{"role": "user", "content": "?"}])) + 2 * (MAX_USER_TOKENS + max_new_tokens) + spare
    lengths = []
    for one in asked:
        turns: list[Message] = [{"role": "user", "content": turn} for turn in one.turns]
        texts = "\n".join(turn["content"] for turn in turns)
        whole = len(chat.encode([*one.system, {"role": "user", "content": texts}]))
        lengths.append(whole + len(turns) * (max_new_tokens + spare))
    return max(lengths)


def _target(chosen: ModelOptions) -> Target:
    import torch

    from spdbench.models.target import load_target

    torch.set_num_threads(chosen.threads)
    devices = chosen.devices or (("cuda:0",) if torch.cuda.is_available() else ("cpu",))
    if len(devices) > 1:
        raise InputError(f"--devices {','.join(devices)}: one device makes the data; give one")
    return load_target(chosen.model or "smollm2", chosen.dtype, devices[0])


def _excluded(paths: tuple[Path, ...], data: Path | None) -> dict[str, tuple[str, ...]]:
    """User turns to keep out, by the suite or file that they are from."""
    from spdbench.prompts.suite import prompts_at_hand

    found = {
        name: tuple(turn for prompt in prompts for turn in prompt.turns)
        for name, prompts in prompts_at_hand(data).items()
    }
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"--exclude {path}: the folder holds no .jsonl file")
        for file in files:
            found[str(file)] = tuple(turn for one in _read_asked(file) for turn in one.turns)
    return found


def _read_asked(path: Path) -> list[Asked]:
    """Conversations of a JSONL file, with `turns` as EAGLE and Spec-Bench have them, or messages; answers left out."""
    from spdbench.prompts.rows import json_lines
    from spdbench.training.conversations import SCHEMA, messages_of

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    found = []
    for where, row in json_lines(raw, str(path)):
        if row.get("schema") == SCHEMA:
            continue
        if "turns" in row:
            turns = [row["turns"]] if isinstance(row["turns"], str) else row["turns"]
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
                raise InputError(f"{where}: turns: must be a text or a list of texts")
            found.append(Asked((), tuple(turns)))
        elif "messages" in row or "conversations" in row:
            messages = messages_of(row, where)
            users = tuple(message["content"] for message in messages if message["role"] == "user")
            if not users:
                raise InputError(f"{where}: has no message of a user")
            found.append(Asked(messages[:1] if messages[0]["role"] == "system" else (), users))
        else:
            raise InputError(f"{where}: has neither `turns` nor `messages`")
    if not found:
        raise InputError(f"{path}: holds no prompts")
    return found


def _check_folder(out: Path, tokens: int) -> None:
    """Raises `InputError` now rather than after the first conversation."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        there = out.stat().st_size if out.exists() else 0
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    needed = tokens * BYTES_PER_TOKEN + SPARE_BYTES - there
    if needed > free:
        raise InputError(
            f"--out {out}: {tokens:,} tokens take about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there"
        )


def _sha256(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
