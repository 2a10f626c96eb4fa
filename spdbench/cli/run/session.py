"""One run from loading to the comparison: backends are loaded, their journals become results.

Parses nothing and prints only what happened to files.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import click
from rich.console import Console

from spdbench.backend import Backend, check_before_load, concurrency_of
from spdbench.cli.files import keep_former, require_writable, result_path
from spdbench.cli.progress import waiting
from spdbench.cli.run.events import STDOUT, Events, Observers, Write, open_events
from spdbench.cli.run.live_view import LiveView, Screen, Tally
from spdbench.cli.run.loggers import RunLogger, log_results
from spdbench.cli.run.outputs import OutputComparer, compare_servers
from spdbench.cli.setup import BackendSpec, drafter_record, model_record
from spdbench.cli.terminal import ignore_from_now_on, sigterm_interrupts
from spdbench.console import counted, say
from spdbench.errors import BackendLostError, InputError, SpdbenchError
from spdbench.judge.comparison.compare import Table, compare
from spdbench.judge.loaded import LoadedResult, read_results
from spdbench.judge.results.schema import ModelInfo, Result, SuiteInfo, served_model
from spdbench.judge.score import Scorer
from spdbench.measure.assemble import ResultHead, reopened_journal, write_result
from spdbench.measure.energy import EnergyMeter, energy_meter, gpu_uuid
from spdbench.measure.environment import environment, git_state
from spdbench.measure.journal import Journal, create_journal, resume_journal
from spdbench.measure.machine_watch import MachineWatch
from spdbench.measure.privacy import names_only
from spdbench.measure.request_turn import Gauges, Workload
from spdbench.measure.runner import Candidate, Runner
from spdbench.models.target import Target
from spdbench.processors import is_elsewhere
from spdbench.prompts.chat import ChatFormat, PlainText
from spdbench.prompts.suite import Suite
from spdbench.render.table import render

if TYPE_CHECKING:
    from spdbench.cli.run.command import RunOptions


class Output(NamedTuple):
    """What one label's result is made of, and where it goes."""

    path: Path
    head: ResultHead
    journal: Journal


@dataclass(frozen=True)
class Session:
    """One run from loading to the comparison. `target` is None where only servers have the model. `levels` holds the
    backends for each number of requests at once, which are measured one after the other; most runs have one."""

    options: RunOptions
    suite: Suite
    workload: Workload
    chat: ChatFormat | PlainText
    target: Target | None
    devices: tuple[str, ...]
    levels: Sequence[Sequence[BackendSpec]]
    score: Scorer
    loggers: Mapping[str, RunLogger]

    def run(self, *, show: bool = True) -> list[LoadedResult]:
        """The results, in the order of levels and labels; with `show`, their comparison is printed.

        Raises:
            InputError: no result can be written.
        """
        require_writable(self.options.results)
        paths = [[self._path(spec) for spec in specs] for specs in self.levels]
        for path in chain(*paths):
            if os.path.isdir(path):
                raise InputError(f"{path}: is a folder, where a result file has to go")
        results: list[LoadedResult] = []
        with ExitStack() as stack:
            stack.enter_context(sigterm_interrupts())
            write_event = stack.enter_context(open_events(self.options.events))
            try:
                for specs, files in zip(self.levels, paths, strict=True):
                    results += self._measure(specs, files, write_event)
            except (KeyboardInterrupt, SpdbenchError):  # a server that fails at one level keeps those before it
                if results and show:
                    self._show(results)
                raise
        if show:
            self._show(results)
        if self.loggers:
            log_results(self.loggers, self._compared(results))
        return results

    def _path(self, spec: BackendSpec) -> Path:
        """Where the result of `spec` goes; of one of several levels, its name ends with it."""
        options, level = self.options, f"c{getattr(spec.options, 'concurrency', 1)}"
        name = "__".join(filter(None, [options.name, level if len(self.levels) > 1 else None])) or None
        return result_path(options.results, self.suite.name, spec.label, self.model.id, name)

    def _measure(
        self, specs: Sequence[BackendSpec], paths: Sequence[Path], write_event: Write | None
    ) -> list[LoadedResult]:
        """The results of one level, measured and written."""
        with ExitStack() as stack:
            made = [
                spec.make(self.target, self.devices, self.options.threads, self.workload.seed, self.chat)
                for spec in specs
            ]
            for backend in made:
                check_before_load(backend)
            backends = []
            for spec, backend in zip(specs, made, strict=True):
                backends.append(stack.enter_context(closing(backend)))
                with nullcontext() if self.options.quiet else waiting(f"Loading {spec.label} ..."):
                    backend.load()
            if self.target is not None and (reason := self.target.unsupported_reason) is not None:
                say(
                    f"NOTE: {reason} is not one that spdbench's own layers know; transformers' layers serve, which are "
                    "slower."
                )
            machine, git = self._environment
            watch = stack.enter_context(closing(_watch(backends)))
            outputs, candidates = [], []
            for spec, backend, path in zip(specs, backends, paths, strict=True):
                head = self._head(spec, backend, machine, git)
                journal = stack.enter_context(self._journal(path, spec, backend))
                outputs.append(Output(path, head, journal))
                candidates.append(Candidate(spec.label, backend, journal, _gauges(backend, watch)))
            total = len(self.workload.keys())
            tallies = [
                Tally(output.head.backend, total, len(output.journal), concurrency_of(backend))
                for output, backend in zip(outputs, backends, strict=True)
            ]
            view, events = LiveView(tallies, self._screen), Events(write_event, tallies)
            # Without a target there are no ids, and nothing is compared.
            compare_outputs = OutputComparer(cast(Target, self.target))
            observers = Observers(events, view)
            runner = Runner(self.workload, candidates, self.chat, compare_outputs, observers, self.score)
            with events:
                events.started(self.suite.name, self.model.id)
                try:
                    with view:
                        runner.run()
                    compare_servers(runner)
                except (KeyboardInterrupt, BackendLostError):
                    ignore_from_now_on()
                    _write_partial(outputs)
                    raise
                results = _write(outputs)
                events.ended(exit_code(results), list(paths))
            return results

    @cached_property
    def _environment(self) -> tuple[Mapping[str, Any], str | None]:
        """The machine and the state of spdbench's checkout, read once: results of one run are known by that."""
        return environment(self.devices[0]), git_state()

    @property
    def _screen(self) -> Screen | None:
        """Where events go to stdout, it may be the same terminal, so nothing is redrawn."""
        if self.options.quiet:
            return "nothing"
        return "lines" if self.options.events == STDOUT else None

    @cached_property
    def model(self) -> ModelInfo:
        """The results' record of the model; of one that only servers have, the names under which they serve it."""
        if self.target is not None:
            return model_record(self.target, self.chat)
        names = dict.fromkeys(str(getattr(spec.options, "model", None) or "served") for spec in self.levels[0])
        name = "+".join(names_only(list(names)))  # a server may call its model by its folder
        return served_model(name, self.chat.template_args)

    def _journal(self, result: Path, spec: BackendSpec, backend: Backend) -> Journal:
        """The journal to write to: with `--resume`, one that already holds what was finished."""
        identity = self._identity(spec, backend)
        path, resume = result.with_name(f"{result.stem}.journal.jsonl"), self.options.resume
        if resume and path.exists():
            journal = resume_journal(path, identity)
        elif resume and result.exists():
            journal = reopened_journal(result, path, identity)
        else:
            if path.exists():
                say(f"An unfinished run is set aside as {path.name}.old; --resume would have gone on with it.")
            journal = create_journal(path, datetime.now(UTC).isoformat(timespec="seconds"), identity)
            if resume:
                say(f"{spec.label}: nothing to resume, so this is a new run.")
        if again := len(journal.asked_again):
            say(f"{spec.label}: {counted(again, 'request')} that failed for reasons that may have passed: asked again.")
        if foreign := journal.offsets.keys() - self.workload.keys():
            journal.close()
            raise InputError(f"{path}: holds a request that is not in this run: {min(foreign)}")
        return journal

    def _identity(self, spec: BackendSpec, backend: Backend) -> dict[str, Any]:
        """The settings that a run must share with the one that it resumes."""
        workload, score, drafter = self.workload, self.score, backend.describe().drafter
        identity = {
            "suite": self.suite.name,
            "suite_sha256": self.suite.sha256,
            "num_prompts": len(workload.prompts),
            "prompts_sha256": _sha256([(prompt.id, prompt.turns, *prompt.context) for prompt in workload.prompts]),
            "model": self.model.id,
            "model_sha256": self.model.sha256,
            "dtype": self.model.dtype,
            **workload.decoding.model_dump(exclude={"eos_ids"}),
            "repeats": workload.repeats,
            "warmup": workload.warmup,
            "backend": spec.name,
            "options": names_only(spec.options.model_dump(mode="json")),
            "drafter": names_only(spec.drafter),
            "drafter_sha256": drafter.sha256 if drafter else None,
            "baseline": self.levels[0][0].label,
            "backends": [other.label for other in self.levels[0]],
            "devices": list(self.devices),
            "threads": self.options.threads,
            **({"template_args": self.chat.template_args} if self.chat.template_args else {}),
            **({"template_sha256": self.chat.template_sha256} if self.chat.template_name else {}),
            **{name: True for name in ("keep_spans", "keep_drafts") if getattr(workload, name)},
        }
        if score.judges is not None:  # what scores depend on
            identity["allow_code_execution"] = score.execute is not None
            identity["references_sha256"] = _sha256([prompt.reference for prompt in workload.prompts])
        return identity

    def _head(self, spec: BackendSpec, backend: Backend, machine: Mapping[str, Any], git: str | None) -> ResultHead:
        """All of a label's result but its runs."""
        suite, workload, score = self.suite, self.workload, self.suite.score
        return ResultHead(
            suite=SuiteInfo(
                name=suite.name,
                version=suite.version,
                sha256=suite.sha256,
                source=suite.source,
                num_prompts=len(workload.prompts),
                score=score if score is None or isinstance(score, str) else dict(score),
            ),
            decoding=workload.decoding,
            backend=spec.record(backend),
            model=self.model,
            drafter=drafter_record(backend),
            environment=machine,
            git=git,
            baseline=self.levels[0][0].label,
            labels=[other.label for other in self.levels[0]],
        )

    def _compared(self, results: Sequence[LoadedResult]) -> list[Table]:
        return compare(results)

    def _show(self, results: Sequence[LoadedResult]) -> None:
        table = render(self._compared(results), "table", Console(file=sys.stdout))
        click.echo(table, nl=False, err=self.options.events == STDOUT)


def _write(outputs: Sequence[Output]) -> list[LoadedResult]:
    """Makes results of finished journals, which are removed."""
    results = []
    for output in outputs:
        keep_former(output.path, cast(Result, output.head))
        results.append(write_result(*output))
        say(f"Wrote {output.path}")
    for output in outputs:  # only now: until every result is there, --resume can still make them all
        output.journal.remove()
    return results


def _sha256(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _write_partial(outputs: Sequence[Output]) -> None:
    """On interruption, writes what is finished, but never in place of an older run's result."""
    for path, head, journal in outputs:
        if len(journal) and (not path.exists() or _created(path) == journal.created):
            write_result(path, head, journal)
    say(f"{sum(len(output.journal) for output in outputs)} finished requests are kept; --resume goes on from there.")


def _watch(backends: Sequence[Backend]) -> MachineWatch:
    """The watch of this machine, and of the GPUs that any of the backends use."""
    devices = dict.fromkeys(device for backend in backends for device in backend.describe().known_devices or ())
    here = [device for device in devices if device.startswith("cuda") and not is_elsewhere(device)]
    return MachineWatch([gpu_uuid(device) for device in here])


def _gauges(backend: Backend, watch: MachineWatch) -> Gauges:
    """The energy counters of the backend's devices, and `watch`; nothing where the devices are unknown, as those of a
    server: it may be on another machine, or be the program that keeps this one busy."""
    devices = backend.describe().known_devices
    return Gauges(EnergyMeter()) if devices is None else Gauges(energy_meter(devices), watch)


def exit_code(results: Sequence[LoadedResult]) -> int:
    """1 if a prompt failed or an output differs from vanilla's without excuse."""
    return 1 if any(map(_went_wrong, results)) else 0


def _went_wrong(result: LoadedResult) -> bool:
    """True if a prompt failed, or an output differs from vanilla's without excuse."""
    divergence = result.head.divergence
    return bool(result.metrics["num_failed"] or (divergence and divergence.real))


def _created(result: Path) -> str | None:
    """When the run of a result began; None where that cannot be read."""
    try:
        return read_results([result])[0].head.created
    except InputError:
        return None
