"""`spdbench run` from the command line to the files, on a tiny random model."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor, nan

from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft
from spdbench.judge.results.schema import Result, json_schema, read_result
from spdbench.measure import energy
from spdbench.measure.machine_watch import MachineWatch
from spdbench.models.hf import library
from tests import tiny
from tests.builders import make_load
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.mock_backend import MockSpans

INLINE = ("-o", "spd.executor=inline")
"""Stages in this process start at once; tests/processes has those in processes of their own."""

MOCKS = {"drafting": "MockSpans", "piped": "MockPipelineSpans"}


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    pass


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_model, tmp_path)


class Runs:
    """`spdbench run` on the tiny model, results in a folder of the test's own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        self.model = model

    def __call__(self, *words: str | Path, suite: Path | None = None) -> Said:
        suite = suite or write_suite(self.folder)
        common = ("-m", self.model, "--dtype", "float32", "--results", self.results, "--threads", "1")
        return spdbench("run", suite, *common, *words)

    def result(self, label: str, suite: str = "mini") -> Result:
        return read_result(self.results / f"{suite}__{label}__{self.model.name}.json")

    def files(self) -> list[str]:
        return sorted(path.name for path in self.results.iterdir()) if self.results.exists() else []


def test_two_backends_give_two_valid_results_and_a_table(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = run("-b", "vanilla", "-b", "spd", "-o", "spd.stages=3", "--drafter", "oracle:0.8")
    assert said.code == 0, said.err
    assert run.files() == ["mini__spd__tiny-llama.json", "mini__vanilla__tiny-llama.json"]
    for name in run.files():
        jsonschema.validate(json.loads((run.results / name).read_text()), json_schema())
    assert "4/4" in said.out
    assert "oracle:0.8" in said.out
    assert "synthetic" in said.out
    assert "Wrote" in said.err
    assert "Wrote" not in said.out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows what else a machine does")
def test_results_say_what_else_the_machine_did_during_each_request(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads that take turns: each request is measured again once, and the less disturbed measurement counts."""
    loads = itertools.cycle([make_load(0.8, who=["make"]), make_load(0.4, who=["make"])])
    real = MachineWatch.load
    said = run("-b", "vanilla", "-b", "spd", "--drafter", "oracle:0.8")
    assert all(one.machine and one.machine.others is not None for one in run.result("spd").runs), said.err
    monkeypatch.setattr(MachineWatch, "load", lambda *words: next(loads) if real(*words) else None)
    said = run("-b", "vanilla", "-b", "spd", "--drafter", "oracle:0.8", "--remeasure", "1")
    for label in ("vanilla", "spd"):
        assert {(one.machine.others, len(one.set_aside)) for one in run.result(label).runs if one.machine} == {(0.4, 1)}
    shown = " ".join(said.out.split())
    assert "make took 40% of all cores: end it, or --remeasure 2." in shown
    assert "measured again (--remeasure)" in shown


def test_results_say_what_was_measured(run: Runs) -> None:
    run(
        "-b",
        "vanilla",
        "-b",
        "spd",
        "-o",
        "spd.stage_layers=3,2,1",
        "--drafter",
        "oracle:1",
        "--seed",
        "5",
        "--limit",
        "2",
        *INLINE,
    )
    result = run.result("spd")
    assert result.backend.stage_layers == [3, 2, 1]
    assert result.backend.lanes == 3
    assert sum(result.backend.lane_bytes) == sum(run.result("vanilla").backend.lane_bytes)
    assert (result.decoding.seed, result.suite.num_prompts, len(result.runs)) == (5, 2, 2)
    assert result.divergence is not None
    assert (result.divergence.identical, result.divergence.real) == (2, 0)
    assert result.drafter is not None
    assert result.drafter.synthetic
    assert result.model.num_layers == 6
    assert len(result.model.sha256) == 64
    assert [flag.name for flag in result.flags if flag.name == "synthetic_drafter"]
    assert result.summary.overall["acceptance_rate"] == 1.0
    assert result.run_key != run.result("vanilla").run_key


@pytest.fixture
def mocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that take spans, on a clock of their own."""
    points = {name: EntryPoint(name, f"tests.mock_backend:{cls}", "spdbench.backends") for name, cls in MOCKS.items()}
    monkeypatch.setattr("spdbench.backend.installed_backends", lambda: points)
    monkeypatch.setattr("spdbench.measure.clock.time", MockSpans.time)


@pytest.mark.usefixtures("mocks")
def test_spans_become_bubbles_in_files_and_table(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    said = run("-b", "drafting", "-b", "piped", "--drafter", "random")
    assert said.code == 0, said.err
    for label, ratio in (("drafting", 0.4), ("piped", 1 - (50 + 130 + 11 * 190) / (3 * 1300))):
        found = run.result(label).summary
        assert found.overall["bubble_ratio"] == pytest.approx(ratio)
        assert found.by_category["maths"]["bubble_ratio"] == pytest.approx(ratio)
        assert f"{100 * ratio:.1f}%" in said.out
    assert run.result("piped").summary.overall["cycle_efficiency"] == pytest.approx(0.8)
    assert run.result("drafting").summary.overall["cycle_efficiency"] is None
    detailed = " ".join(spdbench("compare", run.results, "--details").out.split())
    assert "drafting: draft 20.0%, verify 10.0%, host 5.0%, unattributed 5.0%" in detailed
    flags = {label: [flag.name for flag in run.result(label).flags] for label in ("drafting", "piped")}
    assert "unattributed" not in flags["drafting"]
    for name in run.files():
        jsonschema.validate(json.loads((run.results / name).read_text()), json_schema())


@pytest.mark.usefixtures("mocks")
def test_resuming_keeps_what_came_from_spans(run: Runs) -> None:
    run("-b", "piped", "--drafter", "random")
    before = run.result("piped").runs
    assert all(found.bubble and found.full_cycles for found in before)
    assert run("-b", "piped", "--drafter", "random", "--resume").code == 0
    assert run.result("piped").runs == before


def test_energy_is_measured_where_the_machine_counts_it(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("energy_uj", "1000"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(text)
    original = energy._number

    def moving(file: Path) -> int | None:
        found = original(file)
        if file.name == "energy_uj":
            file.write_text(str((found or 0) + 2_000_000))
        return found

    monkeypatch.setattr(energy, "_number", moving)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    said = run("-b", "vanilla")
    assert said.code == 0, said.err
    result = run.result("vanilla")
    assert [found.energy_j for found in result.runs] == [2.0] * 4
    assert result.environment["energy"] == ["RAPL package-0"]
    tokens = sum(found.num_new_tokens for found in result.runs)
    assert result.summary.overall["energy_j_per_token"] == pytest.approx(8 / tokens)
    assert "J/tok" in said.out
    assert "what RAPL package-0 counted" in spdbench("compare", run.results, "--details").out


def test_without_counters_there_is_no_energy_at_all(run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "nowhere")
    said = run("-b", "vanilla")
    assert run.result("vanilla").summary.overall["energy_j_per_token"] is None
    assert run.result("vanilla").environment["energy"] == []
    assert {found.energy_j for found in run.result("vanilla").runs} == {None}
    assert "J/tok" not in said.out


def test_no_file_tells_of_home_folders_or_secrets(run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, drafter and an option name files in the home folder; the journal of a crash is looked at as well."""
    home = tmp_path / "planted_home"
    run.model = Path(shutil.copytree(run.model, home / "models" / "mine"))
    small = Path(shutil.copytree(run.model, home / "models" / "small"))
    for name, value in (("HOME", str(home)), ("HF_TOKEN", "hf_planted_token"), ("USER", "planted_user")):
        monkeypatch.setenv(name, value)

    def crash(*_: object) -> Any:
        raise OSError(f"no space in {home} for hf_planted_token")

    monkeypatch.setattr("spdbench_backends.ngram.Ngram.generate", crash)
    words = ("-b", "vanilla", "-b", "draft_model", "-b", "ngram", "-o", f"draft_model.model={small}")
    said = run(*words, "--drafter", f"draft_model={small}")
    assert said.code == 1, said.err
    assert run.result("draft_model").backend.options["model"] == "small"
    assert run.result("ngram").runs[0].error == "OSError: no space in ~ for ***"
    for path in run.results.iterdir():
        text = path.read_text()
        assert "planted" not in text
        assert str(tmp_path) not in text


def test_a_journal_tells_of_no_folder_either(run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Path(shutil.copytree(run.model, tmp_path / "planted_folder" / "small"))

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("spdbench_backends.draft_model.DraftModel.generate", interrupted)
    words = (
        "-b",
        "vanilla",
        "-b",
        "draft_model",
        "-o",
        f"draft_model.model={small}",
        "--drafter",
        f"draft_model={small}",
    )
    assert run(*words, "--warmup", "0").code == 130
    journals = sorted(run.results.glob("*.journal.jsonl"))
    assert journals
    assert all("planted" not in path.read_text() for path in journals)


def test_results_name_the_tokenizer_by_its_hash(run: Runs, tmp_path: Path) -> None:
    run("-b", "vanilla")
    before = run.result("vanilla").model
    assert before.tokenizer_sha256 is not None
    assert len(before.tokenizer_sha256) == 64
    run.model = Path(shutil.copytree(run.model, tmp_path / "other"))
    tokenizer = json.loads((run.model / "tokenizer.json").read_text())
    (run.model / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    run("-b", "vanilla")
    assert run.result("vanilla").model.tokenizer_sha256 != before.tokenizer_sha256
    assert run.result("vanilla").model.sha256 == before.sha256


def test_one_backend_in_several_ways(run: Runs) -> None:
    two = ("-b", "two=spd", "-o", "two.stages=2", "-o", "two.executor=inline")
    three = ("-b", "three=spd", "-o", "three.stages=3", "-o", "three.executor=inline")
    said = run(*two, *three, "--drafter", "oracle:0.5", "--drafter", "three=oracle:1")
    assert said.code == 0, said.err
    assert run.result("two").backend.options["stages"] == 2
    drafters = [run.result(label).drafter for label in ("two", "three")]
    assert [drafter.id for drafter in drafters if drafter] == ["oracle:0.5", "oracle:1"]
    assert run.result("two").divergence is None  # no vanilla here to compare with


def test_without_backends_vanilla_and_spd_are_measured(run: Runs) -> None:
    assert run("--drafter", "oracle:1").code == 0
    assert len(run.files()) == 2
    assert run.result("spd").backend.stage_layers == [2, 2, 2]


def test_conversations_share_the_baselines_answers(run: Runs) -> None:
    suite = write_suite(run.folder, turns=3)
    run("-b", "vanilla", "-b", "spd", "--drafter", "random", "--repeats", "2", *INLINE, suite=suite)
    vanilla, spd = run.result("vanilla"), run.result("spd")
    assert vanilla.labels == spd.labels == ["vanilla", "spd"]
    assert len(vanilla.runs) == 4 * 3 * 2
    assert {r.key: r.prompt_sha256 for r in vanilla.runs} == {r.key: r.prompt_sha256 for r in spd.runs}
    assert {r.key: r.output_ids for r in vanilla.runs} == {r.key: r.output_ids for r in spd.runs}


def test_sampling_is_reproducible_by_seed(run: Runs) -> None:
    outputs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("-b", "vanilla", "--temperature", "1", "--seed", seed, "--name", name)
        outputs.append(
            [r.output_ids for r in read_result(run.results / f"mini__vanilla__tiny-llama__{name}.json").runs]
        )
    assert outputs[0] == outputs[1] != outputs[2]


def test_forced_verdicts_are_lossy_and_never_compared(run: Runs, tmp_path: Path) -> None:
    (known := tmp_path / "known.json").write_text('{"summary": {"overall": {"acceptance_by_position": [0.7]}}}')
    said = run("--drafter", f"forced:{known}", *INLINE)
    assert said.code == 0
    assert said.err.count(f"NOTE: --drafter forced:{known}: the result has the acceptance of 1 position: rounds") == 1
    result = run.result("spd")
    assert result.backend.lossy
    assert result.divergence is None


def test_a_new_run_replaces_the_old_result_only_at_its_end(run: Runs) -> None:
    run("-b", "vanilla")
    before = run.result("vanilla").created
    assert run("-b", "vanilla", "--temperature", "-1").code == 2
    assert run.result("vanilla").created == before


def test_resuming_nothing_is_a_new_run_and_says_so(run: Runs) -> None:
    said = run("-b", "vanilla", "--resume")
    assert said.code == 0
    assert "nothing to resume" in said.err
    assert len(run.result("vanilla").runs) == 4


def test_resuming_a_finished_run_changes_nothing(run: Runs) -> None:
    words = ("-b", "vanilla", "-b", "spd", "--drafter", "oracle:0.7", *INLINE)
    run(*words)
    before = run.result("spd")
    assert run(*words, "--resume").code == 0
    after = run.result("spd")
    assert (after.runs, after.created, after.divergence) == (before.runs, before.created, before.divergence)
    assert len(run.files()) == 2


def test_resuming_a_finished_run_with_other_options_keeps_it(run: Runs) -> None:
    """A finished run leaves no journal; its result alone has to tell what it was."""
    run("-b", "vanilla")
    before = {name: (run.results / name).read_bytes() for name in run.files()}
    said = run("-b", "vanilla", "--max-new-tokens", "3", "--resume")
    assert said.code == 2
    assert "is a finished run with other settings: max_new_tokens 12, now 3" in said.err
    assert {name: (run.results / name).read_bytes() for name in run.files()} == before


def test_a_journal_with_a_request_of_another_run_is_refused(run: Runs) -> None:
    run("-b", "vanilla")
    result = run.results / "mini__vanilla__tiny-llama.json"
    data = json.loads(result.read_text())
    data["runs"][0]["prompt_id"] = "stranger"
    result.write_text(json.dumps(data))
    said = run("-b", "vanilla", "--resume")
    assert said.code == 2
    assert "holds a request that is not in this run: ('stranger', 0, 0)" in said.err


BAD = [
    (("-b", "spdd"), "unknown backend 'spdd'; did you mean 'spd'?"),
    (("-o", "spd.stagez=3"), "-o spd.stagez: unknown option; did you mean 'stages'?"),
    (("-o", "spd.stages=many"), "-o spd.stages=many: "),
    (("-o", "sdp.stages=3"), "no backend here has the label 'sdp'; did you mean 'spd'?"),
    (("-o", "stages=3"), "expected LABEL.KEY=VALUE, LABEL being one of: vanilla, spd"),
    (("--temperature", "1e-310"), "too small to divide by"),
    (("--threads", "100000000000"), "'--threads'"),
    (("-o", "spd.stages=4", "--drafter", "oracle:1"), "-o spd.stages=4: 6 layers cannot be split into 4 equal stages"),
    (("-o", "spd.stage_layers=3,4", "--drafter", "oracle:1"), "adds up to 7 layers, but the model has 6"),
    (("-o", "spd.stage_layers=3,x", "--drafter", "oracle:1"), "-o spd.stage_layers"),
    (
        ("-o", "spd.executor=magic"),
        "-o spd.executor=magic: Input should be 'auto', 'process', 'inline', 'streams' or 'torchrun'",
    ),
    (("--drafter", "oracle:0.8", "--temperature", "0.7"), "oracle:0.8 works with --temperature 0 only (given: 0.7)"),
    (("--drafter", "oracle:2"), "oracle needs an acceptance from 0 to 1"),
    (("--drafter", "/nowhere/head.pt"), "no such file or folder"),
    (("--drafter", "dps=oracle:1"), "no backend here has the label 'dps'"),
    ((), "--drafter auto: no trained spd drafter for tiny-llama is installed"),
    (("-b", "vanilla", "-b", "vanilla"), "the label 'vanilla' is taken"),
    (("-b", "a/b=vanilla"), "a label is made of letters"),
    (("--temperature", "-1"), "'--temperature'"),
    (("--temperature", "nan"), "--temperature"),
    (("--limit", "0"), "'--limit'"),
    (("--top-p", "0"), "'--top-p'"),
    (("--max-new-tokens", "0"), "'--max-new-tokens'"),
    (("--devices", "cuda:9"), "--devices cuda:9: this machine has"),
    (("--devices", "tpu"), "--devices tpu: not a device"),
    (("--dtype", "int8"), "'--dtype'"),
    (("--data", "/nowhere"), "/nowhere"),
    (("--name", "a/b"), "--name a/b"),
]


@pytest.mark.parametrize(("words", "why"), BAD, ids=[" ".join(words) or "no drafter" for words, _ in BAD])
def test_wrong_input_is_one_clear_message_and_exit_code_2(run: Runs, words: tuple[str, ...], why: str) -> None:
    said = run(*words)
    assert said.code == 2, said.err
    assert why in " ".join(said.err.split())
    assert "Traceback" not in said.err
    assert said.out == ""
    assert run.files() == []


def test_a_prompt_longer_than_the_context(run: Runs) -> None:
    prompts = [{"id": "long", "category": "a", "turns": ["word " * 100]}]
    suite = write_suite(run.folder, prompts={"source": [{"inline": prompts}]})
    said = run("-b", "vanilla", suite=suite)
    assert said.code == 2
    assert "prompt long: " in said.err
    assert "no room in the model's context of 256" in said.err
    assert run.files() == []


def test_prompts_that_the_model_cannot_be_given_fail_and_the_others_go_on(run: Runs, tmp_path: Path) -> None:
    run.model = shutil.copytree(run.model, tmp_path / "strict")
    template = run.model / "chat_template.jinja"
    refusal = "{% if 'forbidden' in messages[0]['content'] %}{{ raise_exception('no such word') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    texts = {"first": "forbidden", "good": "Say 1.", "long": "word " * 100, "fine": "Say 2."}
    prompts = [{"id": name, "category": "a", "turns": [text, "And now?"]} for name, text in texts.items()]
    said = run("-b", "vanilla", "-b", "ngram", suite=write_suite(run.folder, prompts={"source": [{"inline": prompts}]}))
    assert said.code == 1, said.err
    assert (
        "NOTE: 2 of 4 prompts cannot be given to the model and count as failed. The first: prompt first: " in said.err
    )
    assert said.err.count("no such word") == 1
    assert "Traceback" not in said.err
    for label in ("vanilla", "ngram"):
        found = {(one.prompt_id, one.turn): one.error for one in run.result(label).runs}
        assert len(found) == 8
        assert {key[0] for key, error in found.items() if error is None} == {"good", "fine"}
        assert "no such word" in str(found["first", 0])
        assert "no such word" in str(found["first", 1])
        assert "no longer fits" in str(found["long", 0])


def test_logits_that_are_not_numbers_fail_their_prompt_only(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("load_decoder", "hf.library"):
        monkeypatch.setattr(f"spdbench.models.{module}.require_finite", lambda *_: None)
    run.model = shutil.copytree(run.model, tmp_path / "overflowing")
    tensors = load_file(run.model / "model.safetensors")
    bad = tiny.make_tokenizer().convert_tokens_to_ids("3")
    tensors["model.embed_tokens.weight"][bad] = nan
    save_file(tensors, run.model / "model.safetensors", {"format": "pt"})
    said = run("-b", "vanilla", "-b", "ngram", "-b", "spd", "-b", "hf", "--drafter", "spd=random", *INLINE)
    assert said.code == 1, said.err
    assert "failed on prompt p3:\nlogits are not numbers (NaN)" in said.err
    assert "Traceback" not in said.err
    for label in ("vanilla", "ngram", "spd", "hf"):
        found = {one.prompt_id: one.error for one in run.result(label).runs}
        assert {prompt for prompt, error in found.items() if error is None} == {"p0", "p1", "p2"}
        assert str(found["p3"]).startswith("logits are not numbers (NaN)")


def test_a_results_folder_that_cannot_be_written(run: Runs) -> None:
    run.results.write_text("a file")
    said = run("-b", "vanilla")
    assert said.code == 2
    assert "results" in said.err
    assert run.results.read_text() == "a file"


def test_a_folder_in_the_place_of_a_result(run: Runs) -> None:
    (run.results / "mini__vanilla__tiny-llama.json").mkdir(parents=True)
    said = run("-b", "vanilla")
    assert said.code == 2
    assert "is a folder, where a result file has to go" in said.err


def test_a_truncated_journal_that_holds_no_whole_header(run: Runs) -> None:
    run.results.mkdir()
    journal = run.results / "mini__vanilla__tiny-llama.journal.jsonl"
    journal.write_text('{"journal": "spdbe')
    said = run("-b", "vanilla", "--resume")
    assert said.code == 2
    assert "cannot be resumed" in said.err
    assert run.files() == [journal.name]


def test_a_drafter_for_another_stage_count(run: Runs) -> None:
    import torch

    from spdbench.models.partition import split_evenly
    from spdbench_backends.spd.formats import random_head

    target = tiny.load(run.model).own_decoder
    head = random_head(target, split_evenly(6, 2), 0)
    assert target.head is not None
    state = {**head.tensors, "lm_head.weight": target.head.plain()}
    torch.save({"state_dict": state, "config": head.config.model_dump()}, run.folder / "head.pt")
    said = run("-o", "spd.stages=3", "--drafter", run.folder / "head.pt")
    assert said.code == 2
    assert "config.num_stages is 2, but here it is 3; use -o spd.stages=2" in said.err
    assert run("--drafter", run.folder / "head.pt", *INLINE).code == 0
    assert run.result("spd").backend.options["stages"] is None
    assert run.result("spd").backend.lanes == 2


def test_an_installed_drafter_is_found_by_weights_method_and_stages(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    from spdbench.models.checkpoints.find_model import find_model
    from spdbench.models.partition import split_evenly
    from spdbench_backends.spd.formats import random_head

    head = random_head(tiny.load(run.model).own_decoder, split_evenly(6, 2), 0)
    folder = run.folder / "drafters" / "mine"
    folder.mkdir(parents=True)
    config = {
        **head.config.model_dump(),
        "method": "spd",
        "model_sha256": find_model(str(run.model)).sha256,
        "trained_tokens": 123,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(head.tensors), folder / "model.safetensors")
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(folder.parent))
    assert run(*INLINE).code == 0
    drafter = run.result("spd").drafter
    assert drafter is not None
    assert (drafter.id, drafter.trained_tokens, drafter.synthetic) == ("mine", 123, False)
    assert run("-o", "spd.stages=3").code == 2


def test_a_failed_prompt_is_exit_code_1_and_no_number(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from spdbench_backends.spd.backend import SPD

    original = SPD.generate
    calls = []

    def breaks_once(self: SPD, request: object) -> object:
        calls.append(request)
        if len(calls) == 3:
            raise RuntimeError("stage 1 is gone")
        return original(self, request)  # type: ignore[arg-type]

    monkeypatch.setattr(SPD, "generate", breaks_once)
    said = run("--drafter", "oracle:1", *INLINE)
    assert said.code == 1
    assert "stage 1 is gone" in said.err
    assert "Traceback" in said.err
    failed = [r for r in run.result("spd").runs if r.finish_reason == "error"]
    assert len(failed) == 1
    assert failed[0].error == "RuntimeError: stage 1 is gone"
    assert run.result("spd").summary.overall["num_failed"] == 1


def test_a_real_divergence_is_exit_code_1(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from spdbench.decoding.verify import DraftVerdict, verify_siblings

    def accepts_everything(logits: Tensor, drafts: Sequence[Draft], sampler: Sampler) -> DraftVerdict:
        verdict = verify_siblings(logits, drafts, sampler)
        return DraftVerdict(True, drafts[0].token_id) if drafts else verdict

    monkeypatch.setattr("spdbench_backends.spd.engine.verify_siblings", accepts_everything)
    said = run("--drafter", "oracle:0.5", *INLINE)
    assert said.code == 1
    divergence = run.result("spd").divergence
    assert divergence is not None
    assert divergence.real == len(divergence.first) > 0
    first = divergence.first[0].divergence
    expected, found = (run.result(label).runs[0].output_ids for label in ("vanilla", "spd"))
    assert divergence.first[0].prompt_id == run.result("spd").runs[0].prompt_id
    assert expected[: first.position] == found[: first.position]
    assert (first.expected, first.found) == (expected[first.position], found[first.position])
    assert None not in (first.expected_logit, first.found_logit)
    assert first.gap is not None
    assert first.floor is not None
    assert abs(first.gap) > first.floor
    assert "diverged" in said.out


def test_the_model_folder_is_left_as_it_was(run: Runs) -> None:
    model = Path(shutil.copytree(run.model, run.folder / "mine"))
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    spdbench("run", write_suite(run.folder), "-m", model, "-b", "vanilla", "--results", run.results)
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before


def test_a_model_that_our_own_layers_do_not_know_runs_and_says_so(run: Runs, tmp_path: Path) -> None:
    run.model = tiny.make_model(tmp_path / "tiny-gpt2", "gpt2")
    said = run("-o", "spd.stages=3", "--drafter", "oracle:0.8", *INLINE)
    assert said.code == 0, said.err
    divergence = run.result("spd").divergence
    assert divergence is not None
    assert divergence.identical == 4
    assert said.err.count("NOTE: architecture 'gpt2' is not one that spdbench's own layers know") == 1
    assert {run.result(label).backend.kernels for label in ("vanilla", "spd")} == {"transformers"}


def test_a_model_that_our_own_layers_know_says_which_kernels(run: Runs) -> None:
    said = run("-b", "vanilla")
    assert "NOTE" not in said.err
    assert run.result("vanilla").backend.kernels in ("numba", "torch")


def test_a_model_that_cannot_be_run_in_stages_is_refused(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = library.load_causal_model

    def with_a_shortcut(*words: Any) -> Any:
        """The first layer's output is added to the third's."""
        model, seen = load(*words), list[Tensor]()
        first, _, third, *_ = model.transformer.h
        first.register_forward_hook(lambda _layer, _given, out: seen.append(out))
        third.register_forward_hook(lambda _layer, _given, out: out + seen[-1])
        return model

    monkeypatch.setattr(library, "load_causal_model", with_a_shortcut)
    run.model = tiny.make_model(tmp_path / "tiny-gpt2", "gpt2")
    said = run("--drafter", "oracle:0.8")
    assert said.code == 2
    assert "architecture 'gpt2' is not supported" in said.err
    assert "layer by layer its logits are off by" in said.err
    assert run.files() == []


def test_a_model_without_a_chat_template_gets_a_note_and_a_flag(run: Runs, tmp_path: Path) -> None:
    run.model = shutil.copytree(run.model, tmp_path / "bare")
    (run.model / "chat_template.jinja").unlink()
    said = run("-b", "vanilla", "--limit", "1", "--max-new-tokens", "4")
    assert said.code == 0, said.err
    assert f"NOTE: {run.model.name} has no chat template: conversations are fed to it as plain text." in said.err
    assert "no_template" in [flag.name for flag in run.result("vanilla").flags]


def test_a_template_that_ends_turns_with_a_token_that_ends_no_answer_gets_a_note(run: Runs, tmp_path: Path) -> None:
    run.model = shutil.copytree(run.model, tmp_path / "renamed")
    settings = run.model / "tokenizer_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"eos_token": "a", "additional_special_tokens": ["</s>"]})
    )
    said = run("-b", "vanilla", "--limit", "1", "--max-new-tokens", "4")
    assert said.code == 0, said.err
    assert "NOTE: the chat template ends turns with '</s>' (id 256), at which answers do not end" in said.err


def test_template_arguments_are_part_of_the_work_and_of_the_title(run: Runs, tmp_path: Path) -> None:
    run.model = shutil.copytree(run.model, tmp_path / "thinker")
    template = run.model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if thinking is not defined or thinking %}<think>{% endif %}")
    words = ("-b", "vanilla", "--limit", "1", "--max-new-tokens", "4")
    assert run(*words).code == 0
    said = run(*words, "--template-arg", "thinking=false", "--name", "silent")
    assert said.code == 0, said.err
    assert "thinker thinking=false" in said.out
    plain, silent = sorted(run.results.iterdir(), key=lambda path: len(path.name))
    assert read_result(silent).model.template_args == {"thinking": False}
    assert len(read_result(plain).runs[0].output_ids) == 4
    said = spdbench("compare", plain, silent)
    assert said.out.count("mini v1") == 2 * 2, "above its conclusions and above its table"
    said = spdbench("compare", plain, "--baseline", silent)
    assert said.code == 4
    assert "--template-arg (thinking=False, not none)" in said.err
    said = run(*words, "--template-arg", "thinkin=false")
    assert said.code == 2
    assert "did you mean 'thinking'?" in said.err
    said = run(*words, "--name", "silent", "--resume", "--template-arg", "thinking=true")
    assert said.code == 2
    assert "other settings" in said.err


def test_a_result_of_other_settings_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    suite, results = write_suite(tmp_path, 1), tmp_path / "results"
    common = (suite, "-m", tiny_model, "--threads", "1", "--max-new-tokens", "4", "--results", results, "-b", "vanilla")
    assert spdbench("run", *common, "--dtype", "float32").code == 0
    former = (results / "mini__vanilla__tiny-llama.json").read_bytes()
    again = spdbench("run", *common, "--dtype", "float32")
    assert "is kept as" not in again.err
    said = spdbench("run", *common, "--dtype", "bfloat16")
    assert "of other settings (dtype (bfloat16, not float32))" in " ".join(said.err.split())
    kept = results / "mini__vanilla__tiny-llama.json.old"
    assert kept.stat().st_size == pytest.approx(len(former), rel=0.2)
    assert '"dtype": "float32"' in kept.read_text()
