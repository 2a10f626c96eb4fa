"""SPD's decoding loop: schedule, stages and drafter put together, one cycle a step.

Knows the order of things in a cycle; must not know how drafts are made, how stages run, or what the options were.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft, Verdict, judge
from spdbench.models.interface import TargetDecoder
from spdbench.pipeline.inline import InlinePipeline, States
from spdbench.pipeline.schedule import Cycle, Node, PipelineSchedule
from spdbench.types import GenerationRequest, Step
from spdbench_backends.spd.drafter import PipelineDrafter


@torch.inference_mode()
def generate(
    decoder: TargetDecoder, stages: tuple[range, ...], drafter: PipelineDrafter, request: GenerationRequest
) -> Iterator[Step]:
    """Steps of one request: prefill, then a step a cycle; ends on the verdict that gives the last token."""
    sequence = _Sequence(decoder, stages, drafter, request)
    token = sequence.prefill()
    yield Step((token,), 0, 0, 0, float(len(request.prompt_ids)))
    num_new = 1
    if num_new == request.max_new_tokens or token in request.eos_ids:
        return
    sequence.start(token)
    while True:
        step = sequence.cycle()
        yield step
        num_new += len(step.token_ids)
        if num_new == request.max_new_tokens or request.eos_ids.intersection(step.token_ids):
            return


class _Sequence:
    """One request on its way through the pipeline."""

    def __init__(
        self, decoder: TargetDecoder, stages: tuple[range, ...], drafter: PipelineDrafter, request: GenerationRequest
    ) -> None:
        self._pipeline = InlinePipeline(decoder, stages, drafter.anchors)
        self._schedule = PipelineSchedule(len(stages))
        self._drafter = drafter
        self._request = request
        self._sampler = Sampler(request.sampling, request.seed)
        self._num_layers = stages[-1].stop
        self._last_position = len(request.prompt_ids) + request.max_new_tokens - 1
        self._drafts: dict[int, Draft] = {}  # by node, for those in flight
        self._prompt_states: States = {}

    def prefill(self) -> int:
        """The first new token."""
        prompt = self._request.prompt_ids
        capacity = self._last_position + 1
        logits_V, self._prompt_states = self._pipeline.prefill(prompt, capacity)
        return self._sampler.choose(logits_V)

    def start(self, token_id: int) -> None:
        """Enters the first new token, after the drafter has read the prompt."""
        prompt_length = len(self._request.prompt_ids)
        self._drafter.start(self._prompt_states, prompt_length, self._last_position + 1)
        self._prompt_states = {}
        self._enter(self._schedule.start(token_id, prompt_length))

    def cycle(self) -> Step:
        """One cycle: draft, move, judge, enter."""
        cycle = self._schedule.cycle()
        draft = self._drafter.draft(cycle, self._sampler) if self._wants_draft(cycle) else None
        output = self._pipeline.step(cycle)
        for position, states in output.states:
            self._drafter.observe(position, states)
        forwards = output.num_layers / self._num_layers
        if cycle.completing is None:
            self._enter(self._schedule.fill(draft.token_id if draft else None), draft)
            return Step((), 0, 0, 0, forwards)
        assert output.logits_V is not None
        judged = draft if self._schedule.num_stages == 1 else self._drafts.pop(cycle.child.id) if cycle.child else None
        if judged is None:  # nothing was drafted behind it: the target's own token goes on
            self._restart(cycle.completing, self._sampler.choose(output.logits_V))
            return Step((self._newest_token(),), 0, 0, 0, forwards)
        verdict = self._judge(output.logits_V, judged, cycle.completing.position + 1)
        if verdict.accepted:
            self._enter(self._schedule.accept(draft.token_id if draft else None), draft)
        else:
            self._restart(cycle.completing, verdict.token_id)
        return Step((verdict.token_id,), 1, 1, int(verdict.accepted), forwards)

    def _wants_draft(self, cycle: Cycle) -> bool:
        """Nothing is drafted behind an end of sequence, behind the last position, or behind an idle stage 0."""
        newest = cycle.stages[0]
        return (
            newest is not None
            and newest.token_id not in self._request.eos_ids
            and newest.position < self._last_position
        )

    def _judge(self, logits_V: Tensor, draft: Draft, position: int) -> Verdict:
        dictated = self._drafter.dictated(position)
        if dictated is None:
            return judge(logits_V, draft, self._sampler)
        if dictated:
            return Verdict(True, draft.token_id)
        return Verdict(False, self._sampler.choose(logits_V))

    def _enter(self, node: Node | None, draft: Draft | None = None) -> None:
        if node is None:
            return
        if draft is not None and self._schedule.num_stages > 1:
            self._drafts[node.id] = draft
        self._drafter.observe(node.position, {0: self._pipeline.enter(node)})

    def _restart(self, completing: Node, token_id: int) -> None:
        """Drops everything in flight behind the completed node; the target's own token enters."""
        length = completing.position + 1
        self._pipeline.rollback(length)
        self._drafter.rollback(length)
        self._drafts.clear()
        self._enter(self._schedule.restart(token_id))

    def _newest_token(self) -> int:
        assert self._schedule.newest is not None
        return self._schedule.newest.token_id
