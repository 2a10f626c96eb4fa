"""`spdbench project`: result files in, pipelines of other sizes and their opponents out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from spdbench.cli.files import require_free_output, result_paths, write_stdout, write_whole_file
from spdbench.cli.options import COUNT, OUTPUT, PATH, argument, complete_files, flag, option, takes
from spdbench.cli.terminal import start_quickly
from spdbench.console import say

if TYPE_CHECKING:
    from spdbench.judge.projection.costs import Costs
    from spdbench.judge.projection.project import Projection
    from spdbench.judge.projection.recorded import Recorded
    from spdbench.models.partition import HeadPlace


@dataclass(frozen=True, kw_only=True)
class ProjectOptions:
    """What is projected, onto what, and where it goes."""

    results: tuple[str, ...] = argument("RESULT...", nargs=-1, required=True, shell_complete=complete_files)
    stages: str = option(
        "--stages", None, "N,...", "Pipelines: numbers of stages, or the layers of each stage, 11/10/9.", required=True
    )
    profile: Path | None = option(
        "--profile", PATH, "FILE", "Costs of a device, from `spdbench profile`. Default: what the results recorded."
    )
    balanced: bool = flag("--balanced", "Numbers of stages mean stages of equal time (stage_layers=auto), not layers.")
    shared_drafter: bool = flag("--shared-drafter", "The drafter shares the first stage's device; else it has its own.")
    head: str = option(
        "--head",
        click.Choice(("last_stage", "drafter", "split")),
        None,
        "Where the output head runs; split is half of the vocabulary in each.",
        "last_stage",
    )
    concurrency: int = option(
        "--concurrency", COUNT, "N", "Also all ways to decode under 1, 2, 4, ... N requests; needs --profile.", 1
    )
    as_json: bool = flag("--json", "Print JSON with everything.")
    chart: Path | None = option("--chart", OUTPUT, "FILE", "Also draw a chart: .svg, .png or .pdf.")
    report: Path | None = option("--report", OUTPUT, "FILE", "Also write an HTML page: verdict, charts, all tables.")
    force: bool = flag("--force", "Replace a chart or a page that is there already.")

    @property
    def words(self) -> list[str]:
        """The command, without what it writes."""
        pairs = (("--stages", self.stages), ("--profile", self.profile), ("--head", self.head))
        found = ["spdbench", "project", *self.results]
        found += [str(word) for pair in pairs if pair[1] not in (None, "last_stage") for word in pair]
        found += ["--balanced"] * self.balanced + ["--shared-drafter"] * self.shared_drafter
        return found + (["--concurrency", str(self.concurrency)] if self.concurrency > 1 else [])


@click.command("project", short_help="Project results to a pipeline of n devices.")
@takes(ProjectOptions)
def command(options: ProjectOptions) -> None:
    """Project results to a pipeline of n devices, next to what else these devices could do.

    RESULT is a result file, a pattern, a folder of results or a report, all of one suite, model and dtype; one of them
    of a pipeline, whose verdicts are replayed in a simulated pipeline of each size. Without --profile a device is what
    ran vanilla.
    """
    start_quickly()
    from rich.console import Console

    from spdbench.judge.loaded import read_results
    from spdbench.judge.projection.project import Setting, parse_stages, project
    from spdbench.judge.projection.recorded import sort_results
    from spdbench.models.partition import DRAFTERS_SHARE
    from spdbench.render.projection import to_json, to_terminal

    paths = list(result_paths(options.results))
    for name, path in (("--chart", options.chart), ("--report", options.report)):
        if path is not None:
            _check_output(name, path, paths, force=options.force)
    recorded = sort_results(read_results(paths))
    costs = _costs(recorded, options.profile)
    stages = parse_stages(options.stages, recorded.num_layers, _splitter(recorded, costs, balanced=options.balanced))
    drafters_head = DRAFTERS_SHARE[cast("HeadPlace", options.head)]
    setting = Setting(stages, not options.shared_drafter, drafters_head, options.concurrency)
    found = project(recorded, costs, setting)
    write_stdout(to_json(found) if options.as_json else to_terminal(found, Console(file=sys.stdout)))
    if options.chart is not None:
        _draw(found, options.chart)
    if options.report is not None:
        _report(found, recorded, options, paths)


def _costs(recorded: Recorded, path: Path | None) -> Costs:
    """Of the profile in `path`, which has to be of the results' model; else what the results recorded.

    Raises:
        InputError: the profile cannot be read, or is of another model or dtype.
    """
    from spdbench.judge.projection.costs import ProfileCosts, RecordedCosts
    from spdbench.profiles.profile import read_profile, require_model

    if path is None:
        return RecordedCosts(recorded)
    profile, model = read_profile(path), recorded.first.head.model
    require_model(profile, str(path), model.sha256, model.dtype, model.num_layers, model.id)
    return ProfileCosts(profile, recorded)


def _splitter(recorded: Recorded, costs: Costs, *, balanced: bool) -> Callable[[int], list[int]]:
    """How a number of stages becomes layer counts: as even as possible, or stages of equal time."""
    from spdbench.judge.projection.project import even_layers
    from spdbench.models.partition import split_by_cost

    layer_s, head_s = costs.layer_s(1), costs.head_s(1)
    if not balanced or layer_s is None or head_s is None:
        return lambda stages: even_layers(recorded.num_layers, stages)

    def by_time(stages: int) -> list[int]:
        layers = split_by_cost([layer_s] * recorded.num_layers, [*[0.0] * (stages - 1), head_s])
        return [len(each) for each in layers]

    return by_time


def _check_output(name: str, path: Path, inputs: list[Path], *, force: bool) -> None:
    from spdbench.render.report import vega

    require_free_output(path, inputs, force=force, option=name)
    if name == "--chart":
        vega.format_of(name, path)
    vega.vl_convert()


def _report(projection: Projection, recorded: Recorded, options: ProjectOptions, paths: list[Path]) -> None:
    from spdbench.cli.reading.report import small_sources
    from spdbench.render.columns import model_as_asked
    from spdbench.render.report.projection import to_html

    assert options.report is not None
    head = recorded.first.head
    title = f"{head.suite.name} v{head.suite.version} | {model_as_asked(head)} | projected"
    page = to_html(projection, title, small_sources(paths), shlex.join(options.words))
    write_whole_file("--report", options.report, page.encode())
    say(f"Wrote {options.report}")


def _draw(projection: Projection, path: Path) -> None:
    from spdbench.render.report import vega
    from spdbench.render.report.projection import CHART
    from spdbench.render.report.style import LIGHT

    form = vega.format_of("--chart", path)
    write_whole_file("--chart", path, vega.to_file(CHART, CHART.make(projection, LIGHT), form, "screen"))
    say(f"Wrote {path}")
