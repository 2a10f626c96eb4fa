"""`spdbench project` and `spdbench profile` from the outside: table, JSON, chart, profiles, refusals before work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spdbench.cli.project import profile as profile_command
from spdbench.cli.project import project as project_command
from spdbench.errors import InputError
from spdbench.judge.loaded import load
from spdbench.judge.projection.costs import ProfileCosts
from spdbench.judge.projection.opponents import BreakEven
from spdbench.judge.projection.recorded import sort_results
from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.checkpoints.weights import Checkpoint
from spdbench.models.partition import split_evenly
from spdbench.models.target import Target
from spdbench.profiles.datasheet import BANDWIDTH_SHARE, DEVICES, LAUNCH_S
from spdbench.profiles.profile import Profile, parse_key, read_profile
from spdbench.render.projection import _breakeven
from spdbench_backends.drafter_files.folder import store_again, write_folder
from spdbench_backends.eagle.build import random_eagle
from spdbench_backends.eagle.formats import write_eagle
from spdbench_backends.medusa.drafter import random_medusa
from spdbench_backends.medusa.formats import write_medusa
from spdbench_backends.spd.exit_formats import random_exit
from spdbench_backends.spd.formats import random_head
from tests import tiny
from tests.builders import write_result
from tests.unit.judge.projection.projected import (
    eagle_result,
    make_profile,
    medusa_result,
    pipeline_result,
    vanilla_result,
)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Results of vanilla, a pipeline of three stages, EAGLE, and Medusa."""
    folder = tmp_path / "results"
    folder.mkdir()
    for result in (vanilla_result(), pipeline_result(), eagle_result(), medusa_result()):
        write_result(result, folder / f"{result.backend.label}.json")
    return folder


def invoke(*args: object, command: Any = project_command.command) -> Result:
    """Runs the command; an error comes out as an exception, as the main entry would see it."""
    done = CliRunner().invoke(command, list(map(str, args)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def refusal(*args: object, command: Any = project_command.command) -> str:
    with pytest.raises(InputError) as caught:
        invoke(*args, command=command)
    return str(caught.value)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(make_profile().to_json())
    return path


# project


def test_it_prints_a_verdict_and_every_way_to_decode(files: Path) -> None:
    text = invoke(files, "--stages", "2,3,10").stdout
    assert text.startswith("Fastest pipeline: spd x")
    for label in ("spd x2", "spd x3", "spd x10", "vanilla", "eagle", "medusa"):
        assert f"\n{label} " in text
    assert "tensor parallel x" not in text  # no result knows what a message takes
    assert "spdbench profile -m smollm2 --dtype float32 -o profile.json" in " ".join(text.split())


@pytest.mark.parametrize(("charset", "mark"), [("utf-8", "█"), ("ascii", "#")])
def test_bars_show_speedups_by_devices_within_80_columns(
    files: Path, profile: Path, monkeypatch: pytest.MonkeyPatch, charset: str, mark: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--stages", "2,3,15/10/5", "--profile", str(profile)]
    done = CliRunner(charset=charset).invoke(project_command.command, [str(files), *words], catch_exceptions=False)
    chart = done.stdout.partition("\nspeed-up by devices\n")[2].partition("\n\n")[0].splitlines()
    rows = [re.fullmatch(rf"(.+?) +(\d+) ({mark}+) +(\d+\.\d\d)", line) for line in chart]
    assert all(rows), chart
    found = [(row[1], int(row[2]), len(row[3]), float(row[4])) for row in rows if row]
    assert {label for label, *_ in found} >= {"vanilla", "medusa", "spd x2", "spd x3 (15/10/5)", "tensor parallel x3"}
    assert [devices for _, devices, _, _ in found] == sorted(devices for _, devices, _, _ in found)
    assert max(map(len, chart)) <= 80
    longest, best = max(width for _, _, width, _ in found), max(speedup for *_, speedup in found)
    assert longest > 40
    for _, _, width, speedup in found:
        assert width == pytest.approx(longest * speedup / best, abs=1)


def test_json_holds_everything(files: Path, profile: Path) -> None:
    words = ("--stages", "3,15/15", "--profile", profile, "--concurrency", "4", "--json")
    found = json.loads(invoke(files, *words).stdout)
    assert found["schema"] == "spdbench.projection/1"
    assert [row["stage_layers"] for row in found["pipelines"]] == [[10, 10, 10], [15, 15]]
    for row in found["pipelines"]:
        assert sum(row["lane_shares"].values()) == pytest.approx(1)
        assert row["speedup_per_device"] == pytest.approx(row["speedup"] / row["devices"])
        assert row["device_s_per_token"] == pytest.approx(row["devices"] / row["tokens_per_s"])
    assert {row["label"] for row in found["opponents"]} >= {"vanilla", "eagle", "tensor parallel x3"}
    assert {row["requests"] for row in found["loads"]} == {1, 2, 4}
    assert found["best"] in {row["label"] for row in found["pipelines"]}


def test_loads_are_shown_with_what_nothing_beats_and_where_speculation_stops_paying(files: Path, profile: Path) -> None:
    text = invoke(files, "--stages", "3", "--profile", profile, "--concurrency", "8").stdout
    assert "several requests at once" in text
    assert "eagle *" in text
    assert "- eagle: always faster than vanilla (1 to 8 requests at once)" in " ".join(text.split())


def test_where_speculation_pays_is_said_whole() -> None:
    said = {
        (True, True, True): "always faster than b (1 to 4 requests at once)",
        (False, False, False): "never faster than b (1 to 4 requests at once)",
        (True, True, False): "faster than b up to 2 requests at once (of 1 to 4 requests at once)",
        (True, False, True): "faster than b at 1 and 4 requests at once, not at 2",
        (False, True, True): "faster than b at 2 and 4 requests at once, not at 1",
    }
    for faster, words in said.items():
        assert _breakeven(BreakEven("a", "b", (1, 2, 4), faster)) == f"a: {words}"


def test_balanced_stages_leave_room_for_the_head(files: Path) -> None:
    found = json.loads(invoke(files, "--stages", "3", "--balanced", "--json").stdout)
    assert found["pipelines"][0]["stage_layers"] == [11, 11, 8]


def test_a_shared_drafter_saves_a_device(files: Path) -> None:
    found = [json.loads(invoke(files, "--stages", "3", "--json", *more).stdout) for more in ((), ("--shared-drafter",))]
    assert [each["pipelines"][0]["devices"] for each in found] == [4, 3]
    own, shared = (each["pipelines"][0]["tokens_per_s"] for each in found)
    assert shared < own


def test_a_chart_is_drawn_by_the_name_of_its_file(files: Path, profile: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    chart = tmp_path / "chart.svg"
    words = (files, "--stages", "2,3", "--profile", profile, "--concurrency", "4", "--chart", chart)
    assert f"Wrote {chart}" in invoke(*words).stderr
    svg = chart.read_text()
    assert svg.startswith("<svg")
    for text in ("spd", "x3", "tensor parallel", "Several requests at once"):
        assert text in svg
    assert "exists already" in refusal(*words)
    chart.write_text("another")
    invoke(*words, "--force")
    assert chart.read_text().startswith("<svg")


def test_a_page_holds_the_results_and_the_command_that_makes_it(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    page = tmp_path / "projection.html"
    words = (files, "--stages", "2,3", "--head", "split", "--report", page)
    assert f"Wrote {page}" in invoke(*words).stderr
    assert f"spdbench project {files} --stages 2,3 --head split --chart projection.svg" in page.read_text()
    assert "exists already" in refusal(*words)
    again = json.loads(invoke(page, "--stages", "2,3", "--head", "split", "--json").stdout)
    assert [row["label"] for row in again["pipelines"]] == ["spd x2", "spd x3"]


def test_the_head_next_to_the_drafter_shortens_the_last_stage(files: Path) -> None:
    found = [
        json.loads(invoke(files, "--stages", "3", "--json", "--head", place).stdout)["pipelines"][0]
        for place in ("last_stage", "split", "drafter")
    ]
    assert found[0]["slowest_stage_s"] > found[1]["slowest_stage_s"] > found[2]["slowest_stage_s"]


@pytest.mark.parametrize("more", [("--balanced",), ("--chart", "chart.svg"), ("--report", "page.html")])
def test_it_starts_without_torch(files: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    if more[-1] != "--balanced":
        pytest.importorskip("vl_convert")
    code = (
        "import sys; from spdbench.cli.main import run; "
        "assert run(sys.argv[1:]) == 0; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    words = [sys.executable, "-c", code, "project", str(files), "--stages", "2,3", *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "speed-up by devices" in done.stdout


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--stages", "31"), "Allowed: 1 to 30"),
        (("--stages", "two"), "no number of stages"),
        (("--stages", "2", "--concurrency", "4"), "spdbench profile"),
        (("--stages", "2", "--profile", "missing.json"), "missing.json: cannot be read"),
        (("--stages", "2", "--chart", "chart.gif"), "Allowed: .svg, .png, .pdf"),
        (("--stages", "2", "--chart", "nowhere/chart.svg"), "does not exist"),
        (("--stages", "2", "--report", "nowhere/page.html"), "does not exist"),
    ],
)
def test_bad_input_has_one_message(files: Path, words: tuple[str, ...], why: str) -> None:
    assert why in refusal(files, *words)


@pytest.mark.parametrize("lane_bytes", [[0, 60, 80], [0, 0, 0]])
def test_lanes_without_bytes_do_not_tell_the_heads_share(tmp_path: Path, lane_bytes: list[int]) -> None:
    result = pipeline_result()
    backend = result.backend.model_copy(update={"lane_bytes": lane_bytes})
    write_result(result.model_copy(update={"backend": backend}), tmp_path / "spd.json")
    write_result(vanilla_result(), tmp_path / "vanilla.json")
    assert "how much of a token's time is the output head's" in refusal(tmp_path, "--stages", "2")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_layers": 12}, "layers 12"),
        ({"dtype": "bfloat16", "hidden_size": 1152}, "dtype bfloat16"),
        ({"sha256": "x" * 64}, "weights"),
        ({"hidden_size": 64}, "model.hidden_size: a row of 64 numbers in float32 takes 256 bytes"),
    ],
)
def test_a_profile_of_another_model_is_refused(files: Path, tmp_path: Path, change: dict[str, Any], why: str) -> None:
    shape = make_profile().model
    other = make_profile().model_copy(update={"model": shape.model_copy(update=change)})
    path = tmp_path / "other.json"
    path.write_text(other.to_json())
    assert why in refusal(files, "--stages", "2", "--profile", path)


# profile


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds: no number here is looked at."""
    monkeypatch.setattr("spdbench.pipeline.profiling.ROUNDS", 1)
    monkeypatch.setattr("spdbench.pipeline.profiling.MESSAGES", 3)


@pytest.mark.usefixtures("_quick")
def test_a_measured_profile_is_kept_and_written(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    common = ("-m", tiny_model, "--dtype", "float32", "--devices", "cpu", "--threads", "1")
    text = invoke(*common, "-o", out, command=profile_command.command).stdout
    found = read_profile(out)
    assert found.origin == "measured"
    assert found.model.num_layers == 6
    for part in ("layer ", "head ", "verify", "host", "message "):
        assert any(key.startswith(part) for key in found.seconds)
        assert part.strip() in text
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert "exists already" in refusal(*common, "-o", out, command=profile_command.command)


def install_drafters(target: Target, folder: Path) -> None:
    """One untrained drafter of each method, as if it had been trained: of three stages where it has stages."""
    ends, stages = target.ends, split_evenly(target.config.num_layers, 3)
    write_eagle(random_eagle(ends, 0), folder / "eagle", "spdbench")
    write_medusa(random_medusa(ends, 3, 0), folder / "medusa", "spdbench")
    head, exit_head = random_head(ends, stages, 0), random_exit(ends, stages, 0)
    write_folder(folder / "spd", head.config.model_dump(mode="json"), head.tensors)
    write_folder(folder / "ppsd", exit_head.config.model_dump(mode="json") | {"num_stages": 3}, exit_head.tensors)
    for name, method in {"eagle": "eagle3", "medusa": "medusa", "spd": "spd", "ppsd": "ppsd"}.items():
        path = folder / name / "config.json"
        own = {"method": method, "model_sha256": target.files.sha256, "trained_tokens": 1}
        path.write_text(json.dumps(json.loads(path.read_text()) | own))


@pytest.mark.usefixtures("_quick")
def test_a_profile_holds_the_drafts_of_installed_drafters_and_a_projection_reads_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_drafters(tiny.load(tiny_model), tmp_path / "drafters")
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(tmp_path / "drafters"))
    out = tmp_path / "profile.json"
    words = ("-m", tiny_model, "--dtype", "float32", "--devices", "cpu", "--threads", "1", "-o", out)
    invoke(*words, command=profile_command.command)
    profile = read_profile(out)
    found = {key: parse_key(key)[1] for key in profile.seconds}
    drafts = [fields for fields in found.values() if "method" in fields]
    assert {each["method"] for each in drafts} == {"spd", "ppsd", "eagle3", "medusa"}
    assert {each["stages"] for each in drafts if "stages" in each} == {"3"}
    assert {each["levels"] for each in drafts if each["method"] == "medusa"} == {"3"}
    kinds = {(each["tree"], each["levels"]) for each in drafts if each["method"] == "eagle3"}
    assert len(kinds) > 1  # a first level and further ones cost differently
    recorded = sort_results([load(pipeline_result(), "spd.json"), load(eagle_result(), "eagle.json")])
    costs = ProfileCosts(profile, recorded)
    (spd,) = [profile.seconds[key] for key, fields in found.items() if fields.get("method") == "spd"]
    assert spd > 0
    assert costs.pipeline_draft_s(recorded.pipelines[0], 2) == spd
    assert costs.round_draft_s(recorded.rounds[0], 1) is not None


def test_a_datasheet_gives_a_computed_profile(tiny_model: Path) -> None:
    words = ("-m", tiny_model, "--dtype", "bfloat16", "--from", "h100-sxm")
    found = Profile.model_validate_json(invoke(*words, command=profile_command.command).stdout)
    assert (found.origin, found.device) == ("computed", "NVIDIA H100 SXM")
    slower = Profile.model_validate_json(invoke(*words[:-1], "l4", command=profile_command.command).stdout)
    assert slower.seconds["message bytes=64"] > found.seconds["message bytes=64"]
    layers = [each.layer_s(1, 128) for each in (found, slower)]
    assert layers[0] is not None
    assert layers[1] is not None
    assert layers[0] < layers[1]


def computed(folder: Path, kind: str) -> tuple[Profile, ModelConfig]:
    """The profile of a tiny model of this kind, made in `folder`, on an L4; and the model's configuration."""
    model = tiny.make_model(folder, kind)
    words = ("-m", model, "--dtype", "bfloat16", "--from", "l4")
    config = tiny.load(model).config
    assert isinstance(config, ModelConfig)
    return Profile.model_validate_json(invoke(*words, command=profile_command.command).stdout), config


def test_a_computed_recurrent_layer_has_a_state_in_place_of_keys_and_values(tmp_path: Path) -> None:
    found, config = computed(tmp_path / "model", "qwen3_5_text")
    assert config.recurrent is not None
    recurrent, speed = len(config.recurrent.layers), BANDWIDTH_SHARE * DEVICES["l4"].bandwidth
    kv = 2 * 2 * config.num_kv_heads * config.head_dim * (config.num_layers - recurrent) / config.num_layers
    state = config.recurrent.state_bytes(2) * recurrent / config.num_layers
    layer_s = {(rows, context): found.layer_s(rows, context) or 0.0 for rows in (1, 8) for context in (128, 4096)}
    assert layer_s[1, 4096] - layer_s[1, 128] == pytest.approx((4096 - 128) * kv / speed)
    assert layer_s[8, 128] - layer_s[1, 128] == pytest.approx(2 * (8 - 1) * state / speed)


def test_a_computed_mixture_reads_the_experts_that_a_token_passes(tmp_path: Path) -> None:
    found, config = computed(tmp_path / "model", "qwen3_moe")
    experts = config.experts
    assert experts is not None
    with closing(Checkpoint(tmp_path / "model")) as checkpoint:
        shapes = [shape for name, shape in checkpoint.shapes().items() if ".experts." in name]
    routed = 2 * sum(map(prod, shapes)) / config.num_layers
    more_s = (found.layer_s(256, 128) or 0.0) - (found.layer_s(1, 128) or 0.0)
    unread = 1 - experts.per_token / experts.count
    assert more_s == pytest.approx(routed * unread / (BANDWIDTH_SHARE * DEVICES["l4"].bandwidth), rel=1e-3)


def test_a_computed_draft_reads_the_borrowed_head_and_matrices_as_they_are_computed_with(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, folder = tiny.load(tiny_model), tmp_path / "drafters"
    install_drafters(target, folder)
    monkeypatch.setenv("SPDBENCH_DRAFTERS", str(folder))
    words = ("-m", tiny_model, "--dtype", "bfloat16", "--from", "l4")

    def drafts() -> dict[tuple[str, str], float]:
        """By method and levels."""
        found = Profile.model_validate_json(invoke(*words, command=profile_command.command).stdout)
        by_key = {key: parse_key(key) for key in found.seconds}
        assert not any(fields.get("drafter") == "assumed" for _, fields in by_key.values())
        return {
            (fields["method"], fields.get("levels", "")): found.seconds[key]
            for key, (name, fields) in by_key.items()
            if name == "draft"
        }

    plain = drafts()
    for name in ("eagle", "medusa", "spd", "ppsd"):
        before = (folder / name / "model.safetensors").stat().st_size
        store_again(folder / name, "int8")
        assert (folder / name / "model.safetensors").stat().st_size < before
    assert drafts() == pytest.approx(plain)
    head = 2 * target.config.vocab_size * target.config.hidden_size
    assert plain["ppsd", ""] > head / (BANDWIDTH_SHARE * DEVICES["l4"].bandwidth) + LAUNCH_S


def test_an_unknown_datasheet_names_those_that_are_known(tiny_model: Path) -> None:
    done = CliRunner().invoke(profile_command.command, ["-m", str(tiny_model), "--from", "h100"])
    assert done.exit_code == 2
    assert "h100-sxm" in done.stderr
