"""How the next token is chosen from logits: warping, inverse-CDF draws, one random stream a request.

Target and drafter use the same warp, as lossless verification requires.
Shapes: V vocabulary, U draft vocabulary, N rows.
"""

from __future__ import annotations

import math
import random
from functools import cached_property

import torch
from torch import Tensor

from spdbench.errors import PromptFailedError
from spdbench.models.cuda.captured_layers import clear_captured_caches
from spdbench.models.layer_ops import NOT_NUMBERS, next_tokens
from spdbench.models.torch_utils import one_thread
from spdbench.types import Sampling

Logits = Tensor | int
"""Logits `[V]`, or only the next token by `next_tokens`, which greedy decoding needs and which is a shorter message."""


class DraftVocabulary:
    """The tokens that a drafter can propose: those that `token_ids_U` lists, or all `vocab_size` of the target's."""

    def __init__(self, vocab_size: int, token_ids_U: Tensor | None = None) -> None:
        self.vocab_size = vocab_size
        self.size = vocab_size if token_ids_U is None else len(token_ids_U)
        self.token_ids_U = token_ids_U

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Indices in the draft vocabulary, of any shape, as the target's token ids."""
        return draft_ids if self.token_ids_U is None else self.token_ids_U[draft_ids]

    @cached_property
    def listed(self) -> tuple[int, ...] | None:
        """The token ids on the host; None where drafts come from the whole vocabulary."""
        return None if self.token_ids_U is None else tuple(self.token_ids_U.tolist())


def require_number(token: int) -> int:
    """`token`, which was chosen from logits.

    Raises:
        PromptFailedError: it is `NOT_NUMBERS`. Other prompts can go on: nothing of this one stays in a cache.
    """
    if token == NOT_NUMBERS:
        clear_captured_caches()
        raise PromptFailedError(
            "logits are not numbers (NaN), as where values become too large for the dtype; try --dtype float32"
        )
    return token


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
        """The next token's id: the argmax when greedy, else a draw from the warped distribution.

        Raises:
            PromptFailedError: a logit is NaN.
        """
        if isinstance(logits_V, int):
            return require_number(logits_V)
        if self.greedy:
            return require_number(int(next_tokens(logits_V)))
        return self.draw(self.probabilities(logits_V))

    @one_thread()
    def probabilities(self, logits: Tensor) -> Tensor:
        """The warped distribution `[V]`, or one a row of `[N, V]`, in float32; only for a temperature above 0."""
        return warp(logits, self.sampling)

    @one_thread()
    def draw(self, weights_V: Tensor, uniform: float | None = None) -> int:
        """An index drawn in proportion to `weights_V`, which need not sum to 1; never one of weight 0. `uniform` is the
        number that decides, by default the next one.

        Raises:
            PromptFailedError: a weight is NaN.
        """
        cumulative = weights_V.double().cumsum(0)
        total = float(cumulative[-1])
        if math.isnan(total):
            require_number(NOT_NUMBERS)
        point = min((self.uniform() if uniform is None else uniform) * total, math.nextafter(total, 0.0))
        return int(torch.searchsorted(cumulative, point, right=True))


def draw_rows(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """As `Sampler.draw` for every row, without reading anything to the host: `[N]`. `NOT_NUMBERS` where a weight is
    NaN. `uniform_N` is in float64."""
    cumulative = weights_NV.double().cumsum(-1)
    totals_N1 = cumulative[:, -1:]
    points_N1 = torch.minimum(uniform_N[:, None] * totals_N1, torch.nextafter(totals_N1, torch.zeros_like(totals_N1)))
    found_N = torch.searchsorted(cumulative, points_N1, right=True)[:, 0]
    return found_N.masked_fill(totals_N1[:, 0].isnan(), NOT_NUMBERS)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p, then softmax in float32, of `[V]` or of every row of `[N, V]`.

    Top-p keeps the smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al., arXiv 1904.09751).
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(mass_before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities
