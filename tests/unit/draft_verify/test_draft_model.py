"""The `draft_model` backend where the smaller model knows fewer positions than the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench_backends.draft_model import DraftModel
from tests import tiny


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_past_its_positions_a_smaller_model_drafts_nothing(tmp_path: Path, family: str) -> None:
    small, few = len(tiny.PROMPT) + 9, {"n_positions": len(tiny.PROMPT) + 9} if family == "gpt2" else {}
    target = tiny.load(tiny.make_model(tmp_path / "target", family))
    tiny.make_model(tmp_path / "small", family, seed=1, num_hidden_layers=1, max_position_embeddings=small, **few)
    options = parse_options("d", DraftModel.Options, {"model": str(tmp_path / "small")})
    backend = DraftModel(options, BackendContext("d", target, "auto", ("cpu",), 1, 0))
    backend.load()
    request = tiny.greedy(tiny.PROMPT, 30)
    backend.prepare(request)
    steps = list(backend.generate(request))
    assert [token for step in steps for token in step.token_ids] == list(decode(target.decoder, request))
    assert steps[1].drafted == 4
    assert steps[-1].drafted == steps[-2].drafted == 0
