"""What is read as a conversation, and what is said of anything else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.training.conversations import read_conversations

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
    assert found.lines == [2, 4]
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
        ([{"messages": CHAT}, "[1]"], "line 2: must be a JSON object"),
        ([{"text": "Hi"}], "line 1: has neither `messages` nor `conversations`"),
        ([{"messages": []}], "line 1: messages: must be a list of messages that is not empty"),
        ([{"messages": "Hi"}], "line 1: messages: must be a list"),
        ([{"messages": ["Hi"]}], r"line 1: messages.0: must be an object"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages.0: content must be text, not NoneType"),
        ([{"messages": [{"role": "bot", "content": ""}]}], "role 'bot' is not known. Known: system, user"),
        ([{"messages": [{"role": ["user"], "content": ""}]}], "is not known"),
        ([{"schema": "spdbench.data/9"}], "line 1: schema 'spdbench.data/9' is not known"),
        ([{**HEADER, "model": "x"}, {"messages": CHAT}], "line 1: model: must be an object"),
        ([{"messages": CHAT}, {"messages": [{"role": "user", "content": "\ud83d"}]}], "line 2: .*half of a surrogate"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(rows: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_conversations(write(tmp_path / "d.jsonl", *rows))


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
