"""What is read as a conversation, and what is said of anything else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from spdbench.chat_rows import messages_of
from spdbench.errors import InputError
from spdbench.training.conversations import read_conversations, skipped_note

HEADER = {"schema": "spdbench.data/1", "seed": 0}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_our_file_has_a_header_and_conversations(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", HEADER, {"messages": CHAT, "sampling": {}}, "", {"messages": CHAT})
    found = read_conversations(path)
    assert found.header == HEADER
    assert found.messages == [tuple(CHAT), tuple(CHAT)]
    assert found.places == ["line 2", "line 4"]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_sharegpt_rows_are_read_with_our_roles(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    found = read_conversations(write(tmp_path / "s.jsonl", {"id": "x", "conversations": turns}))
    assert found.header is None
    assert found.messages == [({"role": "system", "content": "S"}, *CHAT)]


def test_line_that_a_kill_cut_is_left_out_of_our_files(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", HEADER, {"messages": CHAT})
    path.write_text(path.read_text() + '{"messages": [{"ro')
    assert len(read_conversations(path).messages) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "holds no conversation"),
        ([HEADER], "holds no conversation"),
        ([{"messages": CHAT}, "{"], "line 2: not JSON"),
        (["3", "null"], "line 1: must be a JSON object, not 3"),
        ([{"text": "Hi"}], "line 1: has no `messages`, `conversations` or `turns`, and no `instruction` with `output`"),
        ([{"messages": []}], "line 1: messages: must be a list of messages that is not empty"),
        ([{"messages": "Hi"}], "line 1: messages: must be a list"),
        ([{"messages": ["Hi"]}], r"line 1: messages.0: must be an object"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages.0: content must be text, not NoneType"),
        (
            [{"messages": [{"role": "narrator", "content": ""}]}],
            "role 'narrator' is not known. Known: system, developer",
        ),
        ([{"messages": [{"role": ["user"], "content": ""}]}], "is not known"),
        ([{"schema": "spdbench.data/9"}], "line 1: schema 'spdbench.data/9' is not known"),
        ([{**HEADER, "model": "x"}, {"messages": CHAT}], "line 1: model: must be an object"),
        ([{"messages": [{"role": "user", "content": "\ud83d"}]}], "line 1: .*half of a surrogate"),
        ([[3, {}]], "entry 1: must be a JSON object, not 3"),
        (['[{"messages": ['], "as one JSON array: not JSON"),
        (['{"messages": [], "messages": []}'], "line 1: key 'messages' occurs twice"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_conversations(write(tmp_path / "d.jsonl", *rows))


PICTURE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "must be a list of messages that is not empty"),
        ([{"role": "user", "content": None}], "content must be text, not NoneType"),
        ([{"role": "user", "content": ["Look: ", PICTURE]}], "content must be text, and a part of it is 'image_url'"),
        ([{"from": "narrator", "value": "Once"}], "role 'narrator' is not known"),
        ([*CHAT, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "messages.2: calls a tool"),
        ([*CHAT, {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "1"}]}], "calls a tool"),
        ([*CHAT, {"role": "assistant", "content": "", "function_call": {"name": "f"}}], "calls a tool"),
        ([*CHAT, {"from": "observation", "value": "18"}], "calls a tool or holds its answer"),
    ],
)
def test_odd_row_among_others_is_skipped_and_counted(messages: list[Any], said: str, tmp_path: Path) -> None:
    found = read_conversations(write(tmp_path / "d.jsonl", {"messages": CHAT}, {"messages": messages}))
    assert found.messages == [tuple(CHAT)]
    (reason,) = found.skipped
    assert "line 2: messages" in reason
    assert said in reason
    note = skipped_note("--data d.jsonl", found.skipped, 2)
    assert note.startswith("NOTE: --data d.jsonl: 1 of 2 conversations are skipped. The first: ")


def test_content_in_parts_and_other_names_of_roles_are_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "H"}, "i"]
    turns = [
        {"role": "developer", "content": "S"},
        {"role": "Human", "content": parts},
        {"from": "chatgpt", "value": "Hello."},
    ]
    found = read_conversations(write(tmp_path / "d.jsonl", {"conversation": turns}))
    assert found.messages == [({"role": "system", "content": "S"}, *CHAT)]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_of_rows_is_read(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "all.json"
    path.write_text("\n" + json.dumps([{"messages": CHAT}, {"id": 2}, {"messages": CHAT}], indent=indent))
    found = read_conversations(path)
    assert found.places == ["entry 1", "entry 3"]
    assert found.skipped == [
        f"{path} entry 2: has no `messages`, `conversations` or `turns`, and no `instruction` with `output`"
    ]


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "input": "", "output": "Yes"},
        {"question": "Hi", "response": "Yes"},
        {"messages": None, "conversations": [{"from": "human ", "value": "Hi"}, {"from": "AI", "value": "Yes"}]},
        {"conversations": [{"speaker": "user", "text": "Hi"}, {"speaker": "bot", "text": "Yes"}]},
        {"schema": "chat", "items": [{"role": "User", "message": "Hi"}, {"role": "Chatbot", "message": "Yes"}]},
        {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]'},
    ],
)
def test_published_layouts_of_rows_are_one_conversation(row: dict[str, object]) -> None:
    talk = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"})
    assert messages_of(row, "row") == talk
    assert messages_of({**row, "system": "Be brief."}, "row") == ({"role": "system", "content": "Be brief."}, *talk)


def test_input_of_an_instruction_follows_it() -> None:
    asked, _ = messages_of({"instruction": "Sum up", "input": "A text", "output": "B"}, "row")
    assert asked["content"] == "Sum up\n\nA text"


def test_rows_that_are_no_objects_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[null, {"instruction": "Hi", "output": "Yes"}, 3, ["a"]]', encoding="utf-8")
    found = read_conversations(path)
    assert len(found.places) == 1
    assert [reason.partition(":")[0] for reason in found.skipped] == [f"{path} entry {n}" for n in (1, 3, 4)]


def test_thoughts_are_left_out_and_counted(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?", "reasoning_content": "A hi."}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in (talk, talk[:1] * 2, talk)))
    found = read_conversations(path)
    assert found.num_without_thoughts == 2
    assert found.messages[0] == (talk[0], {"role": "assistant", "content": "yes?"})
    assert messages_of({"messages": talk}, "row") == tuple(talk)
