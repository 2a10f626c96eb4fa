"""`run` with a chosen chat template, with system prompts and given answers, and with lengths of context."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdbench.judge.results.schema import read_result
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.stub_server import StubServer

SHORT = ("--dtype", "float32", "-b", "vanilla", "--max-new-tokens", "4")


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()
    yield stub
    stub.close()


@pytest.fixture
def bare(tiny_model: Path, tmp_path: Path) -> Path:
    """A model without a chat template."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "bare"))
    (model / "chat_template.jinja").unlink()
    return model


def run(suite: Path, model: Path, results: Path, *words: str) -> Said:
    return spdbench("run", suite, "-m", model, *SHORT, "--results", results, *words)


def test_a_chosen_template_is_part_of_the_work_and_of_the_title(bare: Path, tmp_path: Path) -> None:
    suite, results = write_suite(tmp_path), tmp_path / "results"
    said = run(suite, bare, results, "--limit", "1")
    assert "give its format by --chat-template (a file, vicuna, llama-2, chatml, zephyr)" in said.err
    said = run(suite, bare, results, "--limit", "1", "--chat-template", "vicuna", "--name", "vicuna")
    assert said.code == 0, said.err
    assert "no chat template" not in said.err
    assert "bare chat template vicuna |" in said.out
    plain, chosen = (results / f"mini__vanilla__bare{end}.json" for end in ("", "__vicuna"))
    result = read_result(chosen)
    assert result.model.chat_template == "vicuna"
    assert "no_template" not in [flag.name for flag in result.flags]
    assert result.runs[0].num_prompt_tokens > read_result(plain).runs[0].num_prompt_tokens
    said = spdbench("compare", plain, "--baseline", chosen)
    assert said.code == 4
    assert "--chat-template (vicuna, not none)" in said.err
    words = ("--limit", "1", "--name", "vicuna", "--resume", "--chat-template", "chatml")
    assert "other settings" in run(suite, bare, results, *words).err


@pytest.mark.parametrize("word", ["vicunna", "no/such.jinja"])
def test_a_template_that_is_not_there(bare: Path, tmp_path: Path, word: str) -> None:
    said = run(write_suite(tmp_path), bare, tmp_path / "results", "--chat-template", word)
    assert said.code == 2
    assert f"--chat-template {word}: no such file, and none that is built in" in said.err
    assert not (tmp_path / "results").exists()


def test_a_server_applies_its_own_template(server: StubServer, tiny_model: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path)
    where = ("-b", "openai", "-o", f"openai.base_url={server.url}", "-o", "openai.model=stub")
    words = ("run", suite, *where, "--chat-template", "chatml", "--results", tmp_path / "results")
    said = spdbench(*words)
    assert said.code == 2
    assert "--chat-template: is applied here, which takes the model's tokenizer; name the model with -m" in said.err
    said = spdbench(*words, "-m", tiny_model)
    assert said.code == 2
    assert "openai sends messages, and its server applies a template of its own" in said.err


def test_a_server_gets_system_prompts_and_given_answers(server: StubServer, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
    ]
    prompts = {"source": [{"inline": [{"id": "a", "messages": talk}]}], "system": "Be brief."}
    suite = write_suite(tmp_path, prompts=prompts)
    where = ("-b", "openai", "-o", f"openai.base_url={server.url}", "-o", "openai.model=stub")
    said = spdbench("run", suite, *where, "--results", tmp_path / "results", "--threads", "1")
    assert said.code == 0, said.err
    assert server.asked[-1]["messages"] == [{"role": "system", "content": "Be brief."}, *talk]


def test_contexts_that_are_too_long_are_left_out_where_the_suite_says_so(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words and more " * 30)
    prompts = {"source": [{"text": "text.txt", "tokens": [16, 64, 256], "each": 1, "chars_per_token": 2}]}
    for omit, code in ((True, 0), (False, 1)):
        suite = write_suite(tmp_path, prompts=prompts | {"omit_too_long": omit})
        results = tmp_path / f"results-{omit}"
        said = run(suite, tiny_model, results)
        assert said.code == code, said.err
        assert ("NOTE: 1 of 3 prompts are omitted. The first: prompt 256-0: " in said.err) is omit
        assert len(read_result(results / f"mini__vanilla__{tiny_model.name}.json").runs) == 3 - omit
    said = spdbench("compare", tmp_path / "results-True", "--by", "context", "--format", "json")
    assert said.code == 0, said.err
    rows = json.loads(said.out)["tables"][0]["rows"]
    assert [row["category"] for row in rows] == ["context under 256", None]
