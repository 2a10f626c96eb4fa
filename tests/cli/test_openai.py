"""`spdbench run -b openai` from the command line to the files, against a server on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from spdbench.judge.results.schema import Result, json_schema, read_result
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.stub_server import Refusal, StubServer

KEY = "sk-very-secret-0123456789"
TEXT = "One two, three four five six."


@pytest.fixture(autouse=True)
def _no_model(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the embedded model fails."""

    def refuse() -> Path:
        raise AssertionError("the embedded model was asked for")

    assert own_cache
    monkeypatch.setattr("spdbench.models.checkpoints.embedded.embedded_gguf", refuse)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()
    yield stub
    stub.close()


class Runs:
    def __init__(self, server: StubServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.results = folder / "results"

    def __call__(self, *words: str | Path, turns: int = 1) -> Said:
        suite = write_suite(self.folder, turns=turns)
        where = ("-o", f"openai.base_url={self.server.url}", "-o", "openai.model=stub")
        return spdbench("run", suite, "-b", "openai", *where, "--results", self.results, "--threads", "1", *words)

    def result(self, label: str = "openai", model: str = "stub") -> Result:
        return read_result(self.results / f"mini__{label}__{model}.json")


@pytest.fixture
def run(server: StubServer, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path)


def test_a_server_alone_needs_no_model_here(run: Runs) -> None:
    said = run("--max-new-tokens", "20")
    assert said.code == 0, said.err
    result = run.result()
    jsonschema.validate(json.loads((run.results / "mini__openai__stub.json").read_text()), json_schema())
    assert (result.model.id, result.model.num_layers, result.model.dtype) == ("stub", None, "unknown")
    assert result.backend.chosen["tokens"] == "the server's usage, reported at the end"
    assert result.backend.other_model == "stub in its server"
    assert [(one.text, one.num_new_tokens, one.output_ids, one.num_prompt_tokens) for one in result.runs] == [
        (TEXT, 8, [], 11)
    ] * 4
    overall = result.summary.overall
    assert overall["decode_tokens_per_s"] > 0
    for name in ("acceptance_length", "itl_p50_s", "token_efficiency", "device_s_per_token", "peak_memory_bytes"):
        assert overall[name] is None
    assert "other_model" in " ".join(said.out.split())


def test_a_model_that_its_server_calls_by_its_folder_is_called_by_its_name(run: Runs) -> None:
    run.server.model = "/home/someone/models/llama"
    said = run("--max-new-tokens", "20", "-o", f"openai.model={run.server.model}")
    assert said.code == 0, said.err
    assert "someone" not in (run.results / "mini__openai__llama.json").read_text()


def test_beside_vanilla_speeds_compare_and_outputs_do_not(run: Runs, tiny_model: Path) -> None:
    said = run("-b", "vanilla", "-m", tiny_model, "--dtype", "float32", "--max-new-tokens", "20")
    assert said.code == 0, said.err
    result = run.result(model=tiny_model.name)
    assert result.divergence is None
    assert result.model.num_layers == 6
    compared = spdbench("compare", run.results, "--format", "json")
    assert compared.code == 0, compared.err
    [table] = json.loads(compared.out)["tables"]
    rows = {row["label"]: row for row in table["rows"]}
    assert table["baseline"] == "openai"  # the run's first
    assert rows["openai"]["metrics"]["speedup"] == 1.0
    assert rows["vanilla"]["metrics"]["speedup"] > 0


def test_the_next_turn_goes_on_from_the_servers_own_words(run: Runs) -> None:
    assert run("--max-new-tokens", "20", "--limit", "1", turns=2).code == 0
    messages = run.server.asked[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == TEXT


MEASURED = 20
"""Tokens that the prompts of these tests are asked for, and neither trials nor warm-ups."""


def answer_otherwise(server: StubServer, how: Callable[[int], Refusal | None]) -> None:
    """Refuses as `how` says of the measured request of that number, which counts from 1."""
    original, numbers = server.objection, count(1)

    def objection(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> Refusal | None:
        refusal = how(next(numbers)) if body["max_tokens"] == MEASURED else None
        return refusal or original(handler, body)

    server.objection = objection  # type: ignore[method-assign]


def test_a_prompt_that_does_not_fit_has_failed_and_the_run_goes_on(run: Runs) -> None:
    words = json.dumps({"error": {"message": "This model's maximum context length is 10 tokens."}})
    answer_otherwise(run.server, lambda number: Refusal(400, words) if number == 2 else None)
    said = run("--max-new-tokens", "20")
    assert said.code == 1, said.err
    assert "Traceback" not in said.err
    runs = run.result().runs
    assert [one.finish_reason for one in runs] == ["eos", "error", "eos", "eos"]
    assert "context is too small (400)" in str(runs[1].error)


def test_a_key_that_is_refused_in_the_middle_ends_the_run_with_what_it_has(run: Runs) -> None:
    answer_otherwise(run.server, lambda number: Refusal(401) if number == 3 else None)
    said = run("--max-new-tokens", "20")
    assert said.code == 1, said.err
    assert "refuses the key (401)" in said.err
    assert "--resume goes on from there" in said.err
    assert [one.finish_reason for one in run.result().runs] == ["eos", "eos", "error"]


def test_a_key_in_the_middle_of_an_answer_is_in_no_file_and_no_message(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def breaks(_number: int) -> None:
        run.server.inserted = [json.dumps({"error": {"message": f"refused {KEY}"}}).encode()]

    answer_otherwise(run.server, breaks)
    said = run("--max-new-tokens", "20")
    assert said.code == 1
    assert "refused ***" in said.err
    assert KEY not in said.out + said.err
    assert all(KEY.encode() not in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())


def test_a_server_that_dies_in_the_middle_of_each_answer_gives_failed_prompts_and_no_numbers(
    run: Runs,
) -> None:
    def die(_number: int) -> None:
        run.server.fault = "die"

    answer_otherwise(run.server, die)
    said = run("--max-new-tokens", "20")
    assert said.code == 1, said.err
    assert "Traceback" not in said.err
    result = run.result()
    failed = [one for one in result.runs if one.finish_reason == "error"]
    assert failed
    assert all(one.ttft_s is None and one.error and "in the middle" in one.error for one in failed)


def test_a_busy_server_gets_time_and_nothing_fails(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StubServer.objection

    def busy(stub: StubServer, *words: object) -> object:
        odd = len(stub.asked) > 2 and len(stub.asked) % 2
        return Refusal(429, "slow", {"Retry-After": "0"}) if odd else original(stub, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(StubServer, "objection", busy)
    said = run("--max-new-tokens", "20")
    assert said.code == 0, said.err
    assert [one.num_new_tokens for one in run.result().runs] == [8] * 4


def test_the_key_is_in_no_file_and_no_message_even_if_the_server_repeats_it(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = run("--max-new-tokens", "20")
    assert said.code == 0
    run.server.key = "sk-other"
    refused = run("--max-new-tokens", "20", "--name", "again")
    assert refused.code == 2
    assert "OPENAI_API_KEY" in refused.err
    for text in (said.out, said.err, refused.out, refused.err):
        assert KEY not in text
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert KEY.encode() not in content
        assert b"127.0.0.1" not in content


def test_a_server_that_goes_away_ends_the_run_which_goes_on_when_it_is_back(
    run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StubServer.post
    server = run.server

    def leave(stub: StubServer, handler: object) -> None:
        original(stub, handler)  # type: ignore[arg-type]
        if stub is server and [body["max_tokens"] for body in stub.asked].count(MEASURED) == 2:
            stub.stop_listening()

    monkeypatch.setattr(StubServer, "post", leave)
    said = run("--max-new-tokens", "20", "-o", "openai.retries=0")
    assert said.code == 1, said.err
    assert "cannot be reached any more" in said.err
    assert "--resume goes on from there" in said.err
    partial = run.result()
    assert 0 < len(partial.runs) < 4
    assert partial.runs[-1].finish_reason == "error"
    server.close()
    back = StubServer(port=int(server.url.rpartition(":")[2].partition("/")[0]))
    try:
        again = run("--max-new-tokens", "20", "-o", "openai.retries=0", "--resume")
    finally:
        back.close()
    assert again.code == 0, again.err
    assert "1 request that failed for reasons that may have passed: asked again" in again.err
    assert len(run.result().runs) == 4
    assert run.result().summary.overall["num_failed"] == 0


def test_what_failed_for_the_servers_state_is_asked_again_and_what_is_too_long_is_not(run: Runs) -> None:
    too_long = Refusal(400, json.dumps({"error": {"message": "This model's maximum context length is 10 tokens."}}))

    def how(number: int) -> Refusal | None:
        run.server.fault = "die" if number == 1 else None
        return {2: too_long, 3: Refusal(503, "busy")}.get(number)

    answer_otherwise(run.server, how)
    words = ("--max-new-tokens", "20", "-o", "openai.retries=0")
    assert run(*words, turns=2).code == 1
    assert [one.finish_reason for one in run.result().runs] == ["error"] * 6 + ["eos"] * 2
    for num_asked, num_again in ((4, 1), (0, 0)):
        before = len(run.server.asked)
        again = run(*words, "--resume", turns=2)
        assert again.code == 1, again.err
        assert again.err.count("4 requests that failed for reasons that may have passed: asked again") == num_again
        assert [body["max_tokens"] for body in run.server.asked[before:]].count(MEASURED) == num_asked
        failed = [one for one in run.result().runs if one.finish_reason == "error"]
        assert len(run.result().runs) == 8
        assert ["too small" in str(one.error) for one in failed] == [True, False]
        assert len({one.prompt_id for one in failed}) == 1


def test_concurrency_asks_for_several_answers_at_once(run: Runs) -> None:
    run.server.pause_s = 0.05
    said = run("--max-new-tokens", "20", "--concurrency", "3")
    assert said.code == 0, said.err
    assert run.server.most_at_once == 3
    result = run.result()
    assert result.backend.options["concurrency"] == 3
    assert len(result.runs) == 4
    assert all(one.num_new_tokens == 8 for one in result.runs)


def test_acceptance_at_any_concurrency_and_each_in_a_table_of_its_own(run: Runs) -> None:
    timings = {"cache_n": 0, "predicted_n": 8, "predicted_ms": 50.0, "draft_n": 9, "draft_n_accepted": 4}
    run.server.last_words = lambda _: {"timings": timings}
    said = run("--max-new-tokens", "20", "--concurrency", "3")
    assert said.code == 0, said.err
    result = run.result()
    jsonschema.validate(json.loads((run.results / "mini__openai__stub.json").read_text()), json_schema())
    assert result.summary.overall["acceptance_length"] == pytest.approx(1 + 4 / 3)
    drafts = [one.drafts for one in result.runs]
    assert {(each.rounds, each.accepted, each.source) for each in drafts if each} == {
        (3, 4, "each response of llama.cpp")
    }
    assert [one.engine_decode_s for one in result.runs] == [0.05] * 4
    (run.results / "mini__openai__stub.json").rename(run.results / "three.json")
    assert run("--max-new-tokens", "20").code == 0
    said = spdbench("compare", run.results, "--dialect", "aiperf")
    assert said.code == 0, said.err
    assert said.out.count("2.33") == 2
    assert sum(line.startswith("label") for line in said.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "openai.base_url=http://127.0.0.1:1/v1"), "no server answers at 127.0.0.1:1"),
        (("-o", "openai.model=other"), "the server has no such model"),
        (("-o", "openai.api=chatty"), "-o openai.api=chatty: "),
        (("-o", "openai.timeout_s=0"), "-o openai.timeout_s=0: "),
        (("-o", "openai.concurrency=0"), "-o openai.concurrency=0: "),
        (("-o", "openai.count=ids"), "-o openai.count=ids: the server does not report that"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(run: Runs, words: tuple[str, ...], message: str) -> None:
    said = run(*words)
    assert said.code == 2
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not run.results.exists() or not list(run.results.iterdir())


def test_concurrency_is_for_servers(tmp_path: Path, tiny_model: Path) -> None:
    said = spdbench("run", write_suite(tmp_path), "-b", "vanilla", "-m", tiny_model, "--concurrency", "2")
    assert said.code == 2
    assert "--concurrency 2: vanilla take one request at a time" in said.err
