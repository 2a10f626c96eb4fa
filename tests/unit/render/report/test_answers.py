"""The answers of a page: each text once, and of kept drafts every accepted, rejected, dropped and own token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.judge.comparison.compare import Table, compare
from spdbench.judge.loaded import load
from spdbench.judge.results.kept import DraftColumns
from spdbench.judge.results.schema import Result
from spdbench.judge.timeline import step_tokens
from spdbench.render.report.answers import LINE_END, answers, by_column
from spdbench.types import Drafted
from tests.builders import make_backend, make_result, make_run, make_steps
from tests.unit.render.report.reports import HOSTILE, WRONG, results, table


def answers_by_label(of: Table, prompt: str = "p0") -> dict[str, Any]:
    found = answers(of)
    return {label: found["texts"][place] for _, _, place, labels in found["prompts"][prompt] for label in labels}


def test_equal_texts_are_there_once() -> None:
    found = answers(table(results(text="Four.")))
    assert found["texts"] == ["Four."]
    assert found["prompts"]["p3"] == [[0, 0, 0, ["vanilla", "eagle", "medusa", "spd"]]]


def test_kept_drafts_give_every_token_of_every_step() -> None:
    made = results(detailed=True)
    found = answers_by_label(table(made))
    assert isinstance(found["vanilla"], str)
    for label in ("eagle", "medusa", "spd"):
        run = made[f"quick__{label}.json"].runs[0]
        shown = {step[0]: step[2:] for step in found[label]}
        for number, tokens in enumerate(step_tokens(run)):
            ids = {"a": tokens.accepted, "r": tokens.rejected, "d": tokens.dropped, "o": tokens.own}
            assert shown.get(number, []) == [f"{code}<{token}>" for code, each in ids.items() for token in each]
        committed = [token[1:] for step in found[label] for token in step[2:] if token[0] in "ao"]
        assert committed == [f"<{token}>" for token in run.output_ids]
    assert f"r<{WRONG}>" in str(found["spd"])


def test_columns_hold_the_steps() -> None:
    texts = ["plain", [[0, 5, "o<1>"], [2, 9, "a<2>", "r<3>", "o"]]]
    columns = [[0, 2], [5, 4], ["o", "aro"], [["<1>"], ["<2>", "<3>", ""]]]
    assert by_column({"texts": texts, "prompts": {}}) == {"texts": ["plain", columns], "prompts": {}}


def test_what_a_model_writes_is_on_one_line_and_turns_nothing_around() -> None:
    found = answers_by_label(replace(table(results(detailed=True)), decode=lambda ids: f"{HOSTILE}\n" * len(ids)))
    tokens = "".join(token for step in found["eagle"] for token in step[2:])
    assert LINE_END in tokens
    assert HOSTILE[:20] in tokens
    assert not set(tokens) & {"\n", "\x1b", "\u202e"}


def of_drafts(drafts: DraftColumns) -> Result:
    steps = make_steps([1, 1], drafted=[0, 1], judged=[0, 1], accepted=[0, 0], forwards=[1, 61])
    return make_result([make_run(steps, output_ids=[5, 6], drafted_tokens=drafts)], make_backend("draft_verify"))


def test_a_wide_tree_shows_how_many_drafts_there_were() -> None:
    wide = of_drafts(DraftColumns.of([None, Drafted(tuple(range(100, 160)), (-1,) * 60)]))
    [compared] = compare([load(wide, "a.json")])
    assert answers_by_label(compared)["eagle"][1][2:] == ["r<100>", "r<101>", "r<102>", "r and 57 more", "o<6>"]


def test_drafts_of_other_steps_are_one_message() -> None:
    [compared] = compare([load(of_drafts(DraftColumns.of([None])), "a.json")])
    with pytest.raises(InputError, match=r"a\.json: prompt p0: drafted_tokens: 1 steps, and the run has 2"):
        answers(compared)
