"""Fills a data file with conversations: batches in threads, progress, interruption, and when there is enough."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing

from spdbench.cli.distill.prompts import PromptConversation
from spdbench.cli.progress import DataProgress
from spdbench.cli.terminal import ignore_from_now_on, sigterm_interrupts
from spdbench.console import say
from spdbench.errors import SpdbenchError
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.training.datafile import DataFile
from spdbench.training.distill.batched import SingleSlot, Slots, slot_bytes
from spdbench.training.distill.continuous import Batch, results_of
from spdbench.training.distill.talk import Distiller, Dropped, Talk
from spdbench.training.space import GB, how_many_fit, require_memory

SECONDS_BETWEEN_SUMMARIES = 10.0
MAX_DROPPED_IN_A_ROW = 1000
"""So many conversations of the model's own dropped in a row mean that no more will be kept."""
SLOTS_A_PART = 32
"""A thread's smallest part of the conversations: weights are read once for all of a part."""
TOKENS_PER_SLOT = 100
"""Little data gets fewer slots, about one for each answer; with more, only the short answers would finish in time."""


def fill(
    file: DataFile,
    tokens: int,
    scripts: Iterator[Talk],
    slots: Sequence[Slots | SingleSlot],
    num_threads: int,
    *,
    endless: bool,
) -> None:
    """Adds conversations until there are enough tokens or no more prompts; `endless` if there are always more."""
    lock = threading.Lock()
    batches = [Batch(part, scripts, lock) for part in slots]
    stream = results_of(batches, num_threads)
    progress = DataProgress(tokens, file.num_tokens)
    written_before, seconds_before = file.num_written, file.seconds
    dropped_in_a_row = 0
    started = summed = time.monotonic()

    def count() -> tuple[int, int, int, int]:
        """Brings the file's counts up to date; returns those that progress shows."""
        written = sum(batch.num_written for batch in batches)
        file.num_written, file.seconds = written_before + written, seconds_before + time.monotonic() - started
        return file.num_tokens, written, file.num_conversations, file.dropped.total()

    with sigterm_interrupts():
        try:
            with progress, closing(stream) as outcomes:
                for outcome in outcomes:
                    if outcome is not None:
                        file.add(outcome)
                        dropped_in_a_row = dropped_in_a_row + 1 if isinstance(outcome, Dropped) else 0
                    progress.update(*count())
                    if endless and dropped_in_a_row == MAX_DROPPED_IN_A_ROW:
                        file.write_summary(complete=False)
                        raise SpdbenchError(
                            f"{MAX_DROPPED_IN_A_ROW:,} conversations in a row were dropped: {_reasons(file.dropped)}"
                        )
                    if time.monotonic() - summed > SECONDS_BETWEEN_SUMMARIES:
                        summed = time.monotonic()
                        file.write_summary(complete=False)
                    if file.num_tokens >= tokens:
                        break
        except KeyboardInterrupt:
            ignore_from_now_on()
            count()
            file.write_summary(complete=False)
            say(f"{file.num_tokens:,} tokens are kept; the same command goes on from there.")
            raise
        counts = count()
        file.write_summary(complete=True)
    say(progress.words(*counts))


def begun_within(seconds: float | None, conversations: Iterator[Talk]) -> Iterator[Talk]:
    """The conversations that are asked for in time; all of them where `seconds` is None."""
    end = math.inf if seconds is None else time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, conversations)


def report_end(file: DataFile, tokens: int, budget: float | None) -> None:
    if file.num_tokens < tokens:
        over = "All prompts are used up" if budget is None else "Time or prompts are used up"
        say(f"{over}, {tokens - file.num_tokens:,} tokens before the end.")
    dropped, cut = _reasons(file.dropped), _reasons(file.cut_short)
    say(f"{file.path}: {file.num_tokens:,} tokens (dropped: {dropped}; cut short: {cut})")


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()) or "nothing"


def require_slot(decoder: TargetDecoder, room: int) -> None:
    """Raises `InputError` where the memory that is free does not hold a single conversation of `room` tokens."""
    remedy = "Give a smaller --max-new-tokens, shorter --prompts or a smaller model."
    require_memory(slot_bytes(decoder, room), decoder.device, f"a conversation of {room:,} tokens", remedy)


def new_slots(
    decoder: TargetDecoder, batch: int, tokens: int, room: int, num_threads: int
) -> list[Slots] | list[SingleSlot]:
    """Room for `batch` conversations, fewer for little data or memory: on a CPU one part for each of a few threads. For
    one where the layers are transformers'."""
    if not isinstance(decoder, Decoder):
        say("NOTE: transformers' layers serve, one conversation at a time; --batch has no effect.")
        return [SingleSlot(decoder, room)]
    wanted, each = min(batch, max(1, tokens // TOKENS_PER_SLOT)), slot_bytes(decoder, room)
    num_slots = how_many_fit(each, wanted, decoder.device)
    if num_slots < wanted:
        say(
            f"NOTE: {num_slots} conversations at a time, not {wanted}: no more fit in the free memory. Room for "
            f"{room:,} tokens, which the longest may come to, takes {each / GB:.3f} GB."
        )
    num_parts = max(1, min(num_threads, num_slots // SLOTS_A_PART)) if decoder.device.type == "cpu" else 1
    return [Slots(decoder, num_slots // num_parts + (i < num_slots % num_parts), room) for i in range(num_parts)]


def new_conversations(distiller: Distiller, prompts: list[PromptConversation] | None, file: DataFile) -> Iterator[Talk]:
    """Conversations that are not in the file yet: new ones without end, or those of the prompts that are left."""
    done = {kept.index for kept in file.found}
    if prompts is None:
        index = max(done, default=-1)
        while True:
            index += 1
            yield distiller.invent(index)
    file.dropped.clear()  # those that were dropped are gone through again
    for index, one in enumerate(prompts):
        if index not in done:
            yield distiller.reply(index, one.system, one.turns)
