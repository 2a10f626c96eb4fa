"""The suites that read the field's own files, and the one that cuts a local text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.prompts.suite import Suite, load_suite
from spdbench.types import Prompt

UNFILLED = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"


def put(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return folder


def broken(name: str, data: Path | None) -> str:
    with pytest.raises(InputError) as caught:
        load_suite(name, data)
    return str(caught.value)


def test_spec_bench_reads_its_file_whatever_its_references_are(tmp_path: Path) -> None:
    row = {"question_id": 81, "category": "writing", "turns": ["a", "b"]}
    nested = {"question_id": 161, "category": "rag", "turns": ["c"], "reference": [["x", "y"], ["z"]]}
    put(tmp_path, "spec_bench/question.jsonl", row, nested, {**row, "question_id": 82, "reference": ["p", "q"]})
    suite = load_suite("spec_bench", tmp_path)
    assert [(prompt.id, prompt.category) for prompt in suite.prompts] == [
        ("81", "writing"),
        ("161", "rag"),
        ("82", "writing"),
    ]
    assert [prompt.reference for prompt in suite.prompts] == [None, None, ("p", "q")]
    assert suite.score is None


def test_speed_bench_reads_what_either_script_prepares(tmp_path: Path) -> None:
    row = {"question_id": "a", "category": "coding", "sub_category": "x"}
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    put(tmp_path, "speed_bench/qualitative.jsonl", {**row, "messages": messages})
    expected = (Prompt("a", "coding", ("one", "two")),)
    assert load_suite("speed_bench", tmp_path).prompts == expected
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "speed_bench" / "qualitative.jsonl").unlink()
    (tmp_path / "speed_bench" / "qualitative").mkdir()
    path = tmp_path / "speed_bench" / "qualitative" / "test.parquet"
    parquet.write_table(arrow.Table.from_pylist([{**row, "turns": ["one", "two"]}]), path)
    assert load_suite("speed_bench", tmp_path).prompts == expected


def test_speed_bench_that_was_not_prepared_is_refused(tmp_path: Path) -> None:
    row = {
        "question_id": "a",
        "category": "c",
        "messages": [{"role": "user", "content": f"{UNFILLED}\n\n{{question}}"}],
    }
    put(tmp_path, "speed_bench/qualitative.jsonl", row)
    said = broken("speed_bench", tmp_path)
    assert "line 1: messages: has not been filled in yet" in said
    assert "prepare.py" in said


@pytest.mark.parametrize("name", ["spec_bench", "speed_bench", "sharegpt", "long_context"])
def test_a_suite_without_its_file_says_where_it_is_from(tmp_path: Path, name: str) -> None:
    said = broken(name, tmp_path)
    assert f"spdbench run {name} --data DIR, where DIR/{name}/" in said
    assert {"spec_bench": "hemingkx/Spec-Bench", "speed_bench": "licence"}.get(name, "will do") in said


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("spec_bench", "question.jsonl"),
        ("spec_bench", "data/spec_bench/question.jsonl"),
        ("sharegpt", "sharegpt/ShareGPT_V3.json"),
        ("long_context", "long_context/book.txt"),
    ],
)
def test_a_file_in_another_place_is_named(tmp_path: Path, name: str, found: str) -> None:
    assert f"no such file below {tmp_path}, which has {found}\n" in broken(name, put(tmp_path, found))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!doctype html>\n<title>404</title>", "is a web page; expected one JSON object a line"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
        (json.dumps({"data": []}, indent=1), "is one JSON object over many lines; expected one JSON object a line"),
        ("\n", "holds no prompts"),
    ],
)
def test_a_file_of_another_kind_says_what_it_is(tmp_path: Path, text: str, expected: str) -> None:
    put(tmp_path, "spec_bench/question.jsonl").joinpath("spec_bench/question.jsonl").write_text(text)
    assert f"question.jsonl: {expected}" in broken("spec_bench", tmp_path)


@pytest.mark.parametrize("name", ["sharegpt.json", "sharegpt.jsonl"])
def test_sharegpt_asks_first_turns_and_skips_what_is_no_conversation(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    human, gpt = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    talks = [[human, gpt, {**human, "value": "r"}, gpt], [], [gpt], [{"from": "system", "value": "s"}, human, gpt]]
    odd: list[Any] = [None, 7, {}, [None], [human, None], ["", gpt], [{"from": "human", "value": None}], [{"from": 1}]]
    rows: list[Any] = [{"id": "same", "conversations": talk} for talk in [*talks, *odd]]
    rows += [{"id": "same"}, None, 5, "x", [human]]
    put(tmp_path, f"sharegpt/{name}", *([rows] if name.endswith(".json") else rows))
    assert load_suite("sharegpt", tmp_path).prompts == (
        Prompt("0", "sharegpt", ("q",)),
        Prompt("3", "sharegpt", ("q",), None, ({"role": "system", "content": "s"},)),
    )
    assert capsys.readouterr().err.count("15 of 17 rows are no conversation. The first: ") == 1


def long_context(tmp_path: Path, text: str) -> Suite:
    (tmp_path / "long_context").mkdir(exist_ok=True)
    (tmp_path / "long_context" / "text.txt").write_text(text, encoding="utf-8")
    return load_suite("long_context", tmp_path)


def test_long_contexts_are_cut_from_a_text_at_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"w{number}" for number in range(4000)]
    suite = long_context(tmp_path, " ".join(words))
    assert suite.omit_too_long
    assert [(prompt.id, prompt.category) for prompt in suite.prompts] == [
        (f"{size}-{number}", f"{size} tokens") for size in (1000, 2000, 4000) for number in (0, 1)
    ]
    for prompt in suite.prompts:
        piece = prompt.turns[0].split("\n\n")[1]
        size = 4 * int(prompt.id.split("-")[0])
        assert size - 12 <= len(piece) <= size
        assert set(piece.split()[:-1]) <= set(words)
    assert suite.prompts[0].turns != suite.prompts[1].turns
    assert "too few for 8,000, 16,000, 32,000 tokens, which are omitted" in capsys.readouterr().err


def test_a_text_that_is_too_short_for_any_length(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds 5 characters, and 1,000 tokens take about 4,000; give a longer text"):
        long_context(tmp_path, "a b c" + " " * 5000)
