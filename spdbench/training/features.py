"""The frozen target's hidden states and greedy next tokens of each sequence, computed once where the disk has room.

States are kept as bfloat16 in one memory-mapped file, sequence after sequence, and computed when first needed. The file
has no name once it is open, so that it disappears with the process, however that ends.

Shapes: B sequences, S tokens of each, T tokens of all, K kinds of states, M model width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spdbench.models.interface import TargetDecoder
from spdbench.models.layer_ops import argmax
from spdbench.training.recipe import Batch
from spdbench.training.tokens import TokenSequence

LOGIT_ROWS = 128
"""Positions whose full logits are held at once."""


class Features:
    """The target's features of `sequences`: hidden states `hidden_indices`, and always the last layer's."""

    def __init__(
        self, decoder: TargetDecoder, sequences: Sequence[TokenSequence], hidden_indices: Collection[int]
    ) -> None:
        last = decoder.config.num_layers
        self._decoder = decoder
        self._sequences = sequences
        self._given = sorted({*hidden_indices, last})  # those that `batch` returns
        self._kinds = [kind for kind in self._given if kind]  # 0, the embedding, is cheap to look up
        self._starts = [0, *accumulate(len(sequence.ids) for sequence in sequences)]
        self._states_TKM: Tensor | None = None
        self._argmax_T = torch.zeros(self._starts[-1], dtype=torch.int32)
        self._known: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes that the states of all sequences take."""
        return self._starts[-1] * len(self._kinds) * self._decoder.config.hidden_size * torch.bfloat16.itemsize

    @property
    def kept(self) -> bool:
        """True if features are computed once only."""
        return self._states_TKM is not None

    def keep_on_disk(self, folder: Path) -> None:
        """Keeps computed features from now on, in a file without a name in `folder`.

        Raises:
            OSError: the disk is full.
        """
        handle, name = tempfile.mkstemp(dir=folder, prefix=".features-")
        try:
            os.posix_fallocate(handle, 0, self.num_bytes)
            count = self.num_bytes // torch.bfloat16.itemsize
            flat = torch.from_file(name, shared=True, size=count, dtype=torch.bfloat16)
        finally:
            os.close(handle)
            os.unlink(name)
        self._states_TKM = flat.view(self._starts[-1], len(self._kinds), -1)

    def prepare(self, indices: Sequence[int]) -> None:
        """Computes the features of some sequences now, if they can be kept."""
        if self._states_TKM is not None:
            for index in indices:
                self._features(index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some sequences in one batch, padded on the right, on the decoder's device."""
        features = [self._features(index) for index in indices]
        sequences = [self._sequences[index] for index in indices]
        states = {
            kind: self._padded(states_SKM[:, at].float() for states_SKM, _ in features)
            for at, kind in enumerate(self._kinds)
            if kind in self._given
        }
        ids_BS = self._padded(torch.tensor(sequence.ids) for sequence in sequences)
        if 0 in self._given:
            states[0] = self._decoder.embed(ids_BS.flatten()).float().view(*ids_BS.shape, -1)
        return Batch(
            ids_BS=ids_BS,
            valid_BS=self._padded(torch.ones(len(sequence.ids), dtype=torch.bool) for sequence in sequences),
            answers_BS=self._padded(torch.tensor((*sequence.answer[1:], False)) for sequence in sequences),
            states=states,
            argmax_BS=self._padded(argmax_S.long() for _, argmax_S in features),
        )

    def _padded(self, rows: Iterable[Tensor]) -> Tensor:
        """Rows of different lengths as one tensor on the decoder's device, with zeros on the right."""
        return pad_sequence(list(rows), batch_first=True).to(self._decoder.device)

    def _features(self, index: int) -> tuple[Tensor, Tensor]:
        """States `[S, K, M]` and greedy next tokens `[S]` of a sequence."""
        place = slice(self._starts[index], self._starts[index + 1])
        if self._states_TKM is not None and index in self._known:
            return self._states_TKM[place], self._argmax_T[place]
        states_SKM, argmax_S = self._compute(self._sequences[index])
        if self._states_TKM is not None:
            self._states_TKM[place], self._argmax_T[place] = states_SKM, argmax_S
            self._known.add(index)
        return states_SKM, argmax_S

    @torch.inference_mode()
    def _compute(self, sequence: TokenSequence) -> tuple[Tensor, Tensor]:
        decoder = self._decoder
        with torch.autocast(decoder.device.type, enabled=False):
            hidden_SM = decoder.embed(decoder.ids(sequence.ids))
            cache = decoder.new_cache(len(sequence.ids))
            hidden_SM, states = decoder.forward(hidden_SM, 0, cache, hidden_indices=self._kinds)
            best = [argmax(decoder.logits(rows)) for rows in torch.split(hidden_SM, LOGIT_ROWS)]
        stacked = torch.stack([states[kind] for kind in self._kinds], dim=1)
        return stacked.to("cpu", torch.bfloat16), torch.cat(best).to("cpu", torch.int32)
