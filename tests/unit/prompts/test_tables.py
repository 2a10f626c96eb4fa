"""Prompts from CSV and Parquet, and from lists of messages in any of the formats."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.prompts.source import Loaded, Place
from spdbench.prompts.sources import PathSource
from spdbench.types import Prompt

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?", "reasoning_content": "They greet me."},
    {"role": "user", "content": "bye"},
]


def load(source: PathSource, base: Path) -> Loaded:
    return source.load(Place("mine", base, "general"))


def broken(source: PathSource, base: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(source, base)
    return str(caught.value)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(rows), path)


def test_csv_columns(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_bytes('\ufeffn,text,kind\n1,"Say ""a"",\nplease.",talk\n2,hi,\n'.encode())
    source = PathSource(path="q.csv", id="n", prompt="text", category="kind")
    expected = (Prompt("1", "talk", ('Say "a",\nplease.',)), Prompt("2", "general", ("hi",)))
    assert load(source, tmp_path).prompts == expected
    (tmp_path / "q.tsv").write_text("n\ttext\tkind\n2\thi\t\n")
    assert load(source.model_copy(update={"path": "q.tsv"}), tmp_path).prompts == expected[1:]


def test_a_cell_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(f"turns\n{'word ' * 50_000}\n")
    [prompt] = load(PathSource(path="q.csv", id=None), tmp_path).prompts
    assert len(prompt.turns[0]) == 250_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no prompts"),
        (b"turns\n", "holds no prompts"),
        (b"text\nhi\n", "line 2: has no 'turns'. Known: text."),
        (b"turns,turns\na,b\n", "line 1: column 'turns' occurs twice"),
        (b"turns,b\na\n", "line 2: has 1 cells, and the first line names 2 columns"),
        (b'turns\n"a\n', "not CSV"),
        (b"turns\n\xff\n", "not UTF-8"),
        (b"turns,b\n,x\n", "line 2: turns: must be text or a list of texts, not None"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "q.csv").write_bytes(content)
    assert expected in broken(PathSource(path="q.csv", id=None), tmp_path)


def test_parquet_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "q.parquet", [{"question_id": "a", "category": "c", "turns": ["hi", "bye"], "more": 1}])
    assert load(PathSource(path="q.parquet"), tmp_path).prompts == (Prompt("a", "c", ("hi", "bye")),)
    source = PathSource(path="q.parquet", prompt="turn")
    assert "has no column 'turn'; did you mean 'turns'?" in broken(source, tmp_path)
    (tmp_path / "q.parquet").write_bytes(b"PAR1 but no more")
    assert "not a readable parquet file" in broken(PathSource(path="q.parquet"), tmp_path)
    (tmp_path / "q.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "q.parquet: is a pointer of Git LFS" in broken(PathSource(path="q.parquet"), tmp_path)


def test_values_of_parquet_that_python_has_not(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for odd in (
        pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Phobos")),
        pyarrow.array([2**62], pyarrow.timestamp("us")),
        pyarrow.array([b"\xff"]).view(pyarrow.string()),
    ):
        table = pyarrow.table({"question_id": odd, "turns": pyarrow.array(["hi"])})
        parquet.write_table(table, tmp_path / "q.parquet")
        assert "q.parquet: holds values that cannot be read" in broken(PathSource(path="q.parquet"), tmp_path)


def test_answers_in_a_list_of_messages_are_given(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": TALK}))
    [prompt] = load(PathSource(path="q.jsonl", id=None, prompt="messages"), tmp_path).prompts
    assert prompt == Prompt("0", "general", ("bye",), None, tuple(TALK[:3]))
    assert prompt.first_messages == TALK


def test_an_answer_after_the_last_question_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": TALK[1:3]}))
    [prompt] = load(PathSource(path="q.jsonl", id=None, prompt="messages"), tmp_path).prompts
    assert (prompt.turns, prompt.context) == (("hi",), ())


def test_the_model_gives_its_own_answers_where_the_suite_says_so(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": TALK}))
    source = PathSource(path="q.jsonl", id=None, prompt="messages", answers="own")
    [prompt] = load(source, tmp_path).prompts
    assert (prompt.turns, prompt.context) == (("hi", "bye"), (TALK[0],))
    [prompt] = load(source.model_copy(update={"max_turns": 1}), tmp_path).prompts
    assert prompt.turns == ("hi",)


def test_messages_of_tables_without_nested_types(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('turns\n"[{""from"": ""human"", ""value"": ""hi""}]"\n[1] is a list\n[]\n')
    prompts = load(PathSource(path="q.csv", id=None), tmp_path).prompts
    assert [prompt.turns for prompt in prompts] == [("hi",), ("[1] is a list",), ("[]",)]


def test_messages_of_parquet(tmp_path: Path) -> None:
    rows = [{"role": turn["role"], "content": turn["content"]} for turn in TALK]
    write_parquet(tmp_path / "q.parquet", [{"messages": rows}])
    [prompt] = load(PathSource(path="q.parquet", id=None, prompt="messages"), tmp_path).prompts
    assert prompt.first_messages == rows


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "assistant", "content": "a"}], "line 1: messages: has no message of a user to answer"),
        ([{"role": "user", "content": " "}], "line 1: messages: has an empty message of a user"),
        ([{"role": "wizard", "content": "a"}], "line 1: messages.0: role 'wizard' is not known."),
        ([{"role": "tool", "content": "a"}], "line 1: messages.0: calls a tool or holds its answer"),
        ([{"role": "user", "content": 5}], "line 1: messages.0: content must be text, not int"),
        ([{"role": "user", "content": "a"}, "b"], "line 1: messages.1: must be an object with role and content"),
    ],
)
def test_messages_that_no_template_takes(tmp_path: Path, messages: list[Any], expected: str) -> None:
    good = {"messages": TALK}
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [{"messages": messages}, good])))
    source = PathSource(path="q.jsonl", id=None, prompt="messages")
    assert expected in broken(source, tmp_path)
    assert len(load(source.model_copy(update={"skip_odd": True}), tmp_path).prompts) == 1


def test_skipped_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": []}, {"messages": [{"from": "gpt", "value": "a"}]}, {"messages": TALK}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    source = PathSource(path="q.json", id=None, prompt="messages", skip_odd=True)
    assert [prompt.id for prompt in load(source, tmp_path).prompts] == ["2"]
    assert "2 of 3 rows are no conversation. The first: " in capsys.readouterr().err
    (tmp_path / "q.json").write_text(json.dumps(rows[:2]))
    assert "has no message of a user to answer" in broken(source, tmp_path)


def test_empty_cells_are_skipped_where_that_is_asked_for(tmp_path: Path) -> None:
    talk = json.dumps(TALK).replace('"', '""')
    (tmp_path / "q.csv").write_text(f'messages\n"{talk}"\n""\n[]\n"[null]"\n')
    names = ["q.csv", "q.parquet"]
    given = [{"role": turn["role"], "content": turn["content"]} for turn in TALK]
    empty = [None, [], [None], [{"role": None, "content": None}]]
    write_parquet(tmp_path / "q.parquet", [{"messages": messages} for messages in [given, *empty]])
    for name in names:
        source = PathSource(path=name, id=None, prompt="messages", answers="own", skip_odd=True)
        assert [prompt.id for prompt in load(source, tmp_path).prompts] == ["0"]
        said = broken(source.model_copy(update={"skip_odd": False}), tmp_path)
        assert "messages: must be text or a list of texts, not " in said


def test_rows_with_system_prompts(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("turns,role\nhi,Be a pirate.\nbye,\n")
    prompts = load(PathSource(path="q.csv", id=None, system="role"), tmp_path).prompts
    assert [prompt.context for prompt in prompts] == [({"role": "system", "content": "Be a pirate."},), ()]


def test_csv_may_be_gzipped(tmp_path: Path) -> None:
    (tmp_path / "q.CSV.gz").write_bytes(gzip.compress(b"turns\nhi\n"))
    assert load(PathSource(path="q.CSV.gz", id=None), tmp_path).prompts[0].turns == ("hi",)
    (tmp_path / "q.tsv.gz").write_bytes(gzip.compress(b"turns\nhi\n")[:-4])
    assert "q.tsv.gz: broken gzip" in broken(PathSource(path="q.tsv.gz", id=None), tmp_path)


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"turns": "hi"}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (bz2.compress(b"x"), "is packed by bzip2; unpack it first"),
        (lzma.compress(b"x"), "is packed by xz; unpack it first"),
        (gzip.compress(gzip.compress(b"x")), "is gzipped twice"),
    ],
    ids=["utf-16", "bzip2", "xz", "gzip"],
)
def test_a_file_of_another_encoding_says_which(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{name}: {expected}" in broken(PathSource(path=name, id=None), tmp_path)


def test_messages_as_python_prints_them_are_no_prompt(tmp_path: Path) -> None:
    """As pandas writes a column of lists into CSV; the whole text was the prompt."""
    (tmp_path / "q.csv").write_text("turns\n\"[{'role': 'user', 'content': 'Hi'}]\"\n")
    assert "line 2: turns: is a list of messages as Python prints it; write it as JSON" in broken(
        PathSource(path="q.csv", id=None), tmp_path
    )
    (tmp_path / "q.csv").write_text("turns\n\"['a', 'b'] sorts how?\"\n")
    assert load(PathSource(path="q.csv", id=None), tmp_path).prompts[0].turns == ("['a', 'b'] sorts how?",)


@pytest.mark.parametrize("field", ["id", "reference"])
@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_a_number_that_is_none_is_no_text(tmp_path: Path, field: str, value: str) -> None:
    """As pandas writes what is missing; `nan` was the answer that a judge looked for."""
    row = {"id": "1", "reference": "1"} | {field: value}
    text = ", ".join(f'"{key}": {each}' for key, each in row.items())
    (tmp_path / "q.jsonl").write_text(f'{{"turns": "hi", {text}}}')
    assert f"{field}: must be text or a finite number, not" in broken(PathSource(path="q.jsonl", id="id"), tmp_path)
