"""`spdbench distill`: the target writes training data by itself, or answers prompts from a file.

Checks and wires; conversations, batching and the file are in `spdbench.training`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench import __version__
from spdbench.cli.distill.prompts import (
    PromptConversation,
    excluded,
    read_conversations_to_answer,
    room_needed,
    taken_by_template,
)
from spdbench.cli.options import COUNT, DURATION, PATH, WHOLE, TargetOptions, option, takes
from spdbench.console import say
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.models.target import Target
    from spdbench.prompts.chat import ChatFormat
    from spdbench.training.distill.talk import Distiller

BYTES_PER_TOKEN = 10
"""Of the file for each token kept: some four letters of the answer, and the user's share."""
SPARE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TargetOptions):
    """What `distill` makes, and how."""

    out: Path = option("--out", PATH, "FILE", "The JSONL file to write.", required=True)
    tokens: int = option("--tokens", COUNT, "N", "Answer tokens to keep.", 500_000)
    budget: float | None = option(
        "--budget", DURATION, "TIME", "Begin no conversation after so long: 90s, 20m; those under way are finished."
    )
    prompts: Path | None = option(
        "--prompts",
        PATH,
        "FILE",
        "Answer these: JSONL with `turns` or `messages`. [default: the model writes user turns]",
    )
    exclude: tuple[Path, ...] = option(
        "--exclude",
        PATH,
        "PATH",
        "Prompts to keep out, JSONL or a folder of it, in addition to those of the shipped suites.",
        multiple=True,
    )
    data: Path | None = option("--data", PATH, "DIR", "Where the suites' files lie, to keep out.")
    max_new_tokens: int = option("--max-new-tokens", click.IntRange(min=8), "N", "Limit of each answer.", 256)
    batch: int = option("--batch", click.IntRange(1, 1024), "N", "Conversations at a time.", 128)
    seed: int = option("--seed", WHOLE, "S", None, 0)


@click.command("distill", short_help="Let the target write training data by itself.")
@takes(DistillOptions)
def command(options: DistillOptions) -> None:
    """Let the target write conversations to train drafters on, or answer prompts from a file.

    What is finished is in the file at once; the same command goes on after an interruption.
    """
    from spdbench.cli.distill.filling import begun_within, fill, new_conversations, new_slots, report_end, require_slot
    from spdbench.models.checkpoints.config import ModelConfig
    from spdbench.prompts.suite import shipped_suites
    from spdbench.training.datafile import open_data

    out, tokens, threads = options.out, options.tokens, options.threads
    _check_out(out, tokens)
    prompts = None if options.prompts is None else read_conversations_to_answer(options.prompts)
    kept_out = excluded(options.exclude, options.data)
    if missing := [name for name in shipped_suites() if name not in kept_out]:
        say(
            f"NOTE: no prompts of {', '.join(missing)} are at hand, so only --exclude keeps them out. --data DIR says "
            "where they lie, `spdbench suites` names their files."
        )
    target = _target(options)
    decoder = target.decoder
    if isinstance(target.config, ModelConfig) and target.config.recurrent is not None:
        raise InputError(
            f"-m {target.files.id}: distill decodes many conversations in parallel, which recurrent layers "
            f"({target.config.family}) do not support. Use data that another model of its vocabulary wrote."
        )
    distiller, settings = _distiller(target, prompts, kept_out, options)
    require_slot(decoder, distiller.room)
    with open_data(out, settings) as file:
        for kept in file.found:
            distiller.seen.add(kept.messages)
        if file.num_conversations:
            say(f"{out}: goes on after {file.num_conversations:,} conversations, {file.num_tokens:,} tokens.")
        if file.num_tokens < tokens:
            slots = new_slots(decoder, options.batch, tokens - file.num_tokens, distiller.room, threads)
            conversations = begun_within(options.budget, new_conversations(distiller, prompts, file))
            fill(file, tokens, conversations, slots, threads, endless=prompts is None)
        report_end(file, tokens, options.budget)


def _distiller(
    target: Target,
    prompts: list[PromptConversation] | None,
    kept_out: Mapping[str, tuple[str, ...]],
    options: DistillOptions,
) -> tuple[Distiller, dict[str, Any]]:
    """What all conversations share, and the settings that the file's header records."""
    from spdbench.cli.setup import chat_format, report_joined
    from spdbench.judge.results.table import is_degenerate
    from spdbench.training.distill import talk
    from spdbench.training.distill.filters import Overlap, Seen

    chat = chat_format(target, options)
    if prompts is not None:
        prompts[:] = taken_by_template(chat, prompts)
        report_joined(chat, [one.system for one in prompts])
    room = room_needed(chat, prompts, options.max_new_tokens, target.config.max_positions)
    distiller = talk.Distiller(
        chat=chat,
        is_chat=chat.is_chat,
        eos_ids=target.eos_ids,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        room=room,
        overlap=Overlap(text for texts in kept_out.values() for text in texts),
        is_loop=is_degenerate,
        seen=Seen(),
    )
    return distiller, _header_settings(target, chat, prompts, kept_out, options)


def _header_settings(
    target: Target,
    chat: ChatFormat,
    prompts: list[PromptConversation] | None,
    kept_out: Mapping[str, tuple[str, ...]],
    options: DistillOptions,
) -> dict[str, Any]:
    """How the data is made, as the file's header records it."""
    from spdbench.training.distill import talk
    from spdbench.training.distill.continuous import TOP_K

    texts = repr(sorted(kept_out.items())).encode()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spdbench": __version__,
        "model": {"id": target.files.id, "sha256": target.files.sha256, "dtype": target.dtype_name},
        "template_sha256": chat.template_sha256,
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens,
        "sampling": {
            "greedy_share": 0.5,
            "temperatures": list(talk.ANSWER_TEMPERATURES),
            "top_p": talk.ANSWER_TOP_P,
            "top_k": TOP_K,
            "user": None if prompts else asdict(talk.USER_SAMPLING),
        },
        "excluded": {name: len(turns) for name, turns in kept_out.items()},
        "excluded_sha256": hashlib.sha256(texts).hexdigest(),
        "tokens": options.tokens,
        "batch": options.batch,
        "prompts_sha256": None if options.prompts is None else hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
        **({"template_args": chat.template_args} if chat.template_args else {}),
    }


def _target(options: DistillOptions) -> Target:
    from spdbench.cli.setup import find_one_device, load_model
    from spdbench.training.space import require_memory

    target = load_model(options, find_one_device(options, "makes the data"))
    require_memory(target.num_bytes, target.device, f"the model {target.files.id}", "Give a smaller model.")
    return target


def _check_out(out: Path, tokens: int) -> None:
    """Raises `InputError` where `tokens` tokens of data cannot be written to `out`."""
    if os.path.isdir(out):
        raise InputError(f"--out {out}: is a folder; give the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not out.is_file():
            raise InputError(f"--out {out}: is no regular file; give the name of a file")
        free = shutil.disk_usage(out.parent).free
        there = out.stat().st_size if out.exists() else 0
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    needed = tokens * BYTES_PER_TOKEN + SPARE_BYTES - there
    if needed > free:
        raise InputError(
            f"--out {out}: {tokens:,} tokens take about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there"
        )
