"""SPD's decoding loop: schedule, stages and drafter together, one cycle a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter_ns

import torch

from spdbench.decoding.sampling import Logits, Sampler
from spdbench.decoding.verify import Draft, DraftVerdict, verify_draft
from spdbench.pipeline.interface import Pipeline
from spdbench.pipeline.schedule import Cycle, Node, PipelineSchedule
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
        self._drafts: dict[int, Draft] = {}  # by node, for those in flight
        self._spans: list[Span] = []

    @torch.inference_mode()
    def steps(self) -> Iterator[Step]:
        """Prefill, then a step a cycle; ends on the verdict that gives the last token."""
        prompt = self._request.prompt_ids
        try:
            logits, states = self._pipeline.prefill(prompt, self._limit, greedy=self._sampler.greedy)
            self._length += 1
            step = Step((self._sampler.choose(logits),), 0, 0, 0, float(len(prompt)))
            yield step
            if not self._is_last(step):
                self._drafter.start(states, len(prompt), self._limit)
                del states  # of the whole prompt, which the drafter has read
                self._enter(self._schedule.start(step.token_ids[0], len(prompt)))
            while not self._is_last(step):
                step = self._cycle()
                yield step
        finally:  # also when a generation is closed early: no stage may go on in the background
            self._pipeline.rollback(max(self._length - 1, 0))

    def spans(self) -> Sequence[Span]:
        """Where the time went, after the last step; empty where stages share a process."""
        if not (found := self._pipeline.spans(self._length - 1)):
            return ()
        return [*found, *self._spans]

    def _is_last(self, step: Step) -> bool:
        return self._length == self._limit or bool(self._request.eos_ids.intersection(step.token_ids))

    def _cycle(self) -> Step:
        """One cycle: the stages move, a successor of the newest token is drafted in parallel or afterwards, the oldest
        draft is verified, and the next token enters."""
        cycle = self._schedule.cycle()
        forwards = sum(len(self._stages[stage]) for stage, _ in cycle.work()) / self._num_layers
        self._pipeline.begin(cycle)
        draft = None if self._drafter.reads_this_cycle else self._draft(cycle)
        if draft is not None and cycle.stages[0] is not None and self._schedule.num_stages > 1:
            self._pipeline.offer(draft.token_id, cycle.stages[0].position + 1)
        logits = self._pipeline.finish()
        if self._drafter.reads_this_cycle:
            draft = self._draft(cycle)
        if cycle.completing is None:
            self._enter(self._schedule.fill(draft.token_id if draft else None), draft)
            return Step((), 0, 0, 0, forwards)
        assert logits is not None
        began = perf_counter_ns()
        if self._schedule.num_stages == 1:
            verified = draft
        else:
            verified = self._drafts.pop(cycle.child.id) if cycle.child else None
        verdict = self._verify(logits, verified)
        self._record_span("verify", began, cycle.completing.position)
        self._length += 1
        step = Step((verdict.token_id,), *((1, 1, int(verdict.accepted)) if verified else (0, 0, 0)), forwards)
        is_last = self._is_last(step)
        if verified and self._request.keep_drafts:
            drops = is_last or not verdict.accepted
            step = step._replace(drafts=self._drafted(verified, draft if drops else None, drops=drops))
        if is_last:
            return step
        if verdict.accepted:
            self._enter(self._schedule.accept(draft.token_id if draft else None), draft)
        else:
            self._restart(cycle.completing, verdict.token_id)
        return step

    def _draft(self, cycle: Cycle) -> Draft | None:
        """A successor of the newest token. None after an end of sequence, after the last position, or when stage 0 is
        idle."""
        for position, states in self._pipeline.states():
            self._drafter.observe(position, states)
        newest = cycle.stages[0]
        if newest is None or newest.token_id in self._request.eos_ids or newest.position >= self._limit - 1:
            return None
        began = perf_counter_ns()
        draft = self._drafter.draft(cycle, self._sampler)
        self._record_span("draft", began, newest.position)
        return draft

    def _drafted(self, verified: Draft, newest: Draft | None, *, drops: bool) -> Drafted:
        """The draft that got a verdict; if this `drops` the drafts behind it, these too, `newest` the last of them."""
        behind = [*self._drafts.values(), *([newest] if newest and newest is not verified else [])] if drops else []
        ids = tuple(draft.token_id for draft in (verified, *behind))
        return Drafted(ids, tuple(range(-1, len(ids) - 1)))

    def _verify(self, logits: Logits, draft: Draft | None) -> DraftVerdict:
        return verify_draft(logits, draft, self._sampler)

    def _enter(self, node: Node | None, draft: Draft | None = None) -> None:
        if node is None:
            return
        if draft is not None and self._schedule.num_stages > 1:
            self._drafts[node.id] = draft
        self._pipeline.enter(node)

    def _restart(self, completing: Node, token_id: int) -> None:
        """Drops all tokens in flight after the completed node; the target's own token enters."""
        length = completing.position + 1
        self._pipeline.rollback(length)
        self._drafter.rollback(length)
        self._drafts.clear()
        self._enter(self._schedule.restart(token_id))

    def _record_span(self, kind: SpanKind, start_ns: int, position: int) -> None:
        """The drafter's lane comes after the stages', and the controller's after that."""
        lane = len(self._stages) + int(kind != "draft")
        self._spans.append(Span(lane, kind, start_ns, perf_counter_ns(), position, True))
