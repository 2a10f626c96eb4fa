"""How deep drafts of a given acceptance are: deep enough for a mean length, no deeper than rates are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spdbench.backend import BackendContext, parse_options
from spdbench.errors import InputError
from spdbench.models.target import Target
from spdbench.profiles.profile import RowCosts
from spdbench_backends.draft_model import DraftModel
from spdbench_backends.drafting import DraftVerify
from spdbench_backends.eagle.backend import Eagle
from spdbench_backends.medusa.backend import Medusa
from tests import tiny

Kind = type[Eagle] | type[Medusa] | type[DraftModel]


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Target:
    return tiny.load(tiny_model)


@pytest.fixture(autouse=True)
def _further_rows_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftVerify, "_row_costs", lambda *_: RowCosts((1, 64), (1.0, 64.0)))


def started(kind: Kind, target: Target, drafter: str, options: dict[str, str]) -> Eagle | Medusa | DraftModel:
    context = BackendContext("d", target, drafter, ("cpu",), 1, 0)
    backend = kind(parse_options("d", kind.Options, options), context)
    backend.load()
    return backend


def drafted(backend: Eagle | Medusa | DraftModel) -> tuple[int, float]:
    """The most drafts of a round, and the mean acceptance length."""
    request = tiny.greedy(tiny.PROMPT, 200)
    backend.prepare(request)
    rounds = list(backend.generate(request))[1:-1]
    return max(step.drafted for step in rounds), 1 + sum(step.accepted for step in rounds) / len(rounds)


@pytest.mark.parametrize(
    ("kind", "options", "tau"),
    [
        (Eagle, {}, 2.2),
        (Eagle, {}, 10.5),
        (Eagle, {"tree": "chain"}, 5.5),
        (Eagle, {"tree": "dynamic"}, 7.5),
        (Medusa, {}, 2.2),
        (Medusa, {"tree": "chain"}, 7.5),
        (DraftModel, {}, 5.5),
    ],
)
def test_without_an_option_drafts_are_as_deep_as_a_mean_length_takes(
    target: Target, kind: Kind, options: dict[str, str], tau: float
) -> None:
    _, length = drafted(started(kind, target, f"forced:tau={tau}", options))
    assert length == pytest.approx(tau, abs=0.6)


@pytest.mark.parametrize(
    ("kind", "options", "tau", "advice"),
    [
        (Eagle, {"depth": "1"}, 2.2, "drafts 1; give -o d.depth=2, or"),
        (Eagle, {"tree": "static"}, 7, "drafts 5; give -o d.tree=chain -o d.depth=6, or"),
        (Eagle, {"tree": "dynamic", "total_tokens": "3"}, 4, "drafts 2; give -o d.depth=3 -o d.total_tokens=4, or"),
        (Eagle, {}, 34, "it drafts 32 at most, or"),
        (Medusa, {"heads": "2"}, 4, "drafts 2; give -o d.heads=3, or"),
        (Medusa, {"tree": "mc_sim_7b_63"}, 6.5, "give -o d.tree=chain -o d.heads=6, or"),
        (DraftModel, {"num_tokens": "1"}, 2.2, "drafts 1; give -o d.num_tokens=2, or"),
    ],
)
def test_too_short_drafts_are_refused_with_the_options_to_give(
    target: Target, kind: Kind, options: dict[str, str], tau: float, advice: str
) -> None:
    with pytest.raises(InputError, match=re.escape(advice)):
        started(kind, target, f"forced:tau={tau:g}", options)
    given = dict(re.findall(r"-o d\.(\w+)=(\w+)", advice))
    if given:
        started(kind, target, f"forced:tau={tau:g}", options | given)


@pytest.mark.parametrize(
    ("kind", "options"), [(Eagle, {}), (Eagle, {"depth": "6"}), (Medusa, {}), (DraftModel, {"num_tokens": "6"})]
)
def test_rates_of_a_result_end_where_its_positions_do(
    target: Target, tmp_path: Path, kind: Kind, options: dict[str, str]
) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"summary": {"overall": {"acceptance_by_position": [1.0, 1.0]}}}))
    assert drafted(started(kind, target, f"forced:{result}", options))[0] <= 2
