"""Plain decoding by replays: as `autoregressive.decode`, with a step's token chosen where the model is.

The host launches step t + 1 before it has read the token of step t, and waits for that token alone: one wait a step, in
which the device is at work. What is launched past an end of sequence is never read. Must not know of drafts.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spdbench.decoding.autoregressive import decode
from spdbench.decoding.sampling import Sampler, draw_rows
from spdbench.models.cuda.captured_decoder import RecordedStep
from spdbench.models.cuda.graph import Readback, Upload
from spdbench.models.decoder import Decoder
from spdbench.types import GenerationRequest


class CapturedDecoding:
    """One decoder's requests, one after the other."""

    def __init__(self, decoder: Decoder, capacity: int, *, compiled: bool = False) -> None:
        self._decoder = decoder
        self._step = RecordedStep(decoder, capacity, compiled=compiled)
        with torch.inference_mode():
            self._uniform = Upload(1, torch.float64, decoder.device)
            self._readback = Readback(1, decoder.device)

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that is replayed."""
        return self._step.capacity

    def decode(self, request: GenerationRequest) -> Iterator[int]:
        """New token ids one by one, ending with the first end-of-sequence id or at the limit. Sequences that are longer
        than what was recorded are decoded without graphs."""
        if len(request.prompt_ids) + request.max_new_tokens > self.capacity:
            return decode(self._decoder, request)
        return self._decode(request)

    @torch.inference_mode()
    def _decode(self, request: GenerationRequest) -> Iterator[int]:
        sampler, length = Sampler(request.sampling, request.seed), len(request.prompt_ids)
        ticket = self._prefill(request.prompt_ids, sampler)
        try:
            for left in reversed(range(request.max_new_tokens)):
                coming = ticket
                if left:
                    length += 1
                    self._step(length)
                    ticket = self._chosen(self._step.logits_1V, sampler)
                token = self._readback.read(coming)[0]
                yield token
                if token in request.eos_ids:
                    return
        finally:
            self._readback.read(ticket)  # nothing is left at work, which would take its time from whoever comes next

    def _prefill(self, prompt_ids: tuple[int, ...], sampler: Sampler) -> int:
        """The ticket of the first new token, which then stands ready for the first step."""
        decoder, step = self._decoder, self._step
        step.cache.rollback(0)
        hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(prompt_ids)), 0, step.cache)
        logits_1V = decoder.logits(hidden_SM[-1:])
        step.token_1.copy_(logits_1V.argmax(dim=-1))
        step.position_1.fill_(len(prompt_ids))
        return self._chosen(logits_1V, sampler)

    def _chosen(self, logits_1V: Tensor, sampler: Sampler) -> int:
        """The ticket of the token behind `logits_1V`: the likeliest stands there already, another one is drawn."""
        if not sampler.greedy:
            self._uniform.send([sampler.uniform()])
            self._step.token_1.copy_(draw_rows(sampler.probabilities(logits_1V), self._uniform.words))
        return self._readback.start(self._step.token_1)
