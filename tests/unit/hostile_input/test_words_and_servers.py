"""Hostile words of a command line, and hostile servers: taken, or refused in one message."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from spdbench.backend import find_backend, installed_backends, parse_options
from spdbench.cli.options import parse_backend_options, parse_drafters, parse_labels
from spdbench_backends.openai.counters import parse_counters
from spdbench_backends.openai.streams import read_chunks
from spdbench_backends.openai.transport.address import parse_address
from spdbench_backends.openai.transport.errors import BrokenError, RefusedError, error_message
from tests import hostile
from tests.hostile import broken_json, damaged, settings

WORDS = st.one_of(
    hostile.texts,
    st.builds("{}={}".format, hostile.texts, hostile.texts),
    st.builds("{}.{}={}".format, st.sampled_from(["spd", "eagle", "x"]), hostile.texts, hostile.texts),
)


@settings(300)
@given(words=st.lists(WORDS, min_size=1, max_size=3))
def test_option_words(words: list[str]) -> None:
    for parse in (
        lambda: parse_labels(words),
        lambda: parse_drafters(words, ["spd", "x"]),
        lambda: parse_backend_options(words, ["spd", "eagle"]),
    ):
        hostile.read("option words", parse)


@settings(300)
@given(data=st.data())
def test_option_values(data: st.DataObject) -> None:
    options = find_backend(data.draw(st.sampled_from(sorted(installed_backends())))).Options
    key = data.draw(st.sampled_from(sorted(options.model_fields) or ["x"]))
    value = data.draw(st.one_of(hostile.texts, st.sampled_from(["0", "-1", "9" * 5000, "1e999", "1,2,x", "auto", "²"])))
    hostile.read("option values", lambda: parse_options("x", options, {key: value}))


@settings(200)
@given(path=hostile.texts, command=st.sampled_from(["compare", "check", "check --calibrate", "run", "suites"]))
def test_paths(folder: Path, path: str, command: str) -> None:
    (folder / "loop").unlink(missing_ok=True)
    (folder / "loop").symlink_to("loop")
    for place in (path, str(folder / "loop"), f"{folder}/{path}.yaml"):
        known = {"check": ["--baseline", place], "check --calibrate": ["--baseline", place], "run": ["-b", place]}
        words = [*command.split(), "--", place] if command == "suites" else [*command.split(), *known.get(command, [])]
        words += [] if command == "suites" else ["--", place]
        assert hostile.command("paths", *words, folder=folder) == 2


CHUNK = {
    "id": "x",
    "choices": [
        {"delta": {"content": "a", "reasoning": "b"}, "token_ids": [1], "logprobs": None, "finish_reason": "stop"}
    ],
    "usage": {"completion_tokens": 1, "prompt_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 1}},
}


@settings(400)
@given(events=st.lists(broken_json(CHUNK), min_size=1, max_size=3), other=st.binary(max_size=40))
def test_server_streams(events: list[bytes], other: bytes) -> None:
    lines = [line for event in events for line in (b"data: " + event).split(b"\n")]

    def read() -> None:
        with contextlib.suppress(BrokenError, RefusedError):
            list(read_chunks([*lines, other, b"", b"data: [DONE]"], str, lambda *_: None, set()))

    hostile.read("server streams", read)
    hostile.require_message(error_message(other.decode(errors="replace"), str) + ".")


COUNTERS = b"""# HELP x
vllm:spec_decode_num_drafts_total{model_name="m"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 2.0
"""


@settings(200)
@given(text=damaged(COUNTERS))
def test_server_counters(text: bytes) -> None:
    hostile.read("server counters", lambda: parse_counters(text.decode(errors="replace")))


@settings(200)
@given(url=st.one_of(hostile.texts, st.builds("http{}://{}:{}/{}".format, *[hostile.texts] * 4)))
def test_server_addresses(url: str) -> None:
    def parse() -> None:
        with contextlib.suppress(ValueError):  # of which the option makes its message
            parse_address(url)

    hostile.read("server addresses", parse)


def test_so_many_inputs_were_tried_within_the_memory_limit() -> None:
    """The last test of this file: hypothesis may end a test early, and then has tried less than was asked for."""
    hostile.require_tried("words and servers", within=6)
