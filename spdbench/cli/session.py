"""One run from loading to the comparison: specs become loaded backends with journals, journals become results.

Where harness and engine are wired together; parses nothing and prints only what happened to files.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from spdbench.backend import Backend, BackendContext, BackendOptions
from spdbench.cli.heads import result_head
from spdbench.cli.interrupts import ignore_from_now_on, sigterm_interrupts
from spdbench.cli.progress import progress_report
from spdbench.decoding.audit import classify_difference
from spdbench.errors import BackendLostError, InputError
from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import LoadedResult, read_results
from spdbench.judge.results.reader import reread
from spdbench.judge.results.schema import Result
from spdbench.judge.score import Scorer
from spdbench.measure.assemble import ResultHead, run_key, write_result
from spdbench.measure.energy import EnergyMeter, energy_meter
from spdbench.measure.environment import environment, git_state
from spdbench.measure.journal import Journal, create_journal, resume_journal
from spdbench.measure.privacy import names_only
from spdbench.measure.runner import Candidate, Runner, Workload
from spdbench.models.target import Target
from spdbench.prompts.chat import ChatFormat, PlainText
from spdbench.prompts.suite import Suite
from spdbench.render.table import render

NOBODY = Scorer(None)
"""Scores nothing."""


@dataclass(frozen=True)
class BackendSpec:
    """A backend as asked for: not loaded yet."""

    label: str
    name: str
    cls: type[Backend]
    options: BackendOptions
    drafter: str


@dataclass(frozen=True)
class Places:
    """Where one label's files lie."""

    result: Path
    journal: Path


@dataclass(frozen=True)
class Session:
    """One run from loading to the comparison."""

    suite: Suite
    workload: Workload
    chat: ChatFormat | PlainText
    target: Target
    devices: tuple[str, ...]
    threads: int
    specs: Sequence[BackendSpec]
    results: Path
    name: str | None
    score: Scorer = NOBODY

    def run(self, *, resume: bool) -> int:
        """The exit code: 1 if a prompt failed or an output is not vanilla's without excuse."""
        places = [self._places(spec.label) for spec in self.specs]
        _check_writable(self.results, places)
        with ExitStack() as stack:
            stack.enter_context(sigterm_interrupts())
            loaded = [(spec, stack.enter_context(self._loaded(spec))) for spec in self.specs]
            if self.target.unknown is not None:
                _say(
                    f"NOTE: {self.target.unknown} is not one that spdbench's own layers know; transformers' layers "
                    "serve, which are slower."
                )
            heads = self._heads(loaded)
            journals = [
                stack.enter_context(self._journal(spec, backend, place, resume=resume))
                for (spec, backend), place in zip(loaded, places, strict=True)
            ]
            candidates = [
                Candidate(spec.label, backend, journal, _meter(backend))
                for (spec, backend), journal in zip(loaded, journals, strict=True)
            ]
            report = progress_report(len(self.workload.keys()) * len(journals), sum(map(len, journals)))
            runner = Runner(self.workload, candidates, self.chat, self._classify, report, self.score)
            try:
                with report:
                    runner.run()
            except (KeyboardInterrupt, BackendLostError):
                ignore_from_now_on()
                self._write_partial(places, heads, journals)
                raise
            return self._finish(places, heads, journals)

    @contextmanager
    def _loaded(self, spec: BackendSpec) -> Iterator[Backend]:
        context = BackendContext(spec.label, self.target, spec.drafter, self.devices, self.threads, self.workload.seed)
        backend = spec.cls(spec.options, context)
        try:
            backend.load()
            yield backend
        finally:
            backend.close()

    def _classify(self, prompt: Sequence[int], expected: Sequence[int], found: Sequence[int], width: int) -> Any:
        return classify_difference(self.target.decoder, prompt, expected, found, width)

    def _places(self, label: str) -> Places:
        model = self.target.files.id.replace("/", "-")
        parts = [self.suite.name, label, model, *([self.name] if self.name else [])]
        stem = self.results / "__".join(parts)
        return Places(stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".journal.jsonl"))

    def _journal(self, spec: BackendSpec, backend: Backend, places: Places, *, resume: bool) -> Journal:
        """The journal to write to: with `resume`, one that already holds what was finished."""
        identity = self._identity(spec, backend)
        if resume and places.journal.exists():
            journal = resume_journal(places.journal, identity)
        elif resume and places.result.exists():
            journal = self._reopened(places, identity)
        else:
            unfinished = places.journal.exists()
            journal = create_journal(places.journal, datetime.now(UTC).isoformat(timespec="seconds"), identity)
            if unfinished:
                _say(
                    f"An unfinished run is set aside as {places.journal.name}.old; --resume would have gone on with it."
                )
            if resume:
                _say(f"{spec.label}: nothing to resume, so this is a new run.")
        strangers = journal.offsets.keys() - self.workload.keys()
        if strangers:
            journal.close()
            raise InputError(f"{places.journal}: holds a request that is not in this run: {min(strangers)}")
        return journal

    def _reopened(self, places: Places, identity: Mapping[str, Any]) -> Journal:
        """A journal made from a result that is there already, so that a finished run resumes to itself.

        Raises:
            InputError: the result was measured with other settings.
        """
        done, runs = reread(places.result)
        if done.run_key != run_key(identity):
            raise InputError(
                f"--resume: {places.result} is a finished run with other settings{_first_difference(done, identity)}. "
                "Run without --resume to replace it, or with a --name of its own."
            )
        journal = create_journal(places.journal, done.created, identity)
        for key, run in runs:
            journal.append_json(key, run)
        return journal

    def _identity(self, spec: BackendSpec, backend: Backend) -> dict[str, Any]:
        """What has to be the same for a run to go on where another stopped."""
        workload, drafter = self.workload, backend.describe().drafter
        texts = repr([(prompt.id, prompt.turns) for prompt in workload.prompts]).encode()
        return {
            "suite": self.suite.name,
            "suite_sha256": self.suite.sha256,
            "num_prompts": len(workload.prompts),
            "prompts_sha256": hashlib.sha256(texts).hexdigest(),
            "model": self.target.files.id,
            "model_sha256": self.target.files.sha256,
            "dtype": self.target.dtype_name,
            "max_new_tokens": workload.max_new_tokens,
            "temperature": workload.sampling.temperature,
            "top_p": workload.sampling.top_p,
            "top_k": workload.sampling.top_k,
            "seed": workload.seed,
            "repeats": workload.repeats,
            "warmup": workload.warmup,
            "backend": spec.name,
            "options": names_only(spec.options.model_dump(mode="json")),
            "drafter": names_only(spec.drafter),
            "drafter_sha256": drafter.sha256 if drafter else None,
            "baseline": self.specs[0].label,
            "backends": [other.label for other in self.specs],
            "devices": list(self.devices),
            "threads": self.threads,
            **self._scoring(),
        }

    def _scoring(self) -> dict[str, Any]:
        """What scores depend on; nothing where there are none."""
        if self.score.judges is None:
            return {}
        references = repr([prompt.reference for prompt in self.workload.prompts]).encode()
        return {
            "allow_code_execution": self.score.execute is not None,
            "references_sha256": hashlib.sha256(references).hexdigest(),
        }

    def _heads(self, loaded: Sequence[tuple[BackendSpec, Backend]]) -> list[ResultHead]:
        machine, git = environment(self.devices[0]), git_state()
        return [
            result_head(
                self.suite,
                self.workload,
                self.target,
                self.chat,
                spec.name,
                spec.label,
                backend,
                spec.options,
                machine,
                git,
            )
            for spec, backend in loaded
        ]

    def _write_partial(
        self, places: Sequence[Places], heads: Sequence[ResultHead], journals: Sequence[Journal]
    ) -> None:
        """On interruption: what is there so far, but never in the place of an older run's result."""
        for place, head, journal in zip(places, heads, journals, strict=True):
            if len(journal) and (not place.result.exists() or _created(place.result) == journal.created):
                write_result(place.result, head, journal)
        _say(f"{sum(map(len, journals))} finished requests are kept; --resume goes on from there.")

    def _finish(self, places: Sequence[Places], heads: Sequence[ResultHead], journals: Sequence[Journal]) -> int:
        results = []
        for place, head, journal in zip(places, heads, journals, strict=True):
            results.append(write_result(place.result, head, journal))
            _say(f"Wrote {place.result}")
        for journal in journals:  # only now: until every result is there, --resume can still make them all
            journal.remove()
        tables = compare(results, self.specs[0].label)
        click.echo(render(tables, "table", Console(file=sys.stdout)), nl=False)
        return 1 if any(map(_went_wrong, results)) else 0


def _meter(backend: Backend) -> EnergyMeter:
    """The counters of what it runs on; none if nobody here knows what that is."""
    info = backend.describe()
    return EnergyMeter() if "devices" in info.unknown else energy_meter(info.devices)


def _went_wrong(result: LoadedResult) -> bool:
    """True if a prompt failed, or an output is not vanilla's and nothing excuses it."""
    divergence = result.head.divergence
    return bool(result.metrics["num_failed"] or (divergence and divergence.real))


def _created(result: Path) -> str | None:
    """When the run began whose result this is; None if that cannot be told."""
    try:
        return read_results([result])[0].head.created
    except InputError:
        return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _first_difference(done: Result, identity: Mapping[str, Any]) -> str:
    """`: max_new_tokens 10, now 3`, or nothing where the file does not tell."""
    facts = {
        **done.decoding.model_dump(),
        "suite_sha256": done.suite.sha256,
        "num_prompts": done.suite.num_prompts,
        "model_sha256": done.model.sha256,
        "dtype": done.model.dtype,
        "options": done.backend.options,
    }
    differ = (key for key in facts if key in identity and facts[key] != identity[key])
    key = next(differ, None)
    return "" if key is None else f": {key} {facts[key]}, now {identity[key]}"


def _check_writable(folder: Path, places: Sequence[Places]) -> None:
    """Raises `InputError` now rather than after the first prompt."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Journal.write_error(folder, error) from None
    for place in places:
        if place.result.is_dir():
            raise InputError(f"{place.result}: is a folder, where a result file has to go")
