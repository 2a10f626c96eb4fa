"""`spdbench answers`: what was answered, as text, labels side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spdbench.cli.main import run

BASELINES = Path(__file__).resolve().parents[2] / "results" / "baselines"


def edited(folder: Path, label: str, **changes: object) -> Path:
    """A copy of a baseline whose first run is changed."""
    head, *lines = (BASELINES / f"quick__{label}__smollm2.json").read_text("utf-8").splitlines()
    result = json.loads("\n".join([head, *lines]))
    result["runs"][0] |= changes
    file = folder / f"quick__{label}__smollm2.json"
    file.write_text(json.dumps(result), "utf-8")
    return file


def first_prompt() -> str:
    return str(json.loads((BASELINES / "quick__vanilla__smollm2.json").read_text("utf-8"))["runs"][0]["prompt_id"])


def test_an_equal_answer_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["answers", str(BASELINES), "--prompt", first_prompt()]) == 0
    shown = capsys.readouterr().out
    assert shown.count("    as eagle\n") == 5
    assert shown.splitlines()[0].startswith(f"{first_prompt()} (")
    assert max(map(len, shown.splitlines())) <= 80


def test_an_answer_that_differs_is_shown_and_commands_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = edited(tmp_path, "vanilla")
    other = edited(tmp_path, "spd", text="\x1b[31mred\u202e\n\nand more")
    assert run(["answers", str(same), str(other), "--prompt", first_prompt()]) == 0
    shown = capsys.readouterr().out
    assert "    \\x1b[31mred\\u202e\n\n    and more\n" in shown
    assert "as vanilla" not in shown


def test_names_with_line_breaks_and_control_characters_are_shown_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\nb\r\x1b[2J\x9bm\u2028c"
    file = edited(tmp_path, "vanilla", prompt_id=name, category="c\nd", text="It is\x9b\u202e 7.")
    assert run(["answers", str(file), "--prompt", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a\\nb\\r\\x1b[2J\\x9bm\\u2028c (c\\nd), turn 0\n  vanilla: ")
    assert run(["answers", str(file), "--prompt", name, "--json"]) == 0
    line = capsys.readouterr().out
    assert line.isascii()
    assert json.loads(line)["prompt_id"] == name
    assert run(["answers", str(file), "--prompt", "\x1bx\ny"]) == 2
    assert "'\\x1bx" in capsys.readouterr().err


def test_as_json_each_answer_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["answers", str(BASELINES), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["label"] for line in lines} == {"vanilla", "spd", "ppsd", "eagle", "medusa", "ngram"}
    assert len({(line["prompt_id"], line["turn"]) for line in lines}) * 6 == len(lines)
    assert all(line["text"] and line["num_new_tokens"] for line in lines)


def test_a_prompt_that_is_not_there_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["answers", str(BASELINES), "--prompt", first_prompt() + "x"]) == 2
    assert f"did you mean '{first_prompt()}'?" in capsys.readouterr().err
