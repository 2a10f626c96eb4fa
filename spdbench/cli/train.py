"""`spdbench train`: parses words; what is to be done with them is `train_session`'s affair."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from spdbench.cli.interrupts import sigterm_interrupts
from spdbench.cli.model_options import FiniteRange, ModelOptions, model_options
from spdbench.cli.quantities import Duration, Size
from spdbench.errors import InputError


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
    "--batch-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens a forward, padded."
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
    from spdbench.cli.train_session import Wishes, train

    if chosen.drafters:
        raise InputError("--drafter: training makes a drafter, it takes none")
    with sigterm_interrupts():
        train(Wishes(**words), chosen, started, resume=resume)
