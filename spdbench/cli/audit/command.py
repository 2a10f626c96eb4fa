"""`spdbench audit`: checks all that can be checked before weights are loaded, then hands over to a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from spdbench.cli.completion import complete_backends
from spdbench.cli.files import require_replaceable
from spdbench.cli.options import COUNT, option, parse_labels, takes
from spdbench.cli.run.workload import SuiteOptions, choose_target, make_workload
from spdbench.errors import InputError
from spdbench.prompts.suite import load_suite

REFERENCE = "vanilla"


@dataclass(frozen=True, kw_only=True)
class AuditOptions(SuiteOptions):
    """What `audit` checks, and how thoroughly."""

    backends: tuple[str, ...] = option(
        "-b --backend",
        None,
        "[LABEL=]BACKEND",
        "What to audit. May be repeated.",
        multiple=True,
        shell_complete=complete_backends,
        required=True,
    )
    draws: int = option("--draws", COUNT, "N", "With a temperature: sampled answers for each prompt.", 200)
    json_file: Path | None = option(
        "--json", click.Path(path_type=Path, dir_okay=False), "FILE", "Write everything as JSON as well."
    )


@click.command("audit", short_help="Check that backends give the target's own outputs.")
@takes(AuditOptions)
def command(options: AuditOptions) -> None:
    """Check that backends are lossless: that they give what plain decoding gives.

    Greedy, every first divergence is shown with both logits and explained: a tie, rounding, or a real difference. With
    a temperature, sampled answers are tested against the target's exact distribution. Exit codes: 0 lossless; 1 a real
    difference or a fault; 3 where it cannot be known.
    """
    from spdbench.cli.audit.session import AuditSession
    from spdbench.cli.setup import chat_format, find_backends, find_devices
    from spdbench.render.audit import SCHEMA

    if options.json_file is not None:
        require_replaceable("--json", options.json_file, SCHEMA)
    labels = parse_labels(options.backends)
    audited = dict(labels)
    if REFERENCE not in labels.values():
        labels = {_free_label(audited): REFERENCE, **labels}
    elif len(labels) == 1:
        raise InputError(f"-b {options.backends[0]}: is what others are audited against; name another backend as well")
    specs = find_backends(labels, options)
    specs.sort(key=lambda spec: spec.name != REFERENCE)  # its answers are the context of all
    suite = load_suite(options.suite, options.data, may_run_code=False)
    devices = find_devices(options)
    target = choose_target(suite, options, devices[0], specs)
    assert target is not None  # `vanilla` needs one
    chat = chat_format(target, options)
    workload = make_workload(suite, options, target, chat, specs)
    session = AuditSession(options, suite, workload, chat, target, devices, specs)
    click.get_current_context().exit(session.run())


def _free_label(taken: dict[str, str]) -> str:
    return REFERENCE if REFERENCE not in taken else f"{REFERENCE}-reference"
