"""`spdbench trace`: a result in, a trace of its runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdbench.cli.files import require_free_output, write_whole_file
from spdbench.cli.options import OUTPUT, PATH
from spdbench.cli.parameters import Argument, Option
from spdbench.console import say
from spdbench.errors import InputError

if TYPE_CHECKING:
    from spdbench.judge.results.schema import Result, Run


@click.command("trace", short_help="Write what every lane did as a trace for Perfetto.")
@click.argument("result", cls=Argument, metavar="RESULT", type=PATH)
@click.option(
    "-o",
    "--out",
    cls=Option,
    type=OUTPUT,
    metavar="FILE",
    default=Path("trace.json"),
    show_default=True,
    help="Where to write.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there already.")
def command(result: Path, out: Path, force: bool) -> None:
    """Write what every lane did as a trace, to be opened in ui.perfetto.dev or chrome://tracing.

    RESULT is a result of `spdbench run --trace`. The trace has a track for each stage, the drafter and the host, one
    for requests and their steps, and counters for the fill of a pipeline and for acceptance. A span that ends after
    another one of its track in which it begins is cut there: its slices have the same `span` and a `piece` each.
    """
    require_free_output(out, [result], force=force)
    from spdbench.render.trace import to_json, trace_events

    head, runs = read_kept(result)
    text = find_text(head)
    try:
        content = to_json(trace_events(head, _with_spans(result, head, runs), text))
    except ValueError as error:
        raise InputError(f"{result}: {error}") from None
    write_whole_file("-o", out, content)
    say(f"Wrote {out}: open it in https://ui.perfetto.dev")


def read_kept(path: Path) -> tuple[Result, Iterator[Run]]:
    """A result's head, and its runs with all that they keep, one by one.

    Raises:
        InputError: it cannot be read, is not a result, or is a report.
    """
    from spdbench.judge.results.embedded import is_report
    from spdbench.judge.results.reader import reread
    from spdbench.judge.results.schema import Run

    if is_report(path):
        raise InputError(f"{path}: is a report; name one of the result files that it was made of")
    head, lines = reread(path)
    return head, (Run.model_validate_json(line) for _, line in lines)


def find_text(head: Result) -> Callable[[Sequence[int]], str]:
    """What shows ids: their text, else the numbers where no cache holds the model's tokenizer."""
    from spdbench.models.checkpoints.tokenizer_files import find_decoder

    decode = find_decoder(head.model.id, head.model.tokenizer_sha256, head.model.sha256)

    def text(ids: Sequence[int]) -> str:
        return (decode(ids) if decode else "") or "".join(f"<{token}>" for token in ids)

    return text


def _with_spans(path: Path, head: Result, runs: Iterator[Run]) -> Iterator[Run]:
    """The runs, all of which have to hold spans.

    Raises:
        InputError: it was made without `--trace`, or by a backend that records no spans.
    """
    num_spans = 0
    for run in runs:
        if run.finish_reason == "error":
            continue
        if run.spans is None:
            raise InputError(f"{path}: holds no spans; measure again with `spdbench run --trace`")
        num_spans += len(run.spans.lane)
        yield run
    if head.backend.kind != "pipeline" and not num_spans:
        raise InputError(
            f"{path}: {head.backend.label} records no spans, as do plain decoding and servers; trace a backend that "
            "drafts or a pipeline"
        )
