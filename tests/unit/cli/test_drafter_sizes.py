"""What a draft reads: the drafters that ship, by hand."""

from __future__ import annotations

from contextlib import closing

import pytest

from spdbench.cli.project.drafter_sizes import draft_parameters
from spdbench.input_files import read_json
from spdbench.models.checkpoints.folders import drafter_folders
from spdbench.models.checkpoints.weights import Checkpoint

WIDTH, FFN, KEYS, VOCAB, DRAFTED = 576, 1536, 192, 49_152, 8_192
HEAD = DRAFTED * WIDTH
LAYER = 2 * WIDTH * WIDTH + 2 * KEYS * WIDTH + 3 * FFN * WIDTH + 2 * WIDTH
"""Query and output, key and value, feed-forward, two norms."""
OF_EAGLE = LAYER + WIDTH * WIDTH + 2 * KEYS * WIDTH + 2 * WIDTH
"""Query, key and value read twice the width; two norms more."""


@pytest.mark.parametrize(
    ("name", "each", "once"),
    [
        ("spd-3", 2 * (LAYER + 128) + (1 + 2 + 3 + 4) * WIDTH**2 + HEAD, 0),
        ("ppsd-3", 2 * LAYER + WIDTH + VOCAB * WIDTH, 0),
        ("eagle3", OF_EAGLE + HEAD, 3 * WIDTH**2),
        ("medusa", WIDTH**2 + WIDTH, HEAD),
    ],
)
def test_a_draft_reads_the_drafters_matrices_and_the_head_that_it_borrows(name: str, each: int, once: int) -> None:
    folder = drafter_folders()[-1] / name
    config = read_json(folder / "config.json")
    assert isinstance(config, dict)
    with closing(Checkpoint(folder)) as checkpoint:
        shapes = {key: shape for key, shape in checkpoint.shapes().items() if not key.endswith(".scale")}
    assert draft_parameters(config, shapes, VOCAB, WIDTH) == (each, once)
    own = {
        **shapes,
        "lm_head.weight": (config.get("draft_vocab_size") or len(config.get("draft_token_ids", [])) or VOCAB, WIDTH),
    }
    assert draft_parameters(config, own, VOCAB, WIDTH) == (each, once)
    unread = {"embed_tokens.weight": (VOCAB, WIDTH), "d2t": (DRAFTED,), "t2d": (VOCAB,)}
    assert draft_parameters(config, {**shapes, **unread}, VOCAB, WIDTH) == (each, once)
