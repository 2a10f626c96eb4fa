"""One audit from loading to the verdict: backends answer the suite, and are compared with plain decoding.

Greedy requests go through the runner of `run`, with journals in a folder that is deleted. With a temperature, each
prompt is answered many times, and the quantiles of the first tokens are counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import product
from math import isqrt
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console

from spdbench import __version__
from spdbench.backend import concurrency_of, learns_from_verdicts
from spdbench.cli.audit.probes import check_end, check_restarts, first_tokens
from spdbench.cli.files import write_file, write_stdout
from spdbench.cli.progress import Progress
from spdbench.cli.run.live_view import LiveView, Tally
from spdbench.cli.run.outputs import OutputComparer, other_engine
from spdbench.cli.setup import BackendSpec
from spdbench.cli.terminal import sigterm_interrupts
from spdbench.console import counted
from spdbench.decoding.distribution import PlainDistribution
from spdbench.errors import InputError, PromptFailedError, SpdbenchError
from spdbench.judge.audit import SIGNIFICANCE, BackendAudit, PromptDivergence
from spdbench.judge.metrics.chi_square import MIN_EXPECTED, ChiSquare, chi_square
from spdbench.judge.results.schema import Run
from spdbench.measure.journal import create_journal
from spdbench.measure.privacy import names_only, without_secrets
from spdbench.measure.request_turn import RequestTurn, Workload
from spdbench.measure.runner import Candidate, Runner
from spdbench.models.target import Target
from spdbench.prompts.chat import ChatFormat
from spdbench.prompts.suite import Suite
from spdbench.render.audit import to_json, to_terminal
from spdbench.render.columns import decoding
from spdbench.types import FirstDivergence, GenerationRequest, request_seed

if TYPE_CHECKING:
    from spdbench.cli.audit.command import AuditOptions

SAMPLED_TOKENS, PAIRS, MAX_BINS = 4, ((0, 1), (2, 3)), 4
"""Of sampled answers the first tokens count. Each pair of neighbours is tested in cells of both quantiles, so that
tokens that depend on each other in the wrong way show as well. With few cells a smaller deviation is found."""
ANSWER_LIMITS = (SAMPLED_TOKENS, 16)
"""Limits of sampled answers in turn: with little room rounds end, with a token of the target's own, among the tokens
that are counted; with much room they are as deep as in any other request."""


@dataclass(frozen=True)
class AuditSession:
    """One audit. The first of `specs` is plain decoding."""

    options: AuditOptions
    suite: Suite
    workload: Workload
    chat: ChatFormat
    target: Target
    devices: tuple[str, ...]
    specs: Sequence[BackendSpec]
    audits: dict[str, BackendAudit] = field(default_factory=dict)

    def run(self) -> int:
        """The exit code: 1 for a finding, 3 where it cannot be known."""
        with ExitStack() as stack:
            stack.enter_context(sigterm_interrupts())
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="spdbench-audit-")))
            candidates = []
            for number, spec in enumerate(self.specs):
                made = spec.make(self.target, self.devices, self.options.threads, self.workload.seed, self.chat)
                backend = stack.enter_context(closing(made))
                backend.load()
                journal = stack.enter_context(create_journal(folder / f"{number}.jsonl", "", {}))
                candidate = Candidate(spec.label, backend, journal)
                if number:
                    self.audits[spec.label] = BackendAudit(
                        spec.label, spec.name, backend.describe().kernels or "", self._obstacle(candidate)
                    )
                candidates.append(candidate)
            audited = [each for each in candidates[1:] if self.audits[each.label].not_audited is None]
            for candidate in audited:
                self.audits[candidate.label].significance = SIGNIFICANCE / len(audited)
            if audited and self.workload.sampling.greedy:
                self._compare_greedy([candidates[0], *audited])
            elif audited:
                self._count_samples(audited)
        return self._report()

    def _obstacle(self, candidate: Candidate) -> str | None:
        """Why a backend cannot be audited; None if it can."""
        info, backend = candidate.backend.describe(), candidate.backend
        if not backend.lossless:
            return "by design its outputs are not the target's"
        if not info.knows_ids:
            return "it reports no token ids, so whether its outputs are plain decoding's cannot be known"
        if concurrency_of(backend) > 1:
            return f"it takes several requests at once; give -o {candidate.label}.concurrency=1"
        if info.other_model is not None and not self.workload.sampling.greedy:
            return f"it runs {info.other_model}, whose exact distribution cannot be known here"
        return None

    def _compare_greedy(self, candidates: Sequence[Candidate]) -> None:
        comparer = OutputComparer(self.target)

        def compare(candidate: Candidate, turn: RequestTurn, expected: Run, found: Run) -> FirstDivergence | None:
            audit = self.audits[candidate.label]
            divergence = comparer(candidate, turn, expected, found)
            audit.outcomes["identical" if divergence is None else divergence.outcome] += 1
            if divergence is not None:
                expected_text, found_text = self._text(divergence.expected), self._text(divergence.found)
                audit.divergences.append(
                    PromptDivergence(turn.prompt.id, turn.turn, expected_text, found_text, divergence)
                )
            self._probe(candidate, turn.request, found)
            return divergence

        total, specs = len(self.workload.keys()), {spec.label: spec for spec in self.specs}
        report = LiveView([Tally(specs[each.label].record(each.backend), total) for each in candidates])
        runner = Runner(self.workload, candidates, self.chat, compare, report, comparable=lambda _: True)
        with report:
            runner.run()
        reference = [*_failures(candidates[0])]
        for candidate in candidates[1:]:
            self.audits[candidate.label].failed += [*_failures(candidate), *reference]

    def _probe(self, candidate: Candidate, request: GenerationRequest, found: Run) -> None:
        backend, audit = candidate.backend, self.audits[candidate.label]
        info, engine = backend.describe(), other_engine(candidate)
        with _crashes_in(audit):
            if engine is None or engine.same_model:
                check_end(backend, request, found, audit.ends)
            repeats = info.drafter is not None and not info.drafter.synthetic and not learns_from_verdicts(backend)
            if engine is None and repeats:
                check_restarts(backend, request, found, audit.restarts)

    def _count_samples(self, candidates: Sequence[Candidate]) -> None:
        workload, draws = self.workload, self.options.draws
        total, done = len(workload.prompts) * len(candidates) * draws, 0
        quantiles: dict[str, list[list[float | None]]] = {candidate.label: [] for candidate in candidates}
        numbers = Random(workload.seed)
        with Progress(total) as progress:
            for prompt in workload.prompts:
                try:
                    ids = self.chat.encode(prompt.first_messages)
                except InputError:
                    continue  # reported before
                if len(ids) + SAMPLED_TOKENS > workload.context_limit:
                    continue
                plain = PlainDistribution(self.target.decoder, ids, workload.sampling, SAMPLED_TOKENS)
                for candidate in candidates:
                    with _crashes_in(self.audits[candidate.label]):
                        for draw in range(draws):
                            found = first_tokens(candidate.backend, self._draw(prompt.id, ids, draw), SAMPLED_TOKENS)
                            uniform = [numbers.random() for _ in found]
                            quantiles[candidate.label].append(plain.quantiles(found, uniform))
                            progress.show(done + draw, f"{done + draw + 1}/{total} sampled answers")
                    done += draws
        for label, answers in quantiles.items():
            if answers:
                self.audits[label].sampled = self._test(answers)

    def _test(self, answers: Sequence[Sequence[float | None]]) -> ChiSquare:
        """The test of the quantiles of all answers, in as many cells as so many answers can fill.

        A token without probability has a cell of its own in float32. In other dtypes rounding may let a token in at the
        edge of top-k or top-p, so there it counts as the least likely one.
        """
        bins = max(1, min(MAX_BINS, isqrt(int(len(answers) / MIN_EXPECTED))))
        cells = dict.fromkeys(product(range(bins), repeat=2), 1 / bins**2)
        excluded = -1 if self.target.dtype_name == "float32" else bins - 1

        def bin_of(quantile: float | None) -> int:
            return excluded if quantile is None else min(bins - 1, int(bins * quantile))

        tests = []
        for first, second in PAIRS:
            counts: Counter[tuple[int, ...]] = Counter(
                (bin_of(answer[first]), bin_of(answer[second])) for answer in answers
            )
            tests.append(chi_square(counts, cells))
        return tests[0] + tests[1]

    def _draw(self, prompt_id: str, ids: tuple[int, ...], draw: int) -> GenerationRequest:
        workload = self.workload
        seed = request_seed(workload.seed, prompt_id, draw)
        room = min(ANSWER_LIMITS[draw % len(ANSWER_LIMITS)], workload.context_limit - len(ids))
        return GenerationRequest(ids, (), room, workload.sampling, seed, frozenset())

    def _text(self, token: int | None) -> str:
        return "(end)" if token is None else repr(self.target.tokenizer.decode([token]))

    def _report(self) -> int:
        suite, workload, audits = self.suite, self.workload, [*self.audits.values()]
        facts: dict[str, Any] = {
            "spdbench": __version__,
            "suite": f"{suite.name} v{suite.version}",
            "model": names_only(self.target.files.id),
            "dtype": self.target.dtype_name,
            "decoding": workload.decoding.model_dump(),
            "num_prompts": len(workload.prompts),
            "reference": self.specs[0].label,
        }
        title = (
            f"{facts['suite']} | {facts['model']} | {facts['dtype']} | {decoding(workload.decoding)} | "
            f"{counted(len(workload.prompts), 'prompt')} | against {self.specs[0].label}"
        )
        write_stdout(to_terminal(title, audits, Console(file=sys.stdout)))
        if self.options.json_file is not None:
            write_file("--json", self.options.json_file, to_json(facts, audits))
        codes = {audit.exit_code for audit in audits}
        return 1 if 1 in codes else max(codes)


@contextmanager
def _crashes_in(audit: BackendAudit) -> Iterator[None]:
    """Records a crash of a backend as a finding: it is no reason to leave out the others."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SpdbenchError) and not isinstance(error, PromptFailedError):
            raise
        audit.failed.append(without_secrets(f"{type(error).__name__}: {error}"))


def _failures(candidate: Candidate) -> list[str]:
    return [
        f"{candidate.label}, prompt {run.prompt_id}: {run.error}"
        for run in candidate.journal.runs()
        if run.finish_reason == "error"
    ]
