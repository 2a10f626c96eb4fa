"""A recurrent state that no rollback restores: `audit` names it, on a small stub of a hybrid model.

The stub adds a decaying sum of all tokens' embeddings to the output of the real layers, so that a token's logits depend
on every token read before it, rejected ones included unless the state is restored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spdbench.models.target import Target
from tests.cli.run_helpers import spdbench, write_suite

DECAY, WEIGHT = 0.5, 20.0


class RecurrentCache:
    """A cache of keys and values, and the state after each token; `restores` if a rollback restores it too."""

    def __init__(self, inner: Any, width: int, *, restores: bool) -> None:
        self._inner = inner
        self._restores = restores
        self.states = [torch.zeros(width)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def rollback(self, mark: int) -> None:
        self._inner.rollback(mark)
        self._restore()

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        self._inner.keep(mark, chosen)
        self._restore()

    def _restore(self) -> None:
        if self._restores:
            del self.states[self._inner.length + 1 :]


class RecurrentDecoder:
    """A decoder of chains with a recurrent part."""

    takes_trees = False

    def __init__(self, inner: Any, *, restores: bool) -> None:
        self._inner = inner
        self._restores = restores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def new_cache(self, capacity: int, layers: range | None = None, num_snapshots: int = 0) -> RecurrentCache:
        inner = self._inner.new_cache(capacity, layers, num_snapshots)
        return RecurrentCache(inner, self._inner.config.hidden_size, restores=self._restores)

    def forward(self, hidden_SM: Tensor, start: int, cache: RecurrentCache, *words: Any, **more: Any) -> Any:
        output_SM, states = self._inner.forward(hidden_SM, start, cache._inner, *words, **more)
        rows = []
        for row_M in hidden_SM:
            cache.states.append(DECAY * cache.states[-1] + row_M)
            rows.append(cache.states[-1])
        return output_SM + WEIGHT * torch.stack(rows), states


@pytest.fixture
def audit(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    def run(*, restores: bool) -> dict[str, Any]:
        original = Target.load_layers
        monkeypatch.setattr(
            Target,
            "load_layers",
            lambda self, layers=None: RecurrentDecoder(original(self, layers), restores=restores),
        )
        suite = write_suite(tmp_path, decoding={"max_new_tokens": 24, "temperature": 0})
        file = tmp_path / "audit.json"
        common = ("-m", tiny_model, "--dtype", "float32", "--devices", "cpu", "--json", file)
        said = spdbench("audit", suite, *common, "-b", "eagle", "-o", "eagle.tree=chain", "--drafter", "oracle:0.6")
        (found,) = json.loads(file.read_text(encoding="utf-8"))["backends"]
        return {"code": said.code, **found}

    return run


def test_a_state_that_is_restored_is_sound(audit: Callable[..., dict[str, Any]]) -> None:
    found = audit(restores=True)
    assert (found["code"], found["verdict"]) == (0, "lossless"), found["sentence"]


def test_a_recurrent_state_that_is_not_rolled_back(audit: Callable[..., dict[str, Any]]) -> None:
    found = audit(restores=False)
    assert (found["code"], found["verdict"]) == (1, "NOT lossless"), found["sentence"]
    assert found["outcomes"]["real"] > 0
