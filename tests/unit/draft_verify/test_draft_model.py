"""The `draft_model` backend where the smaller model knows fewer positions than the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdbench.backend import BackendContext, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.models.target import Target
from spdbench_backends.draft_model import DraftModel
from spdbench_backends.hf import HF
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


def drafted_by(small: Path, target: Target, backend: type[DraftModel | HF]) -> DraftModel | HF:
    option = "assistant" if backend is HF else "model"
    options = parse_options("d", backend.Options, {option: str(small)})
    return backend(options, BackendContext("d", target, "auto", ("cpu",), 1, 0))


@pytest.mark.parametrize("sizes", [(262, 320), (320, 262)])
@pytest.mark.parametrize("backend", [DraftModel, HF])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vocabularies_of_one_tokenizer_may_be_padded_differently(
    tmp_path: Path, sizes: tuple[int, int], backend: type[DraftModel | HF], family: str
) -> None:
    """Untrained padding is drafted and given as often as any token, so that both sides meet ids of the other alone."""
    target = tiny.load(tiny.make_model(tmp_path / "target", "llama", vocab_size=sizes[0]))
    small = tiny.make_model(tmp_path / "small", family, vocab_size=sizes[1], seed=3, num_hidden_layers=1)
    made = drafted_by(small, target, backend)
    made.load()
    for seed in range(3):
        request = tiny.greedy(tuple(range(20 + seed, 40)), 24)
        made.prepare(request)
        ids = [token for step in made.generate(request) for token in step.token_ids]
        assert ids == list(decode(target.decoder, request))
    made.close()


@pytest.mark.parametrize("backend", [DraftModel, HF])
def test_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path, backend: type[DraftModel | HF]) -> None:
    target = tiny.load(tiny.make_model(tmp_path / "target"))
    small = tiny.make_model(tmp_path / "small")
    tiny.swap_tokens(small, "x", "y")
    with pytest.raises(InputError, match="so its drafts would mean other words"):
        drafted_by(small, target, backend).load()
