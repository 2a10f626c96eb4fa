"""`spdbench audit`: what it says, what it writes, and how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from spdbench.models.hf.generation import Generation, Round
from spdbench.types import GenerationRequest
from spdbench_backends.ngram import Ngram
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.stub_server import StubServer


def words(said: Said) -> str:
    """What was printed, without the line breaks of a narrow terminal."""
    return " ".join(said.out.split())


def audit(suite: Path, model: Path, *more: str | Path) -> Said:
    """`spdbench audit` with one thread, as tiny matrices are multiplied fastest."""
    return spdbench("audit", suite, "-m", model, "--threads", "1", *more)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return write_suite(tmp_path, turns=2)


def audited(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["backends"]
    return found


def test_backends_that_are_lossless(suite: Path, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    common = ("--dtype", "float32", "--drafter", "spd=random", "-o", "spd.executor=inline")
    said = audit(suite, tiny_model, *common, "-b", "ngram", "-b", "spd", "-b", "hf", "--json", file)
    assert said.code == 0, said.out + said.err
    for label in ("ngram", "spd", "hf"):
        assert f"{label}: lossless. 8 of 8 outputs are plain decoding's" in words(said)
    assert "class" not in said.out  # no table where nothing diverges
    content = json.loads(file.read_text(encoding="utf-8"))
    assert (content["schema"], content["dtype"], content["reference"]) == ("spdbench.audit/1", "float32", "vanilla")
    assert [each["outcomes"] for each in content["backends"]] == [{"identical": 8}] * 3
    assert [each["ends"] for each in content["backends"]] == [{"compared": 8, "wrong": 0, "overrun": 0}] * 3


def test_drafters_that_learn_need_not_draft_the_same_again(tiny_model: Path, tmp_path: Path) -> None:
    """Other drafts from scratch are no stale state where earlier verdicts decide about drafts."""
    suite, file = write_suite(tmp_path, num_prompts=6, decoding={"max_new_tokens": 40}), tmp_path / "audit.json"
    common = ("--dtype", "float32", "--json", file)
    said = audit(suite, tiny_model, *common, "-b", "suffix", "-b", "recycling", "-b", "ngram")
    assert said.code == 0, said.out + said.err
    by_label = {each["label"]: each["restarts"]["compared"] for each in audited(file)}
    assert by_label["suffix"] == by_label["recycling"] == 0 < by_label["ngram"]


def test_sampled_answers_are_tested_and_the_power_is_stated(suite: Path, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    more = ("--temperature", "0.9", "--top-p", "0.9", "--draws", "60", "--json", file)
    said = audit(suite, tiny_model, "--dtype", "float32", "-b", "ngram", "-b", "hf", *more)
    assert said.code == 0, said.out + said.err
    assert "ngram: lossless. 240 sampled answers follow the target's exact distribution" in words(said)
    ngram, hf = audited(file)
    assert 0.1 < ngram["sampled"]["detectable_total_variation"] < 0.4
    assert ngram["sampled"]["power"] == 0.95
    assert ngram["sampled"]["draws"] == hf["sampled"]["draws"] == 240
    assert f"{ngram['sampled']['detectable_total_variation']:.1%} (total variation)" in words(said)


def test_too_few_answers_prove_nothing(suite: Path, tiny_model: Path) -> None:
    said = audit(suite, tiny_model, "-b", "ngram", "--temperature", "1", "--draws", "2")
    assert said.code == 3
    assert "ngram: unknown. 8 sampled answers are too few for a test: raise --draws." in words(said)


def test_a_real_difference_is_shown_with_tokens_logits_and_floor(
    suite: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, original = tmp_path / "audit.json", Ngram.generate

    def wrong_at_four(self: Ngram, request: GenerationRequest) -> Iterator[Any]:
        num_before = 0
        for step in original(self, request):
            ids = [*step.token_ids]
            if num_before <= 4 < num_before + len(ids):
                ids[4 - num_before] = (ids[4 - num_before] + 1) % 256
            num_before += len(ids)
            yield step._replace(token_ids=tuple(ids))

    monkeypatch.setattr(Ngram, "generate", wrong_at_four)
    said = audit(suite, tiny_model, "--dtype", "float32", "-b", "ngram", "--json", file)
    assert said.code == 1
    assert "ngram: NOT lossless. 0 of 8 outputs are plain decoding's; 8 differ by more than" in words(said)
    (found,) = audited(file)
    for each in found["divergences"]:
        divergence = each["divergence"]
        assert (divergence["position"], divergence["outcome"]) == (4, "real")
        assert divergence["gap"] == pytest.approx(divergence["expected_logit"] - divergence["found_logit"])
        assert divergence["gap"] > divergence["floor"] >= 0.0
        assert divergence["floor_source"].endswith("a forward against one")
    assert {each["prompt_id"] for each in found["divergences"]} == {"p0", "p1", "p2", "p3"}
    assert said.out.count("REAL") == 8


def test_bfloat16_of_another_engine_is_explained(tmp_path: Path, tiny_model: Path) -> None:
    """Here transformers rounds other logits than ours, so that ties fall the other way: in `run` as well."""
    suite = write_suite(tmp_path, num_prompts=8, decoding={"max_new_tokens": 60, "temperature": 0})
    said = audit(suite, tiny_model, "-b", "hf", "--json", tmp_path / "audit.json")
    assert said.code == 0, said.out + said.err
    (found,) = audited(tmp_path / "audit.json")
    assert found["outcomes"].get("tie", 0) + found["outcomes"].get("near_tie", 0) > 0
    assert found["verdict"] == "lossless but for rounding"
    for each in found["divergences"]:
        assert each["divergence"]["gap"] <= each["divergence"]["floor"]
        assert 0.0 < each["divergence"]["apart"] < 0.1
    ran = spdbench(
        "run", suite, "-m", tiny_model, "--threads", "1", "-b", "vanilla", "-b", "hf", "--results", tmp_path / "results"
    )
    assert ran.code == 0, ran.out + ran.err
    assert "diverged" not in ran.out


def test_another_engine_that_computes_something_else_is_real(
    suite: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers with weights of 2 % noise: its logits are near, but rounding in float32 does not explain them."""
    original = Generation.__init__

    def noisy(self: Generation, model: Any) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
        original(self, model)

    monkeypatch.setattr(Generation, "__init__", noisy)
    said = audit(suite, tiny_model, "--dtype", "float32", "-b", "hf")
    assert said.code == 1, said.out
    assert "hf: NOT lossless" in words(said)
    assert "of their spread from plain decoding's; rounding explains 0.0001" in words(said)


def test_a_crash_is_a_fault(suite: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Generation, *_: Any) -> Iterator[Round]:  # noqa: ARG001
        raise RuntimeError("it broke")

    monkeypatch.setattr(Generation, "rounds", crash)
    for more in ((), ("--temperature", "1", "--draws", "20")):
        said = audit(suite, tiny_model, "-b", "hf", "-b", "ngram", *more)
        assert said.code == 1
        assert "hf: faulty." in words(said)
        assert "RuntimeError: it broke" in words(said)
        assert "ngram: lossless." in words(said)


def test_what_is_lossy_by_design_is_not_audited(suite: Path, tiny_model: Path) -> None:
    said = audit(suite, tiny_model, "-b", "eagle", "--drafter", "forced:0.5")
    assert said.code == 3
    assert "eagle: not audited: by design its outputs are not the target's." in words(said)


def test_a_server_without_ids_cannot_be_audited(suite: Path, tiny_model: Path) -> None:
    server = StubServer()
    try:
        said = audit(suite, tiny_model, "-b", "openai", "-o", f"openai.base_url={server.url}")
    finally:
        server.close()
    assert said.code == 3, said.err
    assert "openai: not audited: it reports no token ids" in words(said)


def test_a_server_with_ids_and_without_log_probabilities_is_unknown(suite: Path, tiny_model: Path) -> None:
    server = StubServer()
    server.offers, server.takes_ids = {"ids", "usage"}, True
    try:
        options = (f"openai.base_url={server.url}", "openai.api=completions")
        more = [word for option in options for word in ("-o", option)]
        said = audit(suite, tiny_model, "-b", "openai", *more, "--max-new-tokens", "4")
    finally:
        server.close()
    assert said.code == 3, said.out + said.err
    assert "openai: unknown." in words(said)
    assert "it cannot be known whether a tie explains them" in words(said)


@pytest.mark.parametrize(
    ("backends", "message"),
    [
        (("vanilla",), "is what others are audited against; name another backend as well"),
        (("nonsense",), "nonsense"),
        ((), "Missing option"),
    ],
)
def test_wrong_input_is_exit_code_2(suite: Path, tiny_model: Path, backends: Sequence[str], message: str) -> None:
    chosen = [word for backend in backends for word in ("-b", backend)]
    said = audit(suite, tiny_model, *chosen)
    assert said.code == 2
    assert message in said.err


def test_another_vanilla_may_be_audited_against_the_first(suite: Path, tiny_model: Path) -> None:
    common = ("--dtype", "float32", "-o", "captured.graphs=on")
    said = audit(suite, tiny_model, *common, "-b", "captured=vanilla", "-b", "vanilla", "-b", "vanilla2=vanilla")
    assert said.code == 0, said.out + said.err
    assert "against captured" in words(said)
    assert "vanilla2: lossless." in words(said)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("suite.yaml", b"name: mini\n", "is a file of another kind, which would be lost"),
        ("no-folder/audit.json", None, "cannot be written (No such file or directory)"),
    ],
)
def test_a_file_that_cannot_be_written_or_would_be_lost_is_found_before_the_work(
    suite: Path, tiny_model: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "out" / name
    file.parent.parent.mkdir(exist_ok=True)
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    said = audit(suite, tiny_model, "-b", "ngram", "--json", file)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert not file.exists() or file.read_bytes() == content


def test_an_audit_may_replace_an_older_one(suite: Path, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    for number in (1, 2):
        said = audit(suite, tiny_model, "-b", "ngram", "--limit", str(number), "--json", file)
        assert said.code == 0, said.err
        assert json.loads(file.read_bytes())["num_prompts"] == number


def test_sampled_answers_that_end_too_early_are_a_fault(
    suite: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Ngram.generate

    def short(self: Ngram, request: GenerationRequest) -> Iterator[Any]:
        for _, step in zip(range(2), original(self, request), strict=False):
            yield step._replace(token_ids=step.token_ids[:1])

    monkeypatch.setattr(Ngram, "generate", short)
    said = audit(suite, tiny_model, "-b", "ngram", "--temperature", "1", "--draws", "20")
    assert said.code == 1, said.err
    assert "ngram: faulty." in words(said)
    assert "the answer ends after 2 of 4 tokens" in words(said)


def test_neither_secrets_nor_home_nor_control_codes_get_out(
    suite: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "very-secret-word")
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / "model\x1b[31m\u202e"
    shutil.copytree(tiny_model, odd)
    file = tmp_path / "audit.json"

    def crash(self: Generation, *_: Any) -> Iterator[Round]:  # noqa: ARG001
        raise RuntimeError(f"very-secret-word \x1b]0;title\x07 in {tmp_path}/here")

    for more in ((), ("--temperature", "1", "--draws", "20")):
        with monkeypatch.context() as patch:
            patch.setattr(Generation, "rounds", crash)
            said = audit(suite, odd, "-b", "hf", *more, "--json", file)
        assert said.code == 1
        for text in (said.out, said.err, file.read_text(encoding="utf-8")):
            assert not {"\x1b", "\x07", "\u202e"} & set(text)
            assert "very-secret-word" not in text
            assert str(tmp_path) not in text
        assert r"model\x1b[31m\u202e" in words(said)


def test_tokens_of_control_characters_and_wide_tables_are_shown_in_80_columns(
    suite: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("spdbench.cli.audit.session.AuditSession._text", lambda *_: repr("\x1b[2J\u202e\n\t"))
    original = Ngram.generate

    def wrong(self: Ngram, request: GenerationRequest) -> Iterator[Any]:
        for step in original(self, request):
            yield step._replace(token_ids=tuple((token + 1) % 256 for token in step.token_ids))

    monkeypatch.setattr(Ngram, "generate", wrong)
    said = audit(suite, tiny_model, "--dtype", "float32", "-b", "ngram")
    assert said.code == 1
    assert not {"\x1b", "\u202e", "\t"} & set(said.out)
    assert max(map(len, said.out.splitlines())) <= 80
