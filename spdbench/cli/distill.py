"""`spdbench distill`: has the target write training data by itself, or answer prompts from a file.

Parses, checks and wires; conversations, batching and the file are `spdbench.training`'s.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdbench import __version__
from spdbench.cli.distill_prompts import Asked, excluded, not_at_hand, read_asked, room_needed
from spdbench.cli.model_options import ModelOptions, target_options
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.models.target import Target
    from spdbench.training.distill.talk import Distiller

BYTES_PER_TOKEN = 10
"""Of the file for each token kept: some four letters of the answer, and the user's share."""
SPARE_BYTES = 2**20


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
    from spdbench.cli.distill_run import conversations, fill, new_slots, require_slot, say, say_end
    from spdbench.training.datafile import open_data

    _check_folder(out, tokens)
    asked = None if prompts_file is None else read_asked(prompts_file)
    kept_out = excluded(exclude, data)
    if missing := not_at_hand(kept_out):
        say(
            f"NOTE: no prompts of {', '.join(missing)} are at hand, so only --exclude keeps them out. --data DIR says "
            "where they lie, `spdbench suites` names their files."
        )
    target = _target(chosen)
    decoder = target.own_decoder
    distiller, header = _distiller(target, asked, kept_out, max_new_tokens, seed)
    require_slot(decoder, distiller.room)
    header |= {"tokens": tokens, "batch": batch, "prompts_sha256": _sha256(prompts_file)}
    with open_data(out, header) as file:
        for kept in file.found:
            distiller.seen.add(kept.messages)
        if file.num_conversations:
            say(f"{out}: goes on after {file.num_conversations:,} conversations, {file.num_tokens:,} tokens.")
        if file.num_tokens < tokens:
            slots = new_slots(decoder, batch, tokens - file.num_tokens, distiller.room, chosen.threads)
            talks = conversations(distiller, asked, file)
            fill(file, tokens, talks, slots, chosen.threads, endless=asked is None)
        say_end(file, tokens)


def _distiller(
    target: Target, asked: list[Asked] | None, kept_out: Mapping[str, tuple[str, ...]], max_new_tokens: int, seed: int
) -> tuple[Distiller, dict[str, Any]]:
    """What all conversations share, and what the file's header says of it."""
    from spdbench.cli.distill_run import say
    from spdbench.prompts.chat import ChatFormat
    from spdbench.training.distill import talk
    from spdbench.training.distill.continuous import TOP_K
    from spdbench.training.distill.filters import Overlap

    chat = ChatFormat(target.tokenizer)
    if not chat.is_chat:
        say("NOTE: this model has no chat template: user turns and answers are plain completions of each other.")
    room = room_needed(chat, asked, max_new_tokens, target.config.max_positions)
    distiller = talk.Distiller(
        chat=chat,
        is_chat=chat.is_chat,
        eos_ids=target.config.eos_ids,
        seed=seed,
        max_new_tokens=max_new_tokens,
        room=room,
        overlap=Overlap(text for texts in kept_out.values() for text in texts),
        seen=talk.Seen(),
    )
    texts = repr(sorted(kept_out.items())).encode()
    header = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spdbench": __version__,
        "model": {"id": target.files.id, "sha256": target.files.sha256, "dtype": target.dtype_name},
        "template_sha256": chat.template_sha256,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "sampling": {
            "greedy_share": 0.5,
            "temperatures": list(talk.ANSWER_TEMPERATURES),
            "top_p": talk.ANSWER_TOP_P,
            "top_k": TOP_K,
            "user": None if asked else asdict(talk.USER_SAMPLING),
        },
        "excluded": {name: len(prompts) for name, prompts in kept_out.items()},
        "excluded_sha256": hashlib.sha256(texts).hexdigest(),
    }
    return distiller, header


def _target(chosen: ModelOptions) -> Target:
    import torch

    from spdbench.models.target import load_target
    from spdbench.training.space import require_memory

    torch.set_num_threads(chosen.threads)
    devices = chosen.devices or (("cuda:0",) if torch.cuda.is_available() else ("cpu",))
    if len(devices) > 1:
        raise InputError(f"--devices {','.join(devices)}: one device makes the data; give one")
    target = load_target(chosen.model or "smollm2", chosen.dtype, devices[0])
    require_memory(target.num_bytes, target.device, f"the model {target.files.id}", "Give a smaller model.")
    return target


def _check_folder(out: Path, tokens: int) -> None:
    """Raises `InputError` now rather than after the first conversation."""
    if out.is_dir():
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


def _sha256(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
