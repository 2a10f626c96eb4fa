"""How the next token is chosen from logits: warping, inverse-CDF draws, one random stream a request.

The same warp serves target and drafter, as lossless verification requires. Must not know who asks.
Shapes: V vocabulary.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from spdbench.models.likeliest import likeliest
from spdbench.types import Sampling

Logits = Tensor | int
"""Logits `[V]`, or their argmax alone: all that greedy decoding asks for, and a shorter message."""


class Sampler:
    """Chooses tokens for one request. Uniform numbers come from the request's seed alone, on the host, so that a
    sequence of draws does not depend on device or dtype."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.sampling = sampling
        self._random = random.Random(seed)

    @property
    def greedy(self) -> bool:
        return self.sampling.greedy

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def choose(self, logits_V: Logits) -> int:
        """The next token's id: the argmax when greedy, else a draw from the warped distribution."""
        if isinstance(logits_V, int):
            return logits_V
        if self.greedy:
            return int(likeliest(logits_V))
        return self.draw(self.probabilities(logits_V))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The warped distribution `[V]` in float32; only for a temperature above 0."""
        return warp(logits_V, self.sampling)

    def draw(self, weights_V: Tensor) -> int:
        """An index drawn in proportion to `weights_V`, which need not sum to 1; never one of weight 0."""
        cumulative = weights_V.double().cumsum(0)
        total = float(cumulative[-1])
        point = min(self.uniform() * total, math.nextafter(total, 0.0))
        return int(torch.searchsorted(cumulative, point, right=True))


def warp(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p, then softmax in float32: `[V]`.

    Top-p keeps the smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al., arXiv 1904.09751).
    """
    logits_V = logits_V.float() / sampling.temperature
    if 0 < sampling.top_k < logits_V.shape[0]:
        smallest_kept = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest_kept, -math.inf)
    probabilities_V = logits_V.softmax(dim=0)
    if sampling.top_p < 1.0:
        ordered, order = probabilities_V.sort(descending=True)
        mass_before = ordered.cumsum(0) - ordered
        dropped = order[mass_before >= sampling.top_p]
        probabilities_V = probabilities_V.index_fill(0, dropped, 0.0)
        probabilities_V = probabilities_V / probabilities_V.sum()
    return probabilities_V
