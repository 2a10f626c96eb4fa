"""`spdbench lm-eval`: lm-eval's own command line, with our backends among its models."""

from __future__ import annotations

import sys
import traceback

import click

from spdbench.cli.evaluate.lm_tasks import input_error_in, quiet_git, require_lm_eval, run_code_in_sandbox
from spdbench.cli.terminal import sigterm_interrupts
from spdbench.errors import InputError, brief

ENGINE = ("spdbench_backends", "spdbench.models", "spdbench.decoding", "spdbench.pipeline")
"""Packages in which an error is a bug, not the user's input."""

MODULE = "spdbench.cli.evaluate.lm_model"
CONFIRMED = "--confirm_run_unsafe_code"


@click.command(
    "lm-eval",
    short_help="lm-eval's own command line, with our backends.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", metavar="ARGS...", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """lm-eval's own command line, with all its options; `--model spdbench` is any of our backends.

    spdbench lm-eval run --model spdbench --model_args backend=spd,model=smollm2 --tasks gsm8k
    """
    require_lm_eval()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    _register()
    if arguments[:1] != ("ls",) and not {"-h", "--help"}.intersection(arguments):
        run_code_in_sandbox(allowed=CONFIRMED in arguments)
        quiet_git()
    before, sys.argv = sys.argv, ["spdbench lm-eval", *arguments]
    try:
        with sigterm_interrupts():
            harness = HarnessCLI()
            harness.execute(harness.parse_args())
    except Exception as error:
        if (found := input_error_in(error)) is not None:
            raise found from None
        if _is_ours(error):
            raise
        raise InputError(f"lm-eval: {brief(error).rstrip('.')}. {_remedy(str(error))}") from None
    finally:
        sys.argv = before
        if MODULE in sys.modules:
            sys.modules[MODULE].SpdbenchLM.close_all()


def _register() -> None:
    """Adds our model to lm-eval's registry; it is imported when it is used."""
    import lm_eval.models  # noqa: F401 - fills the registry with lm-eval's models, which it does only while it is empty
    from lm_eval.api.registry import model_registry

    if "spdbench" not in model_registry:
        model_registry.register("spdbench", target=f"{MODULE}:SpdbenchLM")


def _remedy(message: str) -> str:
    if "unsafe" in message:
        return f"{CONFIRMED} lets it, each answer in a sandbox of its own."
    if message.startswith("Tasks not found"):
        return "`spdbench lm-eval ls tasks` lists them; --include_path DIR names a folder of more task files."
    return (
        "If it is the task's data, that may need the network: run it once where there is one, or name a folder of task "
        "files over local JSONL with --include_path DIR."
    )


def _is_ours(error: Exception) -> bool:
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith(ENGINE) for name in frames)
