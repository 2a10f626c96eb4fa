"""Files from outside: read whole, within limits, with one error for all that can be wrong."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from spdbench import input_files
from spdbench.errors import InputError
from spdbench.input_files import parse_json, parse_yaml, read_input, read_json


def test_file_and_pipe_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_input(tmp_path / "a") == b"x" * 100
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[b"y" * 100])
    writer.start()
    assert read_input(tmp_path / "pipe") == b"y" * 100
    writer.join()


def test_pipe_that_nobody_writes_is_no_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_files, "PIPE_WAIT_S", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: cannot be read .a pipe into which nothing is written"):
        read_input(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "No such file"),
        ("x" * 300, "File name too long"),
        (".", "Is a directory"),
        ("/dev/zero", "a device"),
        ("/dev/null", "a device"),
        ("loop", "Too many levels"),
        ("a\0b", "embedded null byte"),
        ("long", "more than 10 bytes"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match=f"cannot be read .{reason}"):
        read_input(tmp_path / name, limit=10)


def test_pipe_without_end_is_read_to_the_limit_only() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x" * 30)
    os.close(writer)
    with pytest.raises(InputError, match="more than 10 bytes"):
        read_input(Path(f"/dev/fd/{reader}"), limit=10)
    os.close(reader)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ('{"a":\n1,}', "not JSON (Expecting property name enclosed in double quotes at line 2, column 3)"),
        (b"\xff", "not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ('[{"a":' * 60 + "1" + "}]" * 60, "nested too deeply"),
        ("9" * 5000, "holds an integer of thousands of digits; write it as text"),
        ('[{"a": 1, "b": 2, "a": 3}]', "key 'a' occurs twice"),
    ],
)
def test_json_beyond_what_can_be_handled_is_one_error(text: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        parse_json(text)
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {reason}")):
        read_json(path)


def test_json_with_many_brackets_is_not_deep() -> None:
    assert parse_json("[" * 99 + "]" * 99)
    assert parse_json(b"[" + b"[{}]," * 500 + b"[]]")[0] == [{}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!int ''", "a value does not fit its tag"),
        ("a: !!bool maybe", "a value does not fit its tag"),
        ("a: !!timestamp soon", "a value does not fit its tag"),
        ("a: !!float x", "could not convert"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? !!map [1]\n: 1", "found unhashable key"),
        ("b: 1\na: 2\na: 3", " line 3: not YAML that can be read: key 'a' occurs twice"),
        ("x: " + "9" * 5000, "Exceeds the limit"),
        ("a:\n- 012", " line 2: not YAML that can be read: '012' is another number in YAML"),
        ("a: [x, 1:30]", "'1:30' is another number in YAML"),
        ("012: x", "put it into quotes"),
        ("a: " + "[" * 2000, "nested too deeply"),
        (
            "\n".join(
                ["a0: &a0 [1, 1, 1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
            ),
            "aliases unfold",
        ),
    ],
)
def test_yaml_beyond_what_can_be_handled_is_one_error(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="not YAML that can be read: ") as caught:
        parse_yaml(text)
    assert reason in str(caught.value)


def test_yaml_with_aliases_and_merges_is_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }
    assert parse_yaml("") is None


def test_numbers_of_yaml_that_are_what_they_look_like_are_read() -> None:
    assert parse_yaml("[0, -0, 10, 0.5, 00.5, 1_000, 0x1F, '012', \"1:30\", 1:99, 08:a]") == [
        *(0, 0, 10, 0.5, 0.5, 1000, 31),
        *("012", "1:30", "1:99", "08:a"),
    ]
