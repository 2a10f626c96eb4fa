"""SPD's decoding loop: schedule, stages and drafter together, one cycle a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter_ns

import torch

from spdbench.decoding.sampling import Logits, Sampler
from spdbench.decoding.verify import Draft, DraftVerdict, verify_siblings
from spdbench.pipeline.interface import Pipeline
from spdbench.pipeline.schedule import Batch, Change, Cycle, Node, PipelineSchedule
from spdbench.types import Drafted, GenerationRequest, Span, SpanKind, Step
from spdbench_backends.spd.drafter import PipelineDrafter


class PipelinedDecoding:
    """The cycles of one request."""

    def __init__(
        self, pipeline: Pipeline, stages: tuple[range, ...], drafter: PipelineDrafter, request: GenerationRequest
    ) -> None:
        self._pipeline = pipeline
        self._stages = stages
        self._schedule = PipelineSchedule(len(stages))
        self._drafter = drafter
        self._request = request
        self._sampler = Sampler(request.sampling, request.seed)
        self._num_layers = stages[-1].stop
        self._length = len(request.prompt_ids)  # of the committed tokens
        self._limit = self._length + request.max_new_tokens
        self._drafts: dict[int, Draft] = {}  # by node, for those that have no verdict yet
        self._nodes: dict[int, Node] = {}  # the same
        self._spans: list[Span] = []

    @torch.inference_mode()
    def steps(self) -> Iterator[Step]:
        """Prefill, then a step a cycle; ends on the verdict that gives the last token."""
        prompt = self._request.prompt_ids
        try:
            logits, states = self._pipeline.prefill(prompt, self._capacity, greedy=self._sampler.greedy)
            self._length += 1
            step = Step((self._sampler.choose(logits),), 0, 0, 0, float(len(prompt)))
            yield step
            if not self._is_last(step):
                self._drafter.start(states, len(prompt), self._limit)
                del states  # of the whole prompt, which the drafter has read
                self._pipeline.enter((self._schedule.start(step.token_ids[0], len(prompt)),))
            while not self._is_last(step):
                step = self._cycle()
                yield step
        finally:  # also when a generation is closed early: no stage may go on in the background
            self._pipeline.stop()

    def spans(self) -> Sequence[Span]:
        """Where the time went, after the last step; empty where stages share a process."""
        if not (found := self._pipeline.spans(self._length - 1)):
            return ()
        return [*found, *self._spans]

    @property
    def _capacity(self) -> int:
        """Slots of a stage's cache: the tokens of the longest sequence, and branches of nodes in flight."""
        rows = self._drafter.max_rows
        return self._limit + (rows * (self._schedule.num_stages + 2) if rows > 1 else 0)

    def _is_last(self, step: Step) -> bool:
        return self._length == self._limit or bool(self._request.eos_ids.intersection(step.token_ids))

    def _cycle(self) -> Step:
        """One cycle: the stages move, successors of nodes in flight are drafted in parallel or afterwards, the oldest
        drafts are verified, and the next nodes enter."""
        cycle = self._schedule.cycle()
        rows = sum(len(self._stages[stage]) * len(batch) for stage, batch in cycle.work())
        forwards = rows / self._num_layers
        self._pipeline.begin(cycle)
        if not self._drafter.reads_this_cycle:
            drafted = self._draft(cycle)
            if drafted and self._schedule.num_stages > 1:
                self._pipeline.offer(drafted)
        logits = self._pipeline.finish()
        if self._drafter.reads_this_cycle:
            self._draft(cycle)
        if cycle.completing is None:
            self._end(self._schedule.fill())
            return Step((), 0, 0, 0, forwards)
        assert logits is not None
        began, children = perf_counter_ns(), self._schedule.children()
        verdict = self._verify(logits, [self._drafts[node.id] for node in children])
        self._record_span("verify", began, cycle.completing.position)
        self._length += 1
        step = Step((verdict.token_id,), *((1, 1, int(verdict.accepted)) if children else (0, 0, 0)), forwards)
        if self._is_last(step):
            settled = list(self._nodes.values())
        elif verdict.accepted:
            right = next(node for node in children if node.token_id == verdict.token_id)
            settled = self._end(self._schedule.accept(right))
        else:
            settled = self._end(self._schedule.restart(verdict.token_id), restarts=True)
        if children and self._request.keep_drafts:
            step = step._replace(drafts=_drafted(cycle.completing, settled))
        return step

    def _draft(self, cycle: Cycle) -> Batch:
        """The successors that enter next."""
        for node, states in self._pipeline.states():
            self._drafter.observe(node, states)
        began = perf_counter_ns()
        proposals = self._drafter.successors(cycle, self._can_continue, self._sampler)
        if not proposals:
            return ()
        drafted = self._schedule.draft([(parent, draft.token_id) for parent, draft in proposals])
        for node, (_, draft) in zip(drafted, proposals, strict=True):
            self._nodes[node.id], self._drafts[node.id] = node, draft
        self._record_span("draft", began, drafted[0].position - 1)
        return drafted

    def _can_continue(self, node: Node) -> bool:
        """False after an end of sequence and for the last position."""
        return node.token_id not in self._request.eos_ids and node.position < self._limit - 1

    def _verify(self, logits: Logits, drafts: Sequence[Draft]) -> DraftVerdict:
        return verify_siblings(logits, drafts, self._sampler)

    def _end(self, change: Change, *, restarts: bool = False) -> list[Node]:
        """What a cycle's end changes elsewhere. Returns the drafts that it settles, the first drafted first."""
        if change.dropped or restarts:
            self._pipeline.drop(change)
            self._drafter.drop(change)
        settled = {node.id for node in change.dropped} | {change.root.id}
        found = [node for node in self._nodes.values() if node.id in settled]
        for node in found:
            del self._nodes[node.id], self._drafts[node.id]
        if change.entering:
            self._pipeline.enter(change.entering)
        return found

    def _record_span(self, kind: SpanKind, start_ns: int, position: int) -> None:
        """The drafter's lane comes after the stages', unless it shares the first one's; the controller's after that."""
        shared = kind == "draft" and self._pipeline.drafts_in_first_stage
        lane = 0 if shared else len(self._stages) + int(kind != "draft")
        self._spans.append(Span(lane, kind, start_ns, perf_counter_ns(), position, True))


def _drafted(completing: Node, settled: Sequence[Node]) -> Drafted:
    """Drafts as results keep them: those that got the verdict come after the newest token, which is no draft."""
    place = {completing.id: -1} | {node.id: at for at, node in enumerate(settled)}
    return Drafted(tuple(node.token_id for node in settled), tuple(place[node.parent or 0] for node in settled))
