"""EAGLE's draft head on one sequence: features and tokens in, logits of the next token out.

    EAGLE-3   g = fc(target features at three depths)       x = (norm(embedding), norm(g))   residual g
              layer over x, then its own norm and head over a draft vocabulary
    EAGLE-1/2 x = fc(embedding, target's last hidden state after its final norm)             residual x
              layer without an input norm, then the target's head

The pair (feature of position t, token of position t + 1) is draft row t. Rows of committed tokens stay in the cache
and come from true target features; a tree's rows, which feed on the head's own output, are scratch and are forgotten
when the next committed rows arrive.

Sources: arXiv 2401.15077, 2406.16858, 2503.01840, and the code published with them.
Shapes: S rows, A aux features, T target width, M draft width, U draft vocabulary, V vocabulary, W slots of a tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.models.attention_context import AttentionContext, TreeRows
from spdbench.models.cpu.linear import Linear, PackedLinear
from spdbench.models.cpu.recorded_forward import MAX_ROWS, RecordedRows, can_record
from spdbench.models.kv_cache import KVCache
from spdbench.models.layer_ops import Geometry, NormWeight, ops_by_rows
from spdbench.models.layers import LayerWeights, layer_body, layer_forward
from spdbench.models.rotary import Rotary


@dataclass(frozen=True)
class EagleWeights:
    """A head for one target.

    `aux` are the target's hidden states that `fc` reads, by index; empty for EAGLE-1/2, which reads the last one after
    the final norm. `layers[0]` reads 2M inputs in EAGLE-3. `feature_norm` normalises the features that enter layer 0
    (`hidden_norm`), `fc_norms` the target's features before `fc`: none, one over all A T columns, or one for each of A.
    `norm` precedes the head; None in EAGLE-1/2. `residual_normed`: the residual is the normalised feature.
    `feed_normed`: the next row is fed the output of `norm`, not its input. `vocabulary` is what it drafts from.
    """

    geometry: Geometry
    rotary: Rotary
    width: int
    dtype: torch.dtype
    device: torch.device
    embeddings: Tensor
    aux: tuple[int, ...]
    fc: Linear
    fc_norms: tuple[NormWeight, ...]
    layers: tuple[LayerWeights, ...]
    feature_norm: NormWeight | None
    norm: NormWeight | None
    head: Linear
    vocabulary: DraftVocabulary
    residual_normed: bool = False
    feed_normed: bool = False

    @property
    def is_eagle3(self) -> bool:
        return bool(self.aux)

    @property
    def nbytes(self) -> int:
        """Bytes that one draft row reads, without `fc`: a tree's rows do not pass through it in EAGLE-3."""
        layers = sum(layer.bytes_per_token() for layer in self.layers)
        return layers + self.head.nbytes + (0 if self.is_eagle3 else self.fc.nbytes)


class EagleHead(ABC):
    """A head's arithmetic. Where rows stand, and how they go through the layers, is left to the subclasses: to
    `EagleModule`, and to `captured.CapturedHead` within a captured function."""

    def __init__(self, weights: EagleWeights) -> None:
        self.weights = weights
        self._ops_for = ops_by_rows(weights.geometry, weights.dtype, weights.device)

    @abstractmethod
    def extend(self, features_SF: Tensor, ids_S: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of committed tokens from true features: `[S, A T]`, or `[S, T]` in EAGLE-1/2; `ids_S` are the tokens one
        position further. Returns logits `[1, U]` and state `[1, M]` of the last row."""

    @abstractmethod
    def extend_tree(self, states_SM: Tensor, ids_S: Tensor, rows: TreeRows) -> tuple[Tensor, Tensor]:
        """Rows of a tree after the committed ones, fed by the states of the rows they follow: logits `[S, U]` and
        states `[S, M]`."""

    def _fused(self, features_SF: Tensor) -> Tensor:
        """The input of layer 0: `fc` of the features in EAGLE-3, the features themselves in EAGLE-1/2."""
        weights = self.weights
        if not weights.is_eagle3:
            return features_SF
        norms = weights.fc_norms
        if norms:
            ops = self._ops_for(len(features_SF))
            chunks: Sequence[Tensor] = features_SF.chunk(len(norms), dim=-1)
            features_SF = torch.cat([ops.norm(c.contiguous(), n) for c, n in zip(chunks, norms, strict=True)], dim=-1)
        return weights.fc(features_SF)

    def _embedded(self, ids_S: Tensor) -> Tensor:
        return embedding(ids_S, self.weights.embeddings).to(self.weights.dtype)

    def _entering(self, features_SM: Tensor, embedded_SM: Tensor) -> tuple[Tensor, Tensor]:
        """What layer 0 reads, and the residual that its output is added to."""
        weights, ops = self.weights, self._ops_for(len(embedded_SM))
        first = weights.layers[0]
        if not weights.is_eagle3:
            inputs = weights.fc(torch.cat((embedded_SM, features_SM), dim=-1))
            return inputs, inputs
        assert first.input_norm is not None
        assert weights.feature_norm is not None
        inputs = ops.norm_pair(embedded_SM, first.input_norm, features_SM.contiguous(), weights.feature_norm)
        return inputs, inputs[:, embedded_SM.shape[1] :] if weights.residual_normed else features_SM

    def _logits(self, hidden_SM: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the states that the rows after these are fed."""
        weights = self.weights
        if weights.norm is None:
            return weights.head(hidden_SM), hidden_SM
        normed_SM = self._ops_for(len(hidden_SM)).norm(hidden_SM.contiguous(), weights.norm)
        return weights.head(normed_SM), normed_SM.clone() if weights.feed_normed else hidden_SM


class EagleModule(EagleHead):
    """A head with the cache of one sequence. Steps of a few rows are recorded when they are first needed."""

    def __init__(self, weights: EagleWeights, capacity: int) -> None:
        super().__init__(weights)
        geometry = weights.geometry
        self.cache = KVCache(
            range(len(weights.layers)),
            geometry.num_kv_heads,
            geometry.head_dim,
            capacity,
            weights.dtype,
            weights.device,
        )
        self.num_committed = 0  # draft rows of committed tokens
        self._recorded: dict[tuple[int, int | None], RecordedRows[_Step]] | None = {} if self._can_record else None

    def extend(self, features_SF: Tensor, ids_S: Tensor) -> tuple[Tensor, Tensor]:
        """Forgets a tree's rows."""
        self.cache.rollback(self.num_committed)
        found = self._run(features_SF, ids_S, None)
        self.num_committed += len(ids_S)
        return found

    def extend_tree(self, states_SM: Tensor, ids_S: Tensor, rows: TreeRows) -> tuple[Tensor, Tensor]:
        return self._run(states_SM, ids_S, rows)

    def commit(self, num_rows: int) -> None:
        """Takes over rows that were written into the cache after the committed ones."""
        self.cache.rollback(self.num_committed)
        self.cache.advance(num_rows)
        self.num_committed += num_rows

    def reset(self) -> None:
        """Forgets everything: another sequence begins."""
        self.cache.rollback(0)
        self.num_committed = 0

    def _run(self, given_SF: Tensor, ids_S: Tensor, rows: TreeRows | None) -> tuple[Tensor, Tensor]:
        """Features of committed rows, or the states that a tree's rows are fed: logits and states, which hold until the
        next call with as many rows."""
        num_rows, embedded_SM = len(ids_S), self._embedded(ids_S)
        if self._recorded is None or num_rows > MAX_ROWS:
            context = AttentionContext(self.weights.rotary, self.num_committed, num_rows, rows)
            step = self._step(given_SF, embedded_SM, context)
        else:
            tree_width = None if rows is None else rows.visible_SW.shape[1]
            recorded = self._recorded.get((num_rows, tree_width))
            if recorded is None:
                recorded = self._recorded[num_rows, tree_width] = self._record(given_SF, embedded_SM, tree_width)
            step = recorded.out
            step.given_SF.copy_(given_SF)
            step.embedded_SM.copy_(embedded_SM)
            recorded.place(self.cache.room(0, num_rows)[0], self.num_committed, rows)
            recorded.run()
        self.cache.advance(num_rows)
        return step.logits, step.states

    def _record(self, given_SF: Tensor, embedded_SM: Tensor, tree_width: int | None) -> RecordedRows[_Step]:
        with torch.inference_mode(False):
            given_SF, embedded_SM = (torch.zeros(each.shape, dtype=each.dtype) for each in (given_SF, embedded_SM))
        return RecordedRows(
            self.weights.rotary,
            self.cache.memory,
            len(embedded_SM),
            tree_width,
            lambda context, _: self._step(given_SF, embedded_SM, context),
        )

    def _step(self, given_SF: Tensor, embedded_SM: Tensor, context: AttentionContext) -> _Step:
        weights, ops, committed = self.weights, self._ops_for(context.num_rows), context.tree is None
        inputs, residual_SM = self._entering(self._fused(given_SF) if committed else given_SF, embedded_SM)
        hidden_SM = layer_body(weights.layers[0], ops, context, 0, inputs, residual_SM, self.cache)
        for index, layer in enumerate(weights.layers[1:], 1):
            hidden_SM = layer_forward(layer, ops, context, index, hidden_SM, self.cache)
        return _Step(given_SF, embedded_SM, *self._logits(hidden_SM[-1:] if committed else hidden_SM))

    @property
    def _can_record(self) -> bool:
        """True if all of a step's arithmetic is tasks of the worker pool."""
        weights = self.weights
        tasks = weights.is_eagle3 and not (weights.fc_norms or weights.residual_normed or weights.feed_normed)
        packed = isinstance(weights.fc, PackedLinear) and isinstance(weights.head, PackedLinear)
        return tasks and packed and can_record(weights.layers, self._ops_for(1))


class _Step(NamedTuple):
    """What goes into a step, and its logits and states."""

    given_SF: Tensor
    embedded_SM: Tensor
    logits: Tensor
    states: Tensor
