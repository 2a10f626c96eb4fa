"""An audit's verdict follows from what was found, and both of its renderings say it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from rich.console import Console

from spdbench.judge.audit import BackendAudit, Ends, PromptDivergence, Restarts
from spdbench.judge.metrics.chi_square import chi_square
from spdbench.render.audit import to_json, to_terminal
from spdbench.types import FirstDivergence

FAIR = {0: 0.5, 1: 0.5}


def audit(**found: Any) -> BackendAudit:
    outcomes = Counter(found.pop("outcomes", {"identical": 4}))
    return BackendAudit("mine", "eagle", "compiled", outcomes=outcomes, **found)


@pytest.mark.parametrize(
    ("found", "verdict", "code", "says"),
    [
        ({}, "lossless", 0, "4 of 4 outputs are plain decoding's"),
        ({"outcomes": {"identical": 3, "near_tie": 1}}, "lossless but for rounding", 0, "1 differ first where both"),
        ({"outcomes": {"real": 1, "tie": 2}}, "NOT lossless", 1, "1 differ by more than a tie"),
        ({"ends": Ends(4, wrong=1)}, "NOT lossless", 1, "1 of 4 answers change if one of their tokens ends"),
        ({"sampled": chi_square(Counter({0: 900, 1: 100}), FAIR)}, "NOT lossless", 1, "do not follow"),
        ({"sampled": chi_square(Counter({0: 500, 1: 499, 2: 1}), FAIR)}, "NOT lossless", 1, "excluded by top-k"),
        ({"sampled": chi_square(Counter({0: 510, 1: 490}), FAIR)}, "lossless", 0, "sampled answers follow"),
        ({"restarts": Restarts(100, 9)}, "lossless", 0, "91 of 100 rounds drafted again"),
        ({"restarts": Restarts(100, 10)}, "faulty", 1, "in 10 of 100 rounds"),
        ({"restarts": Restarts(10, 2)}, "lossless", 0, "8 of 10 rounds"),
        ({"restarts": Restarts(10, 3)}, "faulty", 1, "in 3 of 10 rounds"),
        ({"ends": Ends(4, overrun=2)}, "faulty", 1, "2 of 4 answers go on after the end"),
        ({"failed": ["q1: lost"]}, "faulty", 1, "1 requests failed, first: q1: lost"),
        ({"outcomes": {"identical": 3, "unclassified": 1}}, "unknown", 3, "of 1 it cannot be known"),
        ({"outcomes": {}}, "unknown", 3, "unknown"),
        ({"not_audited": "it is lossy"}, "not audited", 3, "not audited: it is lossy."),
    ],
)
def test_the_verdict_and_what_it_rests_on(found: dict[str, Any], verdict: str, code: int, says: str) -> None:
    made = audit(**found)
    assert (made.verdict, made.exit_code) == (verdict, code)
    assert says in made.sentence


def test_each_divergence_has_a_row_with_its_numbers() -> None:
    near = FirstDivergence("near_tie", 7, 5, 9, 2.5, 2.25, 0.25, 0.5, "widths 1 and 4")
    ends = FirstDivergence("real", 3, 5, None, reason="one output ends where the other goes on")
    found = [PromptDivergence("q1", 0, "cat", "dog", near), PromptDivergence("q2", 1, "a", "", ends)]
    made = audit(outcomes={"near_tie": 1, "real": 1}, divergences=found)
    text = to_terminal("An audit", [made], Console(width=160))
    first, second = [line for line in text.splitlines() if line.startswith("mine  ")]
    assert first.split() == ["mine", "q1", "7", "cat", "dog", "2.5", "2.25", "0.25", "0.5", "near", "tie"]
    assert second.split()[:5] == ["mine", "q2", "turn", "1", "3"]
    assert second.rstrip().endswith("REAL")
    assert "floor of widths 1 and 4." in text
    assert "q2: one output ends where the other goes on." in text


def test_json_holds_the_verdict_and_the_test_of_sampling() -> None:
    sampled = chi_square(Counter({0: 900, 1: 100}), FAIR)
    content = json.loads(to_json({"suite": "quick"}, [audit(sampled=sampled)]))
    (backend,) = content["backends"]
    assert (content["schema"], content["suite"]) == ("spdbench.audit/1", "quick")
    assert (backend["verdict"], backend["outcomes"]) == ("NOT lossless", {"identical": 4})
    assert backend["sampled"]["p_value"] == sampled.p_value
    assert 0 < backend["sampled"]["detectable_total_variation"] < 1
