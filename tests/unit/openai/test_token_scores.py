"""Why two servers' answers differ, by the log-probabilities of vLLM and of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any, cast

import pytest

from spdbench.backend import Answer, divergence_explainer
from spdbench.types import DivergenceClass, FirstDivergence
from spdbench_backends.openai.token_scores import TokenScores, classify
from tests.stub_server import StubServer
from tests.unit.openai.conftest import Make
from tests.unit.openai.test_backend import ask, loaded

FIRST = FirstDivergence("unclassified", 2, 7, 9)


@pytest.mark.parametrize(
    ("readings", "outcome"),
    [
        ([{7: -0.5, 9: -0.5, 1: -3.0}], "tie"),
        ([{7: -0.5, 9: -0.6}, {7: -0.55, 9: -0.53}], "near_tie"),
        ([{7: -0.5, 9: -2.5}, {7: -0.5, 9: -2.4}], "real"),
        ([{7: -0.5, 9: -0.6}], "unclassified"),
        ([{7: -0.5, 9: -0.6}, {7: -0.5, 9: -0.6}, {7: -0.5, 9: -0.6}], "unclassified"),
        ([{7: -0.1, 1: -3.0}, {7: -0.1, 1: -3.0}], "real"),
        ([{7: -0.1, 1: -3.0}, {9: -0.1, 1: -3.0}], "unclassified"),
    ],
    ids=[
        "equal",
        "within the noise",
        "beyond it",
        "no noise known",
        "one request three times",
        "not even listed",
        "listed by the other alone",
    ],
)
def test_a_difference_is_classified_by_its_gap_and_the_noise(
    readings: Sequence[Mapping[int, float]], outcome: DivergenceClass
) -> None:
    found = classify(FIRST, readings)
    assert found.outcome == outcome
    if outcome == "near_tie":
        assert found.gap == pytest.approx(0.1)
        assert found.floor == pytest.approx(0.12)
    if outcome == "unclassified":
        assert found.reason


def test_a_constant_between_two_readings_is_no_noise() -> None:
    assert classify(FIRST, [{7: -0.5, 9: -0.6}, {7: -1.5, 9: -1.6}]).floor == pytest.approx(0.0)


WORDS = {"One": 10, " two": 11, " three": 12, " four": 13}
IDS = {number: word for word, number in WORDS.items()}


class Speaking(StubServer):
    """Has a vocabulary of four words, and gives log-probabilities as `dialect` does. `scores` are those after `One
    two`, where it says ` three`; `by_itself` moves ` four` where it writes the answer itself. Plain completions are at
    `path`, and what is not OpenAI's below `root`."""

    def __init__(self, dialect: str, four: float, by_itself: float = 0.0) -> None:
        super().__init__()
        self.dialect, self.four, self.by_itself, self.path = dialect, four, by_itself, "/v1/completions"

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("/chat/completions"):
            return super().post(handler)
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        return self.send(handler, *self.answered(handler.path, body))

    def answered(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        if path == f"{self.root}/apply-template":
            return (200, json.dumps({"prompt": "<user>"})) if self.dialect == "llama.cpp" else (404, "")
        if path == f"{self.root}/tokenize":
            text = body.get("content") or body.get("prompt")
            if text is None or text == "<user>":
                return 200, json.dumps({"tokens": [1, 2]})
            return 200, json.dumps({"tokens": [WORDS[word] for word in text.replace(" ", "| ").split("|")]})
        if path != self.path:  # llama.cpp's own protocol
            return (200, json.dumps({"content": " three", "stop": True})) if path == "/completions" else (404, "")
        given, length = body["prompt"], body["max_tokens"]
        if isinstance(given, str):
            return 200, json.dumps({"choices": [{"text": " three"}]})
        path_ids = [1, 2, 10, 11, 12]
        assert given == path_ids[: len(given)]
        entries = []
        for place in range(len(given), len(given) + length):
            four = self.four + (self.by_itself if length > 1 else 0.0)
            top = {12: -0.5, 13: four} if place == 4 else {path_ids[place]: -0.1}
            entries.append((path_ids[place], top))
        return 200, json.dumps({"choices": [{"logprobs": self.written(entries)}]})

    def written(self, entries: Sequence[tuple[int, Mapping[int, float]]]) -> dict[str, Any]:
        if self.dialect == "llama.cpp":
            listed = [
                {"id": token, "token": "?", "top_logprobs": [{"id": key, "logprob": p} for key, p in top.items()]}
                for token, top in entries
            ]
            return {"content": listed}
        return {
            "tokens": [f"token_id:{token}" for token, _ in entries],
            "top_logprobs": [{f"token_id:{key}": p for key, p in top.items()} for _, top in entries],
        }


@pytest.mark.parametrize("dialect", ["vLLM", "llama.cpp"])
@pytest.mark.parametrize(
    ("four", "by_itself", "outcome"), [(-0.5, 0.0, "tie"), (-0.6, 0.15, "near_tie"), (-4.0, 0.1, "real")]
)
def test_a_difference_of_two_servers_is_explained(
    backend: Make, dialect: str, four: float, by_itself: float, outcome: DivergenceClass
) -> None:
    server = Speaking(dialect, four, by_itself)
    try:
        made = cast(Any, loaded(backend(base_url=server.url)))
        explain = divergence_explainer(made)
        assert explain is not None
        found = explain(ask(), Answer((), "One two three"), Answer((), "One two four"), made)
        assert found is not None
        assert (found.outcome, found.position, found.expected, found.found) == (outcome, 2, 12, 13)
        assert explain(ask(), Answer((), "One two"), Answer((), "One two"), made) is None
    finally:
        server.close()


@pytest.mark.parametrize(
    ("base", "path", "root"),
    [
        ("", "/v1/completions", ""),
        ("/v1", "/v1/completions", ""),
        ("/api", "/api/completions", ""),
        ("/api/v1", "/api/v1/completions", "/api"),
        ("/api/v1", "/api/v1/completions", ""),
    ],
)
def test_plain_completions_and_tokens_are_found_wherever_the_address_ends(
    backend: Make, base: str, path: str, root: str
) -> None:
    """llama.cpp answers a chat without `/v1`, too, and has a protocol of its own at `/completions`."""
    server = Speaking("llama.cpp", -0.5)
    server.path, server.root = path, root
    try:
        made = cast(Any, loaded(backend(base_url=server.url.removesuffix("/v1") + base)))
        found = made.explain_divergence(ask(), Answer((), "One two three"), Answer((), "One two four"), made)
        assert found is not None
        assert found.outcome == "tie"
    finally:
        server.close()


@pytest.mark.parametrize(("sent", "path"), [([5, 6], None), ("raw", "/tokenize")])
def test_a_prompt_without_messages_gets_no_template(sent: list[int] | str, path: str | None) -> None:
    asked = []

    def ask_json(path: str, body: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        asked.append((path, body["prompt"], body["add_special"]))
        return {"tokens": [5, 6]}

    form = "text" if path else "ids"
    endpoint: Any = SimpleNamespace(prompt_form=form, prompt=lambda _: sent, model="m", ask_json=ask_json, roots=("",))
    assert TokenScores(endpoint).prompt_ids(ask()) == [5, 6]
    assert asked == ([] if path is None else [(path, "raw", True)])


def test_a_server_that_says_nothing_of_tokens_leaves_a_difference_unclassified(backend: Make) -> None:
    made = cast(Any, loaded(backend()))
    found = made.explain_divergence(ask(), Answer((), "One two three"), Answer((), "One two four"), made)
    assert found is not None
    assert found.outcome == "unclassified"
    assert "does not report the ids" in found.reason
