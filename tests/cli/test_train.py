"""`spdbench train` from the command line to a drafter that decoding finds, on a tiny random model."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spdbench.judge.results.schema import Result, read_result
from tests import tiny
from tests.cli.run_helpers import Said, spdbench, write_suite

QUICK = ("--dtype", "float32", "--threads", "1", "--max-length", "64", "--batch-tokens", "256", "--epochs", "1")


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    pass


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    talks = [[("user", f"q{i}"), ("assistant", f"answer {i} " * 2)] for i in range(12)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in talks]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "drafters" / "new"


def config_of(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def train(method: str, data: Path, out: Path, model: Path, *words: str | Path) -> Said:
    return spdbench("train", method, "--data", data, "--out", out, "-m", model, *QUICK, *words)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is interrupted when it has taken so many steps."""
    from spdbench.training.loop import Training

    whole_step = Training._step

    def stopped(self: Training, *args: Any) -> None:
        if self.state.step == step:
            raise KeyboardInterrupt
        whole_step(self, *args)

    monkeypatch.setattr(Training, "_step", stopped)


@pytest.mark.parametrize("method", ["spd", "ppsd"])
def test_a_trained_drafter_is_found_by_auto_and_measured(
    method: str, data: Path, out: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = train(method, data, out, tiny_model, "--stages", "3")
    assert said.code == 0, said.err
    assert said.out == ""
    assert "held-out acceptance" in said.err
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "train.jsonl"]
    config = config_of(out)
    assert (config["method"], config["num_stages"]) == (method, 3)
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(out.parent))
    assert drafter_of_a_run(method, tiny_model, tmp_path) == ("new", config["trained_tokens"])


def drafter_of_a_run(method: str, model: Path, folder: Path, *words: str) -> tuple[str, int | None]:
    """Which drafter a short run found, and how many tokens it has learned."""
    drafter = short_run(method, model, folder, *words).drafter
    assert drafter is not None
    return drafter.id, drafter.trained_tokens


def short_run(method: str, model: Path, folder: Path, *words: str) -> Result:
    words = ("-b", "vanilla", "-b", method, "-o", f"{method}.executor=inline", "--max-new-tokens", "8", *words)
    common = ("-m", model, "--dtype", "float32", "--results", folder / "results", "--threads", "1", "--limit", "1")
    said = spdbench("run", write_suite(folder), *common, *words)
    assert said.code == 0, said.err
    return read_result(folder / "results" / f"mini__{method}__tiny-llama.json")


def test_one_head_serves_every_number_of_stages_unless_there_is_one_for_it(
    data: Path, out: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = {"any": ("-o", "stage_counts=3,2"), "three": ("--stages", "3"), "uneven": ("-o", "stage_layers=1,2,3")}
    for name, words in heads.items():
        assert train("spd", data, out.with_name(name), tiny_model, *words).code == 0
    assert config_of(out.with_name("any"))["stage_counts"] == [3, 2]
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(out.parent))
    for asked, expected in (
        ("stages=6", "any"),
        ("stages=2", "any"),
        ("stages=3", "three"),
        ("stage_layers=1,2,3", "uneven"),
        ("stage_layers=1,4,1", "any"),
    ):
        assert drafter_of_a_run("spd", tiny_model, tmp_path, "-o", f"spd.{asked}")[0] == expected
    shutil.rmtree(out.with_name("any"))
    assert drafter_of_a_run("spd", tiny_model, tmp_path, "-o", "spd.stages=3")[0] == "three"


def test_an_interrupted_run_goes_on_and_a_finished_one_says_so(
    data: Path, out: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(2, patched)
        said = train("spd", data, out, tiny_model, "--batch-tokens", "64")
        assert said.code == 130
        assert "--resume goes on" in said.err
    assert (out / "checkpoint.pt").exists()
    said = train("spd", data, out, tiny_model, "--batch-tokens", "64", "--lr", "0.1", "--resume")
    assert said.code == 2
    assert "lr 0.001, now 0.1" in said.err
    assert train("spd", data, out, tiny_model, "--batch-tokens", "64", "--resume").code == 0
    steps = [json.loads(line).get("loss") for line in (out / "train.jsonl").read_text().splitlines()]
    assert len([loss for loss in steps if loss is not None]) > 2
    assert not (out / "checkpoint.pt").exists()
    said = train("spd", data, out, tiny_model, "--batch-tokens", "64", "--resume")
    assert said.code == 0
    assert "is finished" in said.err


def test_a_disk_that_fills_up_is_told_with_what_to_do(
    data: Path, out: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("spdbench.training.log.TrainingLog.append_line", full)
    said = train("spd", data, out, tiny_model)
    assert said.code == 2
    assert f"{out}: cannot be written (File too large); make room, then the same command with --resume" in said.err


def test_a_drafter_that_has_learned_nothing_is_told_apart(
    data: Path, out: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spdbench.training.loop.expected_length", lambda _: 0.5)
    said = train("spd", data, out, tiny_model)
    assert said.code == 0, said.err
    assert "that is the drafter as it began" in said.err


def test_a_new_run_sets_an_unfinished_one_aside_until_it_has_finished(
    data: Path, out: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir(parents=True)
    (out / "checkpoint.pt").write_bytes(b"old")
    (out / "checkpoint.pt.part").write_bytes(b"killed while it was written")
    with monkeypatch.context() as patched:
        interrupt_at(0, patched)
        assert train("spd", data, out, tiny_model).code == 130
    assert (out / "checkpoint.pt.old").read_bytes() == b"old"
    said = train("spd", data, out, tiny_model, "--resume")
    assert said.code == 0, said.err
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "train.jsonl"]


def test_the_drafter_of_an_older_run_is_not_taken_for_that_of_a_killed_one(
    data: Path, out: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("spd", data, out, tiny_model).code == 0
    older = json.loads((out / "config.json").read_text())
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("answer", "reply"))
    with monkeypatch.context() as patched:
        interrupt_at(0, patched)
        assert train("spd", other, out, tiny_model).code == 130
    said = train("spd", other, out, tiny_model, "--resume")
    assert said.code == 0, said.err
    assert "is finished" not in said.err
    assert json.loads((out / "config.json").read_text())["data_sha256"] != older["data_sha256"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lr", "0.1"), "lr 0.001, now 0.1"),
        (("--stages", "2"), "stages None, now 2"),
        (("--format", "spd-v11"), "format spdbench, now spd-v11"),
    ],
)
def test_a_finished_run_of_other_settings_is_not_this_one(
    data: Path, out: Path, tiny_model: Path, words: tuple[str, ...], expected: str
) -> None:
    assert train("spd", data, out, tiny_model).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said = train("spd", data, out, tiny_model, *words, "--resume")
    assert said.code == 2
    assert f"other settings: {expected}" in " ".join(said.err.split())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_overwrites_no_model_no_other_drafter_and_not_its_data(
    data: Path, out: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def refused(reason: str, *words: str | Path, method: str = "spd", to: Path = out, source: Path = data) -> None:
        before = {path.name: path.read_bytes() for path in to.iterdir()}
        said = train(method, source, to, tiny_model, *words)
        assert said.code == 2
        assert f"--out {to}: holds {reason}" in " ".join(said.err.split())
        assert {path.name: path.read_bytes() for path in to.iterdir()} == before

    assert train("spd", data, out, tiny_model).code == 0
    refused("a model, or a drafter of another method", method="medusa")
    assert train("spd", data, out, tiny_model).code == 0
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    refused("a model, or a drafter", "-m", model, to=model)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train.jsonl").hardlink_to(data)
    refused("the file of --data", to=tmp_path / "own")
    refused("the file of --data", to=tmp_path / "own", source=tmp_path / "own/train.jsonl")


def test_a_folder_with_a_model_is_no_finished_run(data: Path, out: Path, tiny_model: Path) -> None:
    out.mkdir(parents=True)
    (out / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    said = train("spd", data, out, tiny_model, "--resume")
    assert said.code == 2
    assert "no train.jsonl of a run" in " ".join(said.err.split())
    assert [path.name for path in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--stages", "4"), "cannot be split into 4"),
        (("--devices", "cpu,cpu"), "one device trains the drafter"),
        (("-o", "layer=2"), "did you mean 'layers'?"),
        (("-o", "layers=none"), "-o layers=none"),
        (("-o", "layers"), "expected KEY=VALUE"),
        (("--format", "eagle3"), "spdbench or spd-v11"),
        (("--format", "spd-v11", "-o", "stage_counts=2,3"), "is for one number of stages"),
        (("--stages", "3", "-o", "stage_counts=2,3"), "in place of --stages"),
        (("--format", "spd-v11", "-o", "stage_layers=1,2,3"), "knows equal stages only, not 1,2,3 layers"),
        (("--drafter", "random"), "No such option"),
        (("--budget", "soon"), "is not a duration"),
        (("--feature-cache", "much"), "is not a size"),
        (("--max-length", "3"), "at least 2 are needed"),
        (("--data", "/nowhere.jsonl"), "cannot be read"),
    ],
)
def test_wrong_words_are_one_message(
    data: Path, out: Path, tiny_model: Path, words: tuple[str, ...], expected: str
) -> None:
    said = train("spd", data, out, tiny_model, *words)
    assert said.code == 2
    assert expected in " ".join(said.err.split())
    assert "Traceback" not in said.err


@pytest.mark.parametrize("method", ["eagle3", "medusa"])
def test_stages_of_a_method_without_them_are_refused_before_anything_is_read(method: str, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    said = train(method, nowhere, nowhere, nowhere, "--stages", "3")
    assert said.code == 2
    assert f"--stages 3: {method} drafts for a model in one piece; leave it out" in " ".join(said.err.split())


def test_an_unknown_method_names_those_that_are_known(data: Path, out: Path, tiny_model: Path) -> None:
    said = train("sdp", data, out, tiny_model)
    assert said.code == 2
    assert "unknown method 'sdp'; did you mean 'spd'?" in said.err


def test_a_bad_line_is_named(data: Path, out: Path, tiny_model: Path) -> None:
    data.write_text(data.read_text() + "{\n")
    said = train("spd", data, out, tiny_model)
    assert said.code == 2
    assert "line 13" in said.err


def test_too_little_memory_is_told_before_anything_is_loaded(
    data: Path, out: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spdbench.training import space

    monkeypatch.setattr(space, "available_bytes", lambda device: 1000)  # noqa: ARG005
    said = train("spd", data, out, tiny_model)
    assert said.code == 2
    assert "GB are free" in said.err


def test_too_little_disk_only_costs_time_and_changes_nothing(data: Path, out: Path, tiny_model: Path) -> None:
    kept = train("spd", data, out / "kept", tiny_model)
    anew = train("spd", data, out / "anew", tiny_model, "--feature-cache", "0")
    assert kept.code == anew.code == 0
    said = train("spd", data, out / "little", tiny_model, "--feature-cache", "1KB")
    assert "runs again for every batch" in said.err
    files = [(out / name / "model.safetensors").read_bytes() for name in ("kept", "anew", "little")]
    assert files[0] == files[1] == files[2]


def test_a_model_without_a_chat_template_learns_plain_text_and_says_so(data: Path, out: Path, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "plain", eos_token_id=256)
    (model / "chat_template.jinja").unlink()
    said = train("spd", data, out, model)
    assert said.code == 0, said.err
    assert "no chat template" in said.err


def test_the_published_layout_is_written(data: Path, out: Path, tiny_model: Path) -> None:
    said = train("spd", data, out, tiny_model, "--format", "spd-v11", "--draft-vocab", "50")
    assert said.code == 0, said.err
    content = torch.load(out / "head.pt")
    assert content["config"]["version"] == 11
    assert content["state_dict"]["lm_head.weight"].shape == (50, 32)


def test_a_layout_that_medusa_heads_do_not_fit_is_told_before_they_are_trained(
    data: Path, out: Path, tiny_model: Path
) -> None:
    said = train("medusa", data, out, tiny_model, "--format", "v2", "--draft-vocab", "50")
    assert said.code == 2
    assert "--format v2: knows no draft vocabulary; give --draft-vocab 262" in " ".join(said.err.split())
    assert list(out.iterdir()) == []
    said = train("medusa", data, out, tiny_model, "--format", "v2", "--draft-vocab", "262")
    assert said.code == 0, said.err


def test_a_conversation_that_the_chat_template_refuses_is_skipped_and_named_by_its_line(
    data: Path, out: Path, tmp_path: Path
) -> None:
    model = tiny.make_model(tmp_path / "picky")
    refusal = "{% if messages[-1]['content'] == 'odd' %}{{ raise_exception('not that') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusal + tiny.CHAT_TEMPLATE)
    talk = [("user", "odd"), ("assistant", "a")]
    line = json.dumps({"messages": [{"role": role, "content": content} for role, content in talk]})
    data.write_text(data.read_text() + "\n" + line + "\n" + json.dumps({"messages": []}) + "\n")
    said = train("spd", data, out, model)
    assert said.code == 0
    assert f"NOTE: --data {data}: 2 of 14 conversations are skipped. The first: {data} line 15: messages" in said.err
    data.write_text(line + "\n")
    said = train("spd", data, out / "other", model)
    assert said.code == 2
    assert "data.jsonl line 1: the model's chat template refuses" in " ".join(said.err.split())


def test_a_new_run_keeps_the_drafter_of_a_finished_one(data: Path, out: Path, tiny_model: Path) -> None:
    assert train("eagle3", data, out, tiny_model).code == 0
    former = (out / "model.safetensors").read_bytes()
    said = train("eagle3", data, out, tiny_model, "--seed", "5")
    assert said.code == 0, said.err
    assert "is kept there, as config.json.old, model.safetensors.old" in " ".join(said.err.split())
    assert (out / "model.safetensors.old").read_bytes() == former
    assert (out / "model.safetensors").read_bytes() != former


def test_a_disk_that_fills_up_at_the_end_leaves_the_former_drafter(
    data: Path, out: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spdbench_backends.eagle import train as eagle_training

    assert train("eagle3", data, out, tiny_model).code == 0
    former = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "train.jsonl"}

    def full(_file: Any, directory: Path, _layout: str) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(eagle_training, "write_eagle", full)
        for more in ((), ("--resume",)):
            said = train("eagle3", data, out, tiny_model, "--seed", "5", *more)
            assert said.code == 2
            assert "make room, then the same command with --resume" in said.err
            assert {name: (out / name).read_bytes() for name in former} == former
    assert train("eagle3", data, out, tiny_model, "--seed", "5", "--resume").code == 0
    assert (out / "model.safetensors.old").read_bytes() == former["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() != former["model.safetensors"]


def test_conversations_are_held_out_with_all_their_turns() -> None:
    """A template that changes earlier answers makes a sequence of each turn."""
    from spdbench.cli.train.session import _data
    from spdbench.training.tokens import TokenSequence

    grouped = [[TokenSequence((i,) * 9, (True,) * 9)] * (1 + i % 3) for i in range(40)]
    options: Any = SimpleNamespace(held_out=0.2, seed=1)
    found = _data(grouped, options)
    conversations = [i for i, group in enumerate(grouped) for _ in group]
    learned, held = ({conversations[index] for index in side} for side in (found.learned, found.held_out))
    assert len(held) == 8
    assert not learned & held
    assert sorted((*found.learned, *found.held_out)) == list(range(len(conversations)))


def test_ppsd_runs_on_the_uneven_stages_that_it_was_trained_for(data: Path, out: Path, tiny_model: Path) -> None:
    said = train("ppsd", data, out, tiny_model, "-o", "stage_layers=1,2,3")
    assert said.code == 0, said.err
    words, folder = ("--drafter", str(out)), out.parents[1]
    assert short_run("ppsd", tiny_model, folder, *words).backend.stage_layers == [1, 2, 3]
    balanced = short_run("ppsd", tiny_model, folder, *words, "-o", "ppsd.stage_layers=auto").backend.stage_layers
    assert (balanced[0], sum(balanced)) == (1, 6)
