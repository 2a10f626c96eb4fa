"""Which prompts of the shipped suites are on this machine, without a look at any network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spdbench.errors import InputError
from spdbench.prompts.sources import HubSource
from spdbench.prompts.suite import prompts_at_hand


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(HubSource, "load", refuse)


def test_suite_that_holds_its_prompts_is_always_at_hand() -> None:
    found = prompts_at_hand(None)
    assert len(found["quick"]) >= 34
    assert "gsm8k" not in found


def test_file_below_the_data_folder_is_found_whole(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question_id": i, "turns": [f"What is {i}?"]} for i in range(100)]
    (tmp_path / "gsm8k" / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(prompts_at_hand(tmp_path)["gsm8k"]) == 100


def test_data_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        prompts_at_hand(tmp_path / "none")
