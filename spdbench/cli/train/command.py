"""`spdbench train`: options and hand-over to a session."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click

from spdbench.cli.completion import complete_methods
from spdbench.cli.options import (
    COUNT,
    DURATION,
    FOLDER,
    PATH,
    POSITIVE,
    SIZE,
    WHOLE,
    FiniteRange,
    TargetOptions,
    argument,
    flag,
    keyed,
    option,
    takes,
)
from spdbench.cli.parameters import KEY_VALUE
from spdbench.cli.terminal import sigterm_interrupts

SHARE = FiniteRange(min=0, max=1, min_open=True, max_open=True)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TargetOptions):
    """What `train` makes, from what, and how."""

    method: str = argument("METHOD", shell_complete=complete_methods)
    data: Path = option("--data", PATH, "FILE", "Conversations, one JSON a line.", required=True)
    out: Path = option("--out", FOLDER, "DIR", "Where it goes.", required=True)
    stages: int | None = option("--stages", COUNT, "N", "Of spd and ppsd: pipeline stages that it is to draft for.")
    budget: float | None = option("--budget", DURATION, "TIME", "End after so long, all included: 90s, 20m, 1h30m.")
    epochs: float | None = option(
        "--epochs", POSITIVE, "N", "Rounds over the data. [default: 3; as many as --budget allows]"
    )
    layout: str = option(
        "--format", None, "NAME", "Layout of the files: spdbench, or one that the method published.", "spdbench"
    )
    lr: float = option("--lr", POSITIVE, None, "Learning rate.", 1e-3)
    options: tuple[str, ...] = keyed("-o", "KEY=VALUE", "An option of the method.", KEY_VALUE)
    seed: int = option("--seed", WHOLE, None, "Of first weights, the order of the data, and what is held out.", 0)
    batch_tokens: int = option("--batch-tokens", COUNT, None, "Tokens a forward, padded.", 512)
    accumulate: int = option("--accumulate", COUNT, None, "Forwards a step.", 1)
    held_out: float | None = option(
        "--held-out", SHARE, "SHARE", "Of the conversations, never learned from. [default: 0.05, at most 20,000 tokens]"
    )
    draft_vocab: int = option("--draft-vocab", COUNT, None, "Tokens that can be drafted.", 8192)
    max_length: int = option("--max-length", click.IntRange(min=2), None, "Tokens of a conversation.", 1024)
    feature_cache: int | None = option(
        "--feature-cache",
        SIZE,
        "SIZE",
        "Disk for what the target computed; 0: compute it anew each time. [default: half of what is free]",
    )
    resume: bool = flag("--resume", "Go on with a run that was interrupted.")


@click.command("train", short_help="Train a drafter on conversations.")
@takes(TrainOptions)
def command(options: TrainOptions) -> None:
    """Train a drafter for a model on conversations, best those of the model itself (`spdbench distill`).

    METHOD is spd, ppsd, eagle3 or medusa; -o KEY=VALUE sets its options. DIR gets config.json, model.safetensors and
    train.jsonl, and is what --drafter takes.
    """
    started = time.monotonic()
    from spdbench.cli.train.session import train

    with sigterm_interrupts():
        train(options, started)
