"""Log-probabilities of next tokens, and the ids of texts, from servers that report these: vLLM and llama.cpp.

Why two servers' greedy answers differ follows from the first one's own log-probabilities at the first difference: the
gap between both tokens is compared with a noise floor, the largest change of a gap between two tokens when the same
ids are read in another way: all at once, one by one, or by the other server. A constant added to all does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from spdbench.backend import Answer
from spdbench.errors import InputError
from spdbench.types import DivergenceClass, FirstDivergence, GenerationRequest
from spdbench_backends.openai.chunks import ID_PREFIX
from spdbench_backends.openai.endpoint import Endpoint
from spdbench_backends.openai.transport.errors import MALFORMED, RefusedError

LISTED_LOGPROBS = (20, 5)
"""Log-probabilities asked for a token: the most that vLLM and OpenAI's own completions list by default."""
Scores = Mapping[int, float]


@dataclass(frozen=True)
class TokenScores:
    """What one server says of tokens, by id."""

    endpoint: Endpoint

    def next_of(self, ids: Sequence[int]) -> dict[int, float] | None:
        """Log-probabilities of the likeliest tokens after `ids`; None where the server does not report them, or reports
        them by text, which does not tell apart tokens that are written alike."""
        found = self._continued(ids, 1)
        return None if found is None else found[0][1]

    def after(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> dict[int, float] | None:
        """The same after an answer that the server writes itself, token by token; None if it writes another."""
        found = self._continued(prompt_ids, len(answer_ids) + 1)
        if found is None or len(found) <= len(answer_ids):
            return None
        written = [token for token, _ in found[: len(answer_ids)]]
        return found[len(answer_ids)][1] if written == list(answer_ids) else None

    def prompt_ids(self, request: GenerationRequest) -> list[int] | None:
        """The ids of what a request holds, conversations by the server's own template; None where it does not report
        them."""
        if self.endpoint.prompt_form != "messages":
            sent = self.endpoint.prompt(request)
            return self._tokenized(sent, is_start=True) if isinstance(sent, str) else sent
        messages = {"messages": [dict(message) for message in request.messages], **self.endpoint.template}
        rendered = self._ask("/apply-template", messages)  # llama.cpp's
        if isinstance(rendered.get("prompt"), str):
            return self._tokenized(rendered["prompt"], is_start=True)
        return _ids(self._ask("/tokenize", {"model": self.endpoint.model, **messages}))  # vLLM's

    def ids_of(self, text: str) -> list[int] | None:
        """The ids of a text that follows on others; None where the server does not report them."""
        return self._tokenized(text, is_start=False)

    def _tokenized(self, text: str, *, is_start: bool) -> list[int] | None:
        """The ids of a text, with the marks of special tokens in it and the BOS before it if it `is_start`."""
        llamacpp = {"content": text, "add_special": is_start, "parse_special": is_start}
        vllm = {"model": self.endpoint.model, "prompt": text, "add_special_tokens": is_start}
        return _ids(self._ask("/tokenize", {**llamacpp, **vllm}))

    def _continued(self, ids: Sequence[int], length: int) -> list[tuple[int, dict[int, float]]] | None:
        """The next `length` greedy tokens, each with the likeliest ones at its place."""
        body = {"model": self.endpoint.model, "prompt": list(ids), "max_tokens": length, "temperature": 0.0}
        for count in LISTED_LOGPROBS:
            asked = {**body, "stream": False, "logprobs": count, "return_tokens_as_token_ids": True}
            with suppress(RefusedError):
                try:
                    return _listed(
                        self.endpoint.ask_json(self.endpoint.completions_path, asked)["choices"][0]["logprobs"]
                    )
                except MALFORMED:
                    return None
        return None

    def _ask(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        for root in self.endpoint.roots:
            with suppress(RefusedError, InputError, *MALFORMED):
                found = self.endpoint.ask_json(path, body, base=root)
                if isinstance(found, Mapping) and "error" not in found:
                    return found
        return {}


def _ids(answer: Mapping[str, Any]) -> list[int] | None:
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        return None
    return tokens


def _listed(logprobs: Mapping[str, Any]) -> list[tuple[int, dict[int, float]]] | None:
    """Tokens with the likeliest ones at their places: llama.cpp lists ids, vLLM writes them into the tokens' text."""
    if "content" in logprobs:
        entries = logprobs["content"]
        return [
            (int(entry["id"]), {int(one["id"]): float(one["logprob"]) for one in entry["top_logprobs"]})
            for entry in entries
        ] or None
    places = logprobs["top_logprobs"]
    tokens = logprobs.get("tokens") or [f"{ID_PREFIX}-1"] * len(places)
    if any(not text.startswith(ID_PREFIX) for text in [*tokens, *(text for place in places for text in place)]):
        return None
    return [
        (_id(token), {_id(text): float(p) for text, p in place.items()})
        for token, place in zip(tokens, places, strict=True)
    ] or None


def _id(text: str) -> int:
    return int(text.removeprefix(ID_PREFIX))


def explain_divergence(
    request: GenerationRequest, expected: Answer, found: Answer, plain: TokenScores, other: TokenScores
) -> FirstDivergence | None:
    """Where the answer `found`, of the server `other`, first differs from `expected`, of `plain`, and why; None if the
    two are the same text.

    A tie has equal log-probabilities for both tokens, a near tie a gap no larger than the noise floor. Where the
    servers do not report what that takes, the difference is unclassified.
    """
    if expected.text == found.text:
        return None
    ours, theirs = (list(answer.ids) or plain.ids_of(answer.text) for answer in (expected, found))
    prompt_ids = plain.prompt_ids(request)
    if ours is None or theirs is None or prompt_ids is None:
        return FirstDivergence("unclassified", 0, None, None, reason="the server does not report the ids of a text")
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    one_by_one = plain.after(prompt_ids, ours[:at])
    at_once, by_other = (scores.next_of([*prompt_ids, *ours[:at]]) for scores in (plain, other))
    readings = [scores for scores in (one_by_one, at_once, by_other) if scores is not None]
    token, other_token = (_token(ids, at, request, readings) for ids in (ours, theirs))
    first = FirstDivergence("unclassified", at, token, other_token)
    if one_by_one is None and at_once is None:
        return replace(first, reason="the server reports no log-probabilities by id")
    return classify(first, readings)


def _token(ids: Sequence[int], at: int, request: GenerationRequest, readings: Sequence[Scores]) -> int | None:
    """The id at a place of an answer; where it has ended there, the likeliest end of sequence."""
    if at < len(ids):
        return ids[at]
    ends = [token for token in request.eos_ids if any(token in scores for scores in readings)]
    return max(ends, key=lambda token: readings[0].get(token, float("-inf")), default=None)


def classify(first: FirstDivergence, readings: Sequence[Scores]) -> FirstDivergence:
    """`first` with its class, by log-probabilities of one place that were read in several ways, the plain server's own
    first."""
    expected, found = first.expected, first.found
    if expected is None or found is None:
        return replace(first, reason="one answer ends where the other goes on, and its end has no known id")
    known = [scores for scores in readings if {expected, found} <= scores.keys()]
    if not known:
        reason = "the server's likeliest tokens hold not both of the two"
        return replace(first, outcome="real" if _is_clear(first, readings) else "unclassified", reason=reason)
    gaps = [scores[expected] - scores[found] for scores in known]
    floor = max((_largest_change(known[0], scores) for scores in known[1:]), default=0.0)
    if gaps[0] != 0.0 and all(scores == known[0] for scores in known[1:]):  # one request twice, as at the first token
        reason = "its log-probabilities could be read in one way only, which shows no noise floor"
        return replace(
            first, expected_logit=known[0][expected], found_logit=known[0][found], gap=gaps[0], reason=reason
        )
    outcome: DivergenceClass = "tie" if gaps[0] == 0.0 else "near_tie" if abs(gaps[0]) <= floor else "real"
    return replace(
        first,
        outcome=outcome,
        expected_logit=known[0][expected],
        found_logit=known[0][found],
        gap=gaps[0],
        floor=floor,
        floor_source="the same ids read at once, one by one, and by the other server",
        engine_gap=gaps[-1],
    )


def _largest_change(one: Scores, other: Scores) -> float:
    """By how much the gap between two tokens differs most between two readings."""
    changes = [one[token] - other[token] for token in one.keys() & other.keys()]
    return max(changes) - min(changes) if changes else 0.0


def _is_clear(first: FirstDivergence, readings: Sequence[Scores]) -> bool:
    """True if plain decoding's token is listed by all and the other by none: it is below everything that is listed."""
    return all(first.expected in scores and first.found not in scores for scores in readings)
