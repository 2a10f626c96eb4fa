"""A command under torchrun: rank 0 runs it once all other ranks are there; these host stages, and print nothing.

torchrun ends all ranks of a node as soon as one of them fails, so rank 0 may hear of another rank's end and of
torchrun's signal in either order. In both cases the lost rank is named.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import click

from spdbench.cli.main import INTERRUPTED, TERMINATED, run
from spdbench.errors import SpdbenchError
from spdbench.pipeline.ranks.host import serve
from spdbench.pipeline.ranks.job import JOIN_S, Job, job_of_environment
from spdbench.pipeline.ranks.remote import join, set_joined
from spdbench.processors import die_with


def run_rank(args: Sequence[str], limit_s: float = JOIN_S) -> int:
    """This rank's part of one command line; its exit code. `limit_s` is how long ranks wait for each other."""
    try:
        job = job_of_environment()
        assert job is not None
        if job.rank:
            die_with(os.getppid())
            return serve(job, limit_s)
        die_with(os.getppid(), signal.SIGTERM)  # so that what is finished is written
        return _run_first(args, job, limit_s)
    except SpdbenchError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code


def _run_first(args: Sequence[str], job: Job, limit_s: float) -> int:
    ranks = join(job, limit_s)
    set_joined(ranks)
    code = SpdbenchError.exit_code  # of a bug, too
    try:
        code = run(args)
        if code in (INTERRUPTED, TERMINATED) and (lost := ranks.lost()):
            click.echo(f"Error: {', '.join(lost)} ended; torchrun reports how.", err=True)
            code = SpdbenchError.exit_code
        return code
    finally:
        set_joined(None)
        ranks.close(code)
