"""Plain decoding, one token a forward: the vanilla backend's loop and the oracle's reference are this one function."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spdbench.decoding.sampling import Sampler
from spdbench.models.interface import TargetDecoder
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
