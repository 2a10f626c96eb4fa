"""What a draft reads: the drafters that ship, by hand."""

from __future__ import annotations

from contextlib import closing

import pytest

from spdbench.cli.project.drafter_sizes import draft_parameters, reached
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
        ("spd", 2 * (LAYER + 128) + (1 + 2 + 3 + 4 + 5 + 6) * WIDTH**2 + HEAD, 0),
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


def test_a_head_for_any_number_of_stages_reads_the_row_types_that_are_reached() -> None:
    """With anchors at sixths of 30 layers: in two stages tokens have passed 0, 15 and 30 layers."""
    config = {"stage_counts": [2, 3], "num_stages": 2, "num_layers": 30, "aggr_feature_bound": [0, 5, 10, 15, 20, 30]}
    shapes = {f"aggr_projs.{kind}.weight": (WIDTH, (kind + 1) * WIDTH) for kind in range(6)} | {"other": (4, 4)}
    kinds = {
        stages: {int(name[11]) for name in reached(config, shapes, stages) if name != "other"} for stages in (2, 3, 5)
    }
    assert kinds == {2: {0, 3, 5}, 3: {0, 2, 4, 5}, 5: {0, 1, 2, 3, 4, 5}}
    assert reached({**config, "stage_counts": None}, shapes, 2) == shapes
    for wrong in ({"num_layers": None}, {"aggr_feature_bound": None}, {"num_layers": 1}):
        with pytest.raises(ValueError, match="2 stages"):
            reached({**config, **wrong}, shapes, 2)
