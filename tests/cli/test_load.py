"""`spdbench run --concurrency 1,4`: servers under several loads, in one comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import BackendLostError
from spdbench.judge.loaded import read_results
from spdbench.judge.results.schema import read_result
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.stub_server import StubServer


@pytest.fixture(autouse=True)
def _without_key(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_cache
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def _with_timings(timings: Mapping[str, int], _body: object) -> Mapping[str, Any]:
    return {"timings": timings}


@pytest.fixture
def servers() -> Iterator[dict[str, StubServer]]:
    """One without drafts; one that is faster, and reports some."""
    stubs = {"plain": StubServer(), "drafted": StubServer()}
    for label, stub in stubs.items():
        drafts = {"draft_n": 9, "draft_n_accepted": 4} if label == "drafted" else {}
        stub.last_words = partial(_with_timings, {"cache_n": 0, "predicted_n": 8, **drafts})
        stub.offers = {"running_usage", "usage"}
    stubs["plain"].pause_s, stubs["drafted"].pause_s = 0.1, 0.01  # far apart, also on a busy machine
    yield stubs
    for stub in stubs.values():
        stub.close()


Run = Callable[..., Said]


@pytest.fixture
def run(servers: dict[str, StubServer], tmp_path: Path) -> Run:
    def call(*words: str | Path, turns: int = 1) -> Said:
        suite = write_suite(tmp_path, turns=turns)
        asked = [word for label in servers for word in ("-b", f"{label}=openai")]
        for label, stub in servers.items():
            asked += ["-o", f"{label}.base_url={stub.url}", "-o", f"{label}.model=stub"]
        where = ("--results", tmp_path / "results", "--max-new-tokens", "20", "--threads", "1")
        return spdbench("run", suite, *asked, *where, *words)

    return call


def test_each_level_is_a_result_and_all_of_them_one_table(run: Run, tmp_path: Path) -> None:
    said = run("--concurrency", "3,1")
    assert said.code == 0, said.err
    files = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert files == [f"mini__{label}__stub__c{level}.json" for label in ("drafted", "plain") for level in (1, 3)]
    words = " ".join(said.out.split())
    assert "drafted: pays at every load measured, up to 3 requests at once" in words
    for level in (1, 3):
        assert f"at {level}: " in words
    assert words.count("tau 2.33 [2.33, 2.33], break-even ") == 2
    assert sum(line.startswith("label") for line in said.out.splitlines()) == 1
    assert "1, 3 at once" in words

    again = spdbench("compare", tmp_path / "results", "--baseline", "plain", "--format", "json")
    assert again.code == 0, again.err
    found = json.loads(again.out)
    assert [table["requests_at_once"] for table in found["tables"]] == [1, 3]
    ((conclusion,),) = found["loads"]
    assert conclusion["pays_up_to"] == 3
    assert conclusion["break_even"] is None
    rows = {row["label"]: row["metrics"] for row in found["tables"][1]["rows"]}
    assert rows["drafted"]["acceptance_length"] == pytest.approx(1 + 4 / 3)
    assert rows["drafted"]["break_even_length"] == pytest.approx(
        rows["drafted"]["acceptance_length"] / rows["drafted"]["speedup"]
    )
    assert rows["plain"]["throughput_tokens_per_s"] == pytest.approx(3 * rows["plain"]["tokens_per_s"])


def test_throughput_is_what_all_users_get(run: Run, servers: dict[str, StubServer], tmp_path: Path) -> None:
    """Five pauses an answer of eight tokens: three users get no more than 3 x 8 tokens in that time."""
    servers["plain"].pause_s = 0.05
    assert run("--concurrency", "1,3", "--limit", "4").code == 0
    (loaded,) = read_results([tmp_path / "results" / "mini__plain__stub__c3.json"])
    assert 0.3 * 3 * 8 / 0.25 < loaded.metrics["throughput_tokens_per_s"] <= 3 * 8 / 0.25
    assert servers["plain"].most_at_once == 3


def test_a_server_that_dies_at_one_level_keeps_those_before(
    run: Run, servers: dict[str, StubServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = StubServer.post

    def die(stub: StubServer, handler: object) -> None:
        if stub is servers["drafted"] and stub.most_at_once > 2:
            stub.stop_listening()
            handler.connection.close()  # type: ignore[attr-defined]
            return
        post(stub, handler)  # type: ignore[arg-type]

    monkeypatch.setattr(StubServer, "post", die)
    said = run("--concurrency", "1,2,3", "-o", "drafted.retries=0", "-o", "plain.retries=0")
    assert said.code == BackendLostError.exit_code, said.err
    assert "drafted: the server cannot be reached any more" in said.err
    assert "drafted: pays at every load measured, up to 2 requests at once" in " ".join(said.out.split())
    for label in ("plain", "drafted"):
        for level in (1, 2):
            result = read_result(tmp_path / "results" / f"mini__{label}__stub__c{level}.json")
            assert len(result.runs) == 4
            assert result.summary.overall["num_failed"] == 0


def test_a_finished_run_of_several_levels_resumes_to_itself(run: Run, servers: dict[str, StubServer]) -> None:
    servers["plain"].pause_s = servers["drafted"].pause_s = 0.0  # no time is looked at
    assert run("--concurrency", "1,2").code == 0
    asked = {label: len(stub.asked) for label, stub in servers.items()}
    said = run("--concurrency", "1,2", "--resume")
    assert said.code == 0, said.err
    for label, stub in servers.items():
        assert {body["max_tokens"] for body in stub.asked[asked[label] :]} <= {16}, "only trials, no prompt again"


@pytest.mark.parametrize("words", ["1,x", "0", "1,,4", "-2", "1025", "1.5"])
def test_levels_that_are_no_numbers_of_requests(run: Run, words: str) -> None:
    said = run("--concurrency", words)
    assert said.code == 2
    assert "is no number of requests from 1 to 1024; write 4, or 1,4,16" in said.err


def test_levels_are_for_servers_alone(run: Run, tmp_path: Path) -> None:
    said = run("--concurrency", "1,4", "-o", "plain.concurrency=2")
    assert said.code == 2
    assert "plain has -o plain.concurrency=2" in said.err
    said = run("--concurrency", "1,4", "-b", "vanilla")
    assert said.code == 2
    assert "vanilla takes one request at a time" in said.err
    assert not (tmp_path / "results").exists()
