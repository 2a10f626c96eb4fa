"""Models with recurrent layers from the command line: what is measured, what is stated, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spdbench.judge.results.schema import read_result
from tests import tiny
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.unit.spd.transcription import write_head

COMMON = ("--dtype", "float32", "--devices", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a text model within one that reads images."""
    return tiny.nest(tiny.make_model(tmp_path_factory.mktemp("hybrid"), "qwen3_5_text", seed=3))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("text"), "qwen3_5_text", seed=3)


def run(folder: Path, model: Path, *words: str | Path) -> Said:
    return spdbench("run", write_suite(folder), "--limit", "2", "--results", folder, "-m", model, *COMMON, *words)


def test_methods_agree_and_results_state_the_snapshots(tmp_path: Path, model: Path) -> None:
    backends = ("vanilla", "spd", "ppsd", "eagle", "medusa", "ngram", "draft_model")
    words = [word for name in backends for word in ("-b", name)]
    pipelines = [f"{name}.{option}" for name in ("spd", "ppsd") for option in ("stages=3", "executor=inline")]
    chains = ["eagle.tree=chain", "medusa.tree=chain", "ngram.num_tokens=3", "draft_model.num_tokens=2"]
    options = [word for option in (*pipelines, *chains) for word in ("-o", option)]
    said = run(tmp_path, model, *words, *options, "--drafter", "random")
    assert said.code == 0, said.err
    results = {path.name.split("__")[1]: read_result(path) for path in tmp_path.glob("mini__*.json")}
    assert set(results) == set(backends)
    answers: dict[str, Any] = {name: [run.output_ids for run in result.runs] for name, result in results.items()}
    assert all(found == answers["vanilla"] for found in answers.values())
    chosen = {name: result.backend.chosen.get("snapshots") for name, result in results.items()}
    assert chosen == {
        "vanilla": None,
        "spd": "2, 1, 0 by stage, 0.0072 MB",
        "ppsd": "2, 1, 0 by stage, 0.0072 MB",
        "eagle": "4, 0.023 MB",
        "medusa": "5, 0.0288 MB",
        "ngram": "3, 0.0173 MB",
        "draft_model": "2, 0.0115 MB",
    }


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ("-b", "eagle", "-o", "eagle.tree=dynamic"),
            "-o eagle.tree=dynamic: this model has recurrent layers, which take",
        ),
        (("-b", "medusa", "-o", "medusa.tree=mc_sim_7b_63"), "-o medusa.tree=mc_sim_7b_63: this model has recurrent"),
        (("-b", "vanilla", "-o", "vanilla.graphs=on"), "cannot be captured for replays: it has recurrent layers"),
        (("-b", "spd", "-o", "spd.executor=streams"), "cannot be captured for replays: it has recurrent layers"),
    ],
)
def test_what_recurrent_layers_cannot_do_is_refused(
    tmp_path: Path, model: Path, words: tuple[str, ...], why: str
) -> None:
    said = run(tmp_path, model, *words, "--drafter", "random")
    assert said.code == 2
    assert why in said.err
    assert len(said.err.strip().splitlines()) <= 4


@pytest.mark.parametrize(
    ("version", "change", "why"),
    [
        (
            12,
            {"stage_layers": [1, 2, 2]},
            "head.pt: config: stage_layers=1,2,2: adds up to 5 layers, but the model has 6",
        ),
        (11, {"model_type": "llama"}, "config.model_type is llama, but here it is qwen3_5"),
        (11, {"hidden_size": 48}, "config.hidden_size is 48, but here it is 32"),
        (11, {"vocab_size": 99}, "config.vocab_size is 99, but here it is 262"),
        (11, {"num_stages": 4}, "stages=4: 6 layers cannot be split into 4 equal stages"),
    ],
)
def test_heads_for_something_else_are_refused(
    tmp_path: Path, text_model: Path, version: int, change: dict[str, Any], why: str
) -> None:
    head = write_head(tmp_path / "head.pt", text_model, version, **change)
    said = run(tmp_path, text_model, "-b", "spd", "-o", "spd.executor=inline", "--drafter", head)
    assert said.code == 2
    assert why in said.err


def test_a_published_head_is_measured(tmp_path: Path, text_model: Path) -> None:
    head = write_head(tmp_path / "head.pt", text_model, 12, stage_layers="1;3;2", aggr_feature_bound=[0, 1, 4, 6])
    words = ("-b", "vanilla", "-b", "spd", "-o", "spd.executor=inline", "--drafter", head)
    said = run(tmp_path, text_model, *words)
    assert said.code == 0, said.err
    (path,) = tmp_path.glob("mini__spd__*.json")
    result = read_result(path)
    assert list(result.backend.stage_layers) == [1, 3, 2]
    assert result.drafter is not None
    assert result.drafter.sha256


def test_training_makes_what_it_can(tmp_path: Path, text_model: Path) -> None:
    data = tmp_path / "data.jsonl"
    talks = [[("user", f"q{i}"), ("assistant", f"answer {i} " * 2)] for i in range(12)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in talks]
    data.write_text("\n".join(lines) + "\n")
    quick = (*COMMON[:2], *COMMON[4:], "--max-length", "64", "--batch-tokens", "256", "--epochs", "1")
    for method, backend, words in (
        ("ppsd", "ppsd", ("--stages", "3")),
        ("medusa", "medusa", ()),
        ("eagle3", "eagle", ()),
    ):
        out = tmp_path / method
        said = spdbench("train", method, "--data", data, "--out", out, "-m", text_model, *quick, *words)
        assert said.code == 0, said.err
        inline = ("-o", f"{backend}.executor=inline") if backend == "ppsd" else ("-o", f"{backend}.tree=chain")
        said = run(tmp_path, text_model, "-b", "vanilla", "-b", backend, *inline, "--drafter", out)
        assert said.code == 0, said.err
    said = spdbench("train", "spd", "--data", data, "--out", tmp_path / "spd", "-m", text_model, *quick)
    assert said.code == 2
    assert "the draft layers of a head for qwen3_5 have gates, which are not trained here" in said.err


def test_distilling_is_refused(tmp_path: Path, model: Path) -> None:
    said = spdbench("distill", "--out", tmp_path / "data.jsonl", "--tokens", "50", "-m", model, *COMMON)
    assert said.code == 2
    assert "distill decodes many conversations in parallel, which recurrent layers (qwen3_5) do not support" in said.err
