"""Autoregressive decoding, one token a forward: eagerly, or by captured steps.

`decode` is the loop of the vanilla backend and gives the oracle's reference. `CapturedDecoding` gives the same tokens
and chooses them on the device: the host launches step t + 1 before it has read the token of step t, and waits for that
token only: one wait a step, during which the device is at work. A step past an end of sequence is never read.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spdbench.decoding.sampling import Sampler, draw_rows, require_number
from spdbench.models.cuda.captured_function import CapturedFunction, CudaGraphs, Readback, Tensors, Upload, buckets
from spdbench.models.cuda.captured_layers import CapturedLayers
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import next_tokens
from spdbench.types import GenerationRequest


@torch.inference_mode()
def decode(decoder: TargetDecoder, request: GenerationRequest) -> Iterator[int]:
    """New token ids one by one, ending with the first end-of-sequence id or at the limit."""
    sampler = Sampler(request.sampling, request.seed)
    prompt = request.prompt_ids
    cache = decoder.new_cache(len(prompt) + request.max_new_tokens)
    hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(prompt)), 0, cache)
    token = sampler.choose(decoder.logits(hidden_SM[-1:])[0])
    yield token
    for _ in range(request.max_new_tokens - 1):
        if token in request.eos_ids:
            return
        hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids((token,))), cache.length, cache)
        token = sampler.choose(decoder.logits(hidden_SM)[0])
        yield token


class CapturedDecoding:
    """One decoder's requests, one after the other, of up to `capacity` tokens each.

    A captured step reads `token_1` and `position_1` on the device and leaves the most likely next token and the next
    position there, so that one replay can follow another.
    """

    def __init__(self, decoder: Decoder, capacity: int, *, compiled: bool = False) -> None:
        self.capacity = capacity
        self._decoder = decoder
        self._cache = decoder.new_cache(capacity)
        with torch.inference_mode():
            self.token_1, self.position_1 = torch.zeros(2, 1, dtype=torch.long, device=decoder.device)
            self._uniform = Upload(1, torch.float64, decoder.device)
            self._readback = Readback(1, decoder.device)
            self._layers = CapturedLayers(
                decoder.weights, decoder.geometry, decoder.rotary, self._cache, compiled=compiled
            )
            self._step = CapturedFunction(CudaGraphs(decoder.device), self._run_step, lengths=buckets(capacity))

    def decode(self, request: GenerationRequest) -> Iterator[int]:
        """New token ids one by one, ending with the first end-of-sequence id or at the limit. Sequences longer than the
        capacity are decoded without graphs."""
        if len(request.prompt_ids) + request.max_new_tokens > self.capacity:
            return decode(self._decoder, request)
        return self._decode(request)

    def prefill(self, prompt_ids: tuple[int, ...]) -> Tensor:
        """The prompt's last logits `[1, V]`; their most likely token is the first step's."""
        decoder, cache = self._decoder, self._cache
        cache.rollback(0)
        hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(prompt_ids)), 0, cache)
        logits_1V = decoder.logits(hidden_SM[-1:])
        self.token_1.copy_(next_tokens(logits_1V))
        self.position_1.fill_(len(prompt_ids))
        return logits_1V

    def step(self, length: int) -> Tensor:
        """One step, after which `length` tokens are in the cache: the logits `[1, V]` of the token after them."""
        (logits_1V,) = self._step(length=length)
        return logits_1V

    @torch.inference_mode()
    def _decode(self, request: GenerationRequest) -> Iterator[int]:
        sampler, length = Sampler(request.sampling, request.seed), len(request.prompt_ids)
        copy_index = self._choose(self.prefill(request.prompt_ids), sampler)
        try:
            for left in reversed(range(request.max_new_tokens)):
                current = copy_index
                if left:
                    length += 1
                    copy_index = self._choose(self.step(length), sampler)
                token = require_number(self._readback.read(current)[0])
                yield token
                if token in request.eos_ids:
                    return
        finally:
            self._readback.read(copy_index)  # no step may be left at work, taking time from the next request

    def _choose(self, logits_1V: Tensor, sampler: Sampler) -> int:
        """The readback's copy of the token after `logits_1V`. Greedy decoding finds it in `token_1` already."""
        if not sampler.greedy:
            self._uniform.send([sampler.uniform()])
            self.token_1.copy_(draw_rows(sampler.probabilities(logits_1V), self._uniform.words))
        return self._readback.start(self.token_1)

    def _run_step(self, bucket: int) -> Tensors:
        context = self._layers.chain(self.position_1, bucket)
        token_1 = self.token_1.clamp(min=0)  # of `NOT_NUMBERS` the host reads only while this step is at work
        hidden_1M = self._layers.forward(self._decoder.embed(token_1), context, self._decoder.layers)
        logits_1V = self._decoder.logits(hidden_1M)
        self.token_1.copy_(next_tokens(logits_1V))
        # Warm-ups and captures count on as well: a few positions, all within the smallest bucket.
        self.position_1.add_(1)
        return (logits_1V,)
