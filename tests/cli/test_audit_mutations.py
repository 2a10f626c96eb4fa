"""Deliberately broken engines: `audit` names the fault of each, and finds none in the engines as they are.

Each test breaks one line of the real engine, and audits it on a tiny random model with a drafter that is right about
half of the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdbench.decoding import verify as verification
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Speculation
from spdbench.decoding.tree import DraftTree, Tree
from spdbench.decoding.verify import Draft, Rule
from spdbench.models.attention_context import TreeRows
from spdbench.models.kv_cache import KVCache
from spdbench.types import Step
from spdbench_backends.draft_model import ModelDrafter
from tests import tiny
from tests.cli.run_helpers import Said, spdbench, write_suite

Audit = Callable[..., tuple[Said, dict[str, Any]]]

CHAIN = ("-b", "draft_model", "-o", "draft_model.num_tokens=4")
TREE = ("-b", "eagle", "-o", "eagle.tree=static", "--drafter", "eagle=oracle:0.6")
SAMPLED = ("--temperature", "0.5", "--draws", "250", "--limit", "2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one that is nearly the same: it drafts for the first."""
    folder = tmp_path_factory.mktemp("audited")
    target = tiny.make_model(folder / "target", num_hidden_layers=3)
    drafter = tiny.make_model(folder / "drafter", num_hidden_layers=3)
    path = drafter / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor + 0.04 * torch.randn(tensor.shape, generator=generator) for name, tensor in load_file(path).items()
    }
    save_file(noisy, path, metadata={"format": "pt"})
    return target, drafter


@pytest.fixture
def audit(models: tuple[Path, Path], tmp_path: Path) -> Audit:
    """Runs `audit` with the words given; returns what it said, and the JSON of the one backend that it audited."""
    target, drafter = models

    def run(*words: str) -> tuple[Said, dict[str, Any]]:
        suite = write_suite(tmp_path, decoding={"max_new_tokens": 32, "temperature": 0})
        common = ("-m", str(target), "--dtype", "float32", "--devices", "cpu", "--threads", "1")
        drafts = ("-o", f"draft_model.model={drafter}") if "draft_model" in words else ()
        said = spdbench("audit", suite, *common, *words, *drafts, "--json", str(tmp_path / "audit.json"))
        (backend,) = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["backends"]
        return said, backend

    return run


def later(original: Callable[..., Rule], token_after: Callable[..., int]) -> Callable[..., Rule]:
    """An accept rule with another token after the accepted ones."""

    def broken(logits_NV: Tensor, draft: DraftTree, sampler: Sampler) -> Rule:
        rule = original(logits_NV, draft, sampler)
        return rule._replace(token_after=lambda node, rejected: token_after(rule, logits_NV, sampler, node, rejected))

    return broken


@pytest.mark.parametrize("words", [CHAIN, TREE, (*CHAIN, *SAMPLED)], ids=["chain", "tree", "sampled"])
def test_a_sound_engine_has_no_finding(audit: Audit, words: Sequence[str]) -> None:
    """The control of all tests below: the same audits of engines that nobody broke."""
    said, found = audit(*words)
    assert (said.code, found["verdict"]) == (0, "lossless"), said.out + said.err
    if words is CHAIN:
        assert found["restarts"]["compared"] >= 6
        assert found["ends"]["compared"] == 4


def test_a_rollback_off_by_one(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    original = KVCache.keep

    def keep(self: KVCache, mark: int, chosen: Sequence[int]) -> None:
        original(self, mark, chosen)
        self.length -= len(chosen) > 1  # one accepted row too few

    monkeypatch.setattr(KVCache, "keep", keep)
    said, found = audit(*CHAIN)
    assert (said.code, found["verdict"]) == (1, "NOT lossless"), said.out + said.err
    assert found["outcomes"]["real"] > 0


def test_rows_of_an_accepted_path_that_are_not_moved_together(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: KVCache, mark: int, chosen: Sequence[int]) -> None:
        self.length = mark + len(chosen)

    monkeypatch.setattr(KVCache, "keep", keep)
    said, found = audit(*TREE)
    assert (said.code, found["verdict"]) == (1, "NOT lossless"), said.out + said.err


def test_positions_off_by_one_after_a_rejection(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted:
        def __init__(self, decoder: Any) -> None:
            self._inner = decoder

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def forward(self, hidden_SM: Tensor, start: int, cache: Any, **more: Any) -> Any:
            return self._inner.forward(hidden_SM, start + 1, cache, **more)

    original = Speculation._round

    def broken(self: Speculation, room: int) -> Step:
        step = original(self, room)
        if step.judged > step.accepted and "is_shifted" not in vars(self):
            vars(self).update(is_shifted=True, _decoder=Shifted(self._decoder))
        return step

    monkeypatch.setattr(Speculation, "_round", broken)
    said, found = audit(*CHAIN)
    assert (said.code, found["verdict"]) == (1, "NOT lossless"), said.out + said.err


def test_a_mask_in_which_siblings_see_each_other(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tree.rows.func  # type: ignore[attr-defined]

    def leaking(self: Tree) -> TreeRows:
        rows: TreeRows = original(self)
        same_parent = self.parents_N[:, None] == self.parents_N[None]
        return TreeRows(rows.depths_S, rows.visible_SW | same_parent)

    monkeypatch.setattr(Tree, "rows", property(leaking))
    said, found = audit(*TREE)
    assert (said.code, found["verdict"]) == (1, "NOT lossless"), said.out + said.err


def test_an_end_of_sequence_that_is_ignored_inside_a_step(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(self: Speculation) -> Iterator[Step]:
        with torch.inference_mode():
            request = self._request
            step, num_new = Step((self._prefill(),), 0, 0, 0, float(len(request.prompt_ids))), 1
            yield step
            while num_new < request.max_new_tokens and step.token_ids[-1] not in request.eos_ids:
                step = self._round(request.max_new_tokens - num_new)
                yield step
                num_new += len(step.token_ids)

    monkeypatch.setattr(Speculation, "steps", steps)
    said, found = audit(*CHAIN)
    assert (said.code, found["verdict"]) == (1, "faulty"), said.out + said.err
    assert found["ends"]["overrun"] > 0
    assert "go on after the end of sequence" in said.out.replace("\n", " ")


def test_a_draft_cache_with_the_row_of_a_rejected_token(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of a rejected draft stays where the target's own token goes. Outputs stay right; drafts get worse."""
    accept, next_logits = ModelDrafter.accept, ModelDrafter._next
    stale: dict[int, tuple[int, Tensor, Tensor]] = {}

    def broken_accept(self: Any, token_ids: Sequence[int], features: Any) -> None:
        at, cache = len(self._ids) + len(token_ids) - 1, self._cache
        if cache.length > at:
            stale[id(cache)] = at, cache._keys[:, :, at].clone(), cache._values[:, :, at].clone()
        accept(self, token_ids, features)

    def broken_next(self: Any, ids: Sequence[int]) -> Tensor:
        logits_V, cache = next_logits(self, ids), self._cache
        if (kept := stale.pop(id(cache), None)) is not None:
            at, keys, values = kept
            cache._keys[:, :, at], cache._values[:, :, at] = keys, values
        return logits_V

    monkeypatch.setattr(ModelDrafter, "accept", broken_accept)
    monkeypatch.setattr(ModelDrafter, "_next", broken_next)
    said, found = audit(*CHAIN)
    assert (said.code, found["verdict"]) == (1, "faulty"), said.out + said.err
    assert found["outcomes"] == {"identical": 4}
    assert "its drafter keeps a state of tokens that were rejected" in said.out.replace("\n", " ")


def test_the_rule_for_drawn_drafts_on_the_most_likely_ones(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_logits(logits_V: Tensor, sampler: Sampler) -> Draft:
        return Draft(int(logits_V.argmax()), sampler.probabilities(logits_V))

    monkeypatch.setattr(Draft, "from_logits", from_logits)
    said, found = audit(*CHAIN, *SAMPLED)
    assert (said.code, found["verdict"]) == (1, "NOT lossless"), said.out + said.err
    assert "do not follow the target's exact distribution" in said.out.replace("\n", " ")


def test_a_bonus_token_from_logits_that_are_not_warped(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    def token_after(rule: Rule, logits_NV: Tensor, sampler: Sampler, node: int, rejected: list[int]) -> int:
        return rule.token_after(node, rejected) if rejected else sampler.draw(logits_NV[node].softmax(-1))

    monkeypatch.setattr(verification, "sampled_by_node", later(verification.sampled_by_node, token_after))
    said, found = audit(*CHAIN, *SAMPLED)
    assert (said.code, found["verdict"]) == (1, "NOT lossless"), said.out + said.err


def test_a_residual_from_the_wrong_row(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    def token_after(rule: Rule, _logits: Tensor, _sampler: Sampler, node: int, rejected: list[int]) -> int:
        return rule.token_after(node - 1 if rejected and node else node, rejected)

    monkeypatch.setattr(verification, "sampled_by_node", later(verification.sampled_by_node, token_after))
    said, found = audit(*CHAIN, *SAMPLED)
    assert (said.code, found["verdict"]) == (1, "NOT lossless"), said.out + said.err
