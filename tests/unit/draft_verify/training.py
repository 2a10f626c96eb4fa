"""Batches of a tiny target's own greedy text, as the training loop makes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
import torch

from spdbench.decoding.autoregressive import decode
from spdbench.models.decoder import Decoder
from spdbench.training.recipe import Batch, Provenance, Recipe
from tests import tiny

DRAFT_IDS = torch.arange(0, 262, 2)
ABOUT = Provenance("tiny", "f" * 64, "d" * 64, 1234, 7, (0.5, 0.25))


def greedy_text(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """A prompt and the target's answer."""
    return [*prompt, *decode(decoder, tiny.greedy(tuple(prompt), count))]


@torch.inference_mode()
def make_batch(decoder: Decoder, texts: Sequence[tuple[Sequence[int], int]], hidden_indices: Collection[int]) -> Batch:
    """Texts with the length of their prompts, side by side."""
    shape = (len(texts), max(len(ids) for ids, _ in texts))
    ids_BS, argmax_BS = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    valid_BS, answers_BS = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    states = {index: torch.zeros(*shape, decoder.config.hidden_size) for index in hidden_indices}
    for row, (ids, first) in enumerate(texts):
        size = len(ids)
        hidden, found = decoder.forward(
            decoder.embed(torch.tensor(ids)), 0, decoder.new_cache(size), hidden_indices=hidden_indices
        )
        ids_BS[row, :size], argmax_BS[row, :size] = torch.tensor(ids), decoder.logits(hidden).argmax(dim=-1)
        valid_BS[row, :size] = answers_BS[row, first - 1 : size - 1] = True
        for index, state in found.items():
            states[index][row, :size] = state
    return Batch(ids_BS=ids_BS, valid_BS=valid_BS, answers_BS=answers_BS, states=states, argmax_BS=argmax_BS)


def answers(decoder: Decoder, count: int = 24) -> list[tuple[list[int], int]]:
    """Three prompts of different lengths with the target's answers."""
    prompts = [list(range(first, first + size)) for first, size in ((30, 11), (70, 5), (120, 8))]
    return [(greedy_text(decoder, prompt, count), len(prompt)) for prompt in prompts]


def train(recipe: Recipe, batch: Batch, steps: int, rate: float = 1e-2) -> list[float]:
    """The losses of some steps."""
    optimizer = torch.optim.Adam(recipe.module.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss, _ = recipe.loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def round_weights(recipe: Recipe) -> None:
    """To what files hold."""
    for parameter in recipe.module.parameters():
        parameter.copy_(parameter.bfloat16())


def check_that_silence_costs_nothing(recipe: Recipe, batch: Batch) -> None:
    """A batch without answers has a loss of 0 and counts no draft."""
    silent = replace(batch, answers_BS=torch.zeros_like(batch.answers_BS))
    loss, figures = recipe.loss(silent)
    loss.backward()  # type: ignore[no-untyped-call]
    assert (loss.item(), dict(figures)) == (0.0, {})
    assert not any(recipe.acceptance(silent).judged)


def check_that_bfloat16_changes_little(recipe: Recipe, batch: Batch) -> None:
    """And brings no warnings: what is summed and exponentiated stays in float32."""
    torch.manual_seed(0)
    exact, _ = recipe.loss(batch)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = recipe.loss(batch)
    rounded.backward()  # type: ignore[no-untyped-call]
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
