"""`spdbench profile`: what each part of decoding a model costs on a device, measured or computed from its datasheet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import require_free_output, write_stdout, write_whole_file
from spdbench.cli.options import OUTPUT, TargetOptions, flag, option, takes
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.profiles.datasheet import DEVICES, Sizes, computed_seconds

if TYPE_CHECKING:
    from spdbench.models.target import Target
    from spdbench.profiles.profile import Profile

MS = 1e3


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(TargetOptions):
    """What is profiled, and where the profile goes."""

    datasheet: str | None = option(
        "--from", click.Choice([*DEVICES]), None, "Compute from this device's datasheet instead of measuring here."
    )
    out: Path | None = option(
        "-o --out", OUTPUT, "FILE", "Where to write it. What was measured is kept in the cache too."
    )
    force: bool = flag("--force", "Replace a file that is there already.")


@click.command("profile", short_help="Measure what each part of decoding costs on a device.")
@takes(ProfileOptions)
def command(options: ProfileOptions) -> None:
    """Measure what each part of decoding costs on a device: layers by rows and context, output head, drafts of the
    installed drafters, verdicts, messages between processes.

    The profile is kept in the cache. `eagle.tree=auto` and other choices by cost read it there, and measure what is
    missing once. With --from nothing is measured and nothing kept: the profile is computed and goes to -o or stdout.
    """
    if options.out is not None:
        require_free_output(options.out, [], force=options.force)
    from spdbench.cli.setup import find_devices, load_model

    if options.datasheet is not None:
        profile = _computed(load_model(options, "cpu"), options.datasheet)
    else:
        devices = find_devices(options)
        profile = _measured(load_model(options, devices[0]), devices, options.threads)
        say(f"Kept for runs on this machine: {profile.model.id}, {profile.model.dtype}, {len(profile.seconds)} costs")
    if options.out is not None:
        write_whole_file("-o", options.out, profile.to_json().encode())
        say(f"Wrote {options.out}")
    write_stdout(profile.to_json() if options.datasheet and options.out is None else _summary(profile))


def _measured(target: Target, devices: tuple[str, ...], threads: int) -> Profile:
    from spdbench.decoding.stored_costs import StoredCosts
    from spdbench.pipeline.profiling import control_seconds, message_seconds, target_seconds

    say(f"Measuring {target.files.id} on {', '.join(devices)}; other programs make the times longer ...")
    decoder, stored = target.decoder, StoredCosts(target, threads)
    found = target_seconds(decoder) | control_seconds(decoder) | message_seconds(decoder, devices)
    stored.forget()
    stored.seconds(list(found), lambda: list(found.values()))
    for label, options in _drafting_backends(target):
        _measure_drafter(target, devices, threads, label, options)
    return stored.read()


def _drafting_backends(target: Target) -> Iterator[tuple[str, dict[str, str]]]:
    """Backends whose drafters have costs, with their options: each pipelined one with every number of stages."""
    from spdbench.cli.project.drafter_sizes import PIPELINE_METHODS, TREE_METHODS

    for name in TREE_METHODS:
        yield name, {}
    for name in PIPELINE_METHODS:
        for stages in range(2, target.config.num_layers + 1):
            yield name, {"stages": str(stages), "executor": "inline"}


def _measure_drafter(
    target: Target, devices: tuple[str, ...], threads: int, name: str, options: dict[str, str]
) -> None:
    """Has the backend `name` measure what its choices read; nothing where no drafter is installed."""
    from spdbench.backend import BackendContext, find_backend, parse_options

    backend = find_backend(name)
    with suppress(InputError):  # no trained drafter for this model, or none of so many stages, or they are not equal
        made = backend(
            parse_options(name, backend.Options, options), BackendContext(name, target, "auto", devices, threads, 0)
        )
        try:
            made.load()
            if (measure := getattr(made, "measure_costs", None)) is not None:
                measure()
        finally:
            made.close()


def _computed(target: Target, name: str) -> Profile:
    from datetime import UTC, datetime

    from spdbench.cli.project.drafter_sizes import drafter_sizes
    from spdbench.profiles.profile import ModelShape, Profile

    config, sizes, device = target.config, _sizes(target), DEVICES[name]
    return Profile(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        origin="computed",
        device=device.name,
        machine=name,
        threads=0,
        model=ModelShape(
            id=target.files.id,
            sha256=target.files.sha256,
            dtype=target.dtype_name,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
        ),
        seconds=computed_seconds(device, sizes, tuple(drafter_sizes(target, sizes))),
    )


def _sizes(target: Target) -> Sizes:
    """What a forward of `target` reads. Of a model on transformers' layers keys, values and states are unknown, and
    count as none, and all experts count as read."""
    config, itemsize = target.config, target.dtype.itemsize
    head = config.vocab_size * config.hidden_size * itemsize
    ends = head if getattr(config, "tied", True) else 2 * head
    kv_width = 2 * getattr(config, "num_kv_heads", 0) * getattr(config, "head_dim", 0)
    recurrent, experts = getattr(config, "recurrent", None), getattr(config, "experts", None)
    share = len(recurrent.layers) / config.num_layers if recurrent else 0.0
    return Sizes(
        layer=(target.num_bytes - ends) / config.num_layers,
        head=head,
        kv=(1 - share) * kv_width * itemsize,
        row=config.hidden_size * itemsize,
        itemsize=itemsize,
        state=share * recurrent.state_bytes(itemsize) if recurrent else 0.0,
        experts=experts.parameters(config.hidden_size) * itemsize / config.num_layers if experts else 0.0,
        routed=experts.per_token / experts.count if experts and experts.count else 1.0,
    )


def _summary(profile: Profile) -> str:
    """A table of the costs of one row."""
    from rich.console import Console

    from spdbench.render.columns import capture, plain_grid

    grid = plain_grid((("part", False), ("ms", True)))
    for key, seconds in profile.seconds.items():
        if " rows=" not in key or key.endswith("rows=1"):
            grid.add_row(key, f"{MS * seconds:.4f}")
    title = f"{profile.model.id} | {profile.model.dtype} | {profile.device} | {profile.origin}"
    return capture(Console(), title, grid)
