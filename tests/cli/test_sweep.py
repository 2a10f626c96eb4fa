"""`spdbench sweep`: a file becomes points, each an ordinary run that is done once, wherever it runs."""

from __future__ import annotations

import fcntl
import json
import shlex
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from spdbench.backend import find_backend
from spdbench.cli.run.settings import run_table
from spdbench.cli.sweep.best import lower_is_better, require_metric
from spdbench.cli.sweep.points import Point, read_sweep
from spdbench.cli.sweep.progress import Outcome, SweepLog, open_log
from spdbench.errors import InputError
from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import load
from spdbench.judge.metrics.dialects import DIALECTS
from spdbench.judge.results.schema import read_result
from tests.cli.run_helpers import spdbench, write_suite
from tests.cli.sweeps import EXAMPLE, results, run, runs_of, started, write
from tests.unit.judge.projection.projected import pipeline_result, vanilla_result


def test_example_is_twelve_points_of_the_grid() -> None:
    _, found = read_sweep(EXAMPLE)
    assert len(found) == 12
    assert {tuple(point.settings.values()) for point in found} == {
        (stages, f"oracle:{rate}") for stages in (2, 3, 5, 6) for rate in (0.6, 0.8, 0.95)
    }


def test_dry_run_prints_commands_that_run_would_take(sweep: dict[str, Any], tmp_path: Path) -> None:
    said = run(tmp_path, sweep, "--dry-run")
    lines = said.out.splitlines()
    assert (said.code, len(lines), said.err) == (0, 4, "")
    assert not (tmp_path / "out").exists()
    assert "-o spd.executor=inline -o spd.stages=2" in lines[0]
    assert "--drafter oracle:0.9" in lines[1]
    assert all(line.startswith("spdbench run ") and line.endswith("--resume") for line in lines)
    assert len({line.partition("--name ")[2] for line in lines}) == 4


def test_points_run_once(sweep: dict[str, Any], tmp_path: Path) -> None:
    sweep["grid"]["options.spd.stages"] = [2]
    said = run(tmp_path, sweep)
    assert said.code == 0, said.err
    assert len(results(tmp_path)) == 4
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}

    again = run(tmp_path, sweep, "--best", "energy_j_per_token")
    assert again.code == 2
    assert "no finished point has this metric" in again.err
    assert "2 points, of which 2 are done" in again.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")} == times

    victim = next((tmp_path / "out").glob("mini__spd__*oracle-0.9*.json"))
    content = json.loads(victim.read_text(encoding="utf-8"))
    victim.write_text(json.dumps({**content, "run_key": "another"}), encoding="utf-8")
    changed = run(tmp_path, sweep)
    assert "2 points, of which 1 are done" in changed.err
    assert changed.code == 1  # the run itself refuses a result of another run


def test_labels_are_those_of_a_file_of_defaults_where_the_sweep_names_none(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spdbench.toml").write_text('[run]\nbackend = ["vanilla", "deep=spd"]\n')
    monkeypatch.chdir(tmp_path)
    assert {point.labels for point in read_sweep(write(tmp_path, sweep))[1]} == {("vanilla", "spd")}
    del sweep["fixed"]["backends"], sweep["fixed"]["options"], sweep["grid"]["options.spd.stages"]
    assert {point.labels for point in read_sweep(write(tmp_path, sweep))[1]} == {("vanilla", "deep")}


def test_what_a_file_of_defaults_adds_is_part_of_the_points(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a change of it makes new points, and a machine without the file runs the same."""
    monkeypatch.chdir(tmp_path)
    sweep["grid"] = {"drafters": ["oracle:0.5"], "seed": [None, 3]}
    file = write(tmp_path, sweep)
    alone = read_sweep(file)[1]
    lines = ["[run]", 'o = ["spd.stages=3", "eagle.tree=chain"]', "seed = 7", "limit = 1", 'drafter = ["eagle=random"]']
    (tmp_path / "spdbench.toml").write_text("\n".join(lines))
    first, second = read_sweep(file)[1]
    words = " ".join(first.words)
    assert "--seed 7 " in words
    assert "--limit 1" in words
    assert "-o spd.stages=3 -o spd.executor=inline" in words
    assert "eagle" not in words  # it is of other runs
    assert "--seed 3 " in " ".join(second.words)
    assert not {first.name, second.name} & {point.name for point in alone}
    (tmp_path / "spdbench.toml").write_text("\n".join(lines).replace("limit = 1", "limit = 2"))
    assert first.name not in {point.name for point in read_sweep(file)[1]}

    (tmp_path / "spdbench.toml").write_text("[run]\nmax-new-tokens = 5\n")
    said = run(tmp_path, sweep, "--best", "tokens_per_cycle")
    assert said.code == 0, said.err
    assert tomllib.loads(said.out)["run"]["max-new-tokens"] == "5"
    again = run(tmp_path, sweep)
    assert "2 points, of which 2 are done" in again.err
    (tmp_path / "spdbench.toml").unlink()
    assert "2 points, of which 0 are done" in run(tmp_path, sweep).err


def test_an_option_that_is_null_is_the_default(sweep: dict[str, Any], tmp_path: Path) -> None:
    sweep["grid"]["options.spd.stages"] = [None]
    assert all("stages" not in " ".join(point.words) for point in read_sweep(write(tmp_path, sweep))[1])


def test_many_points_look_for_each_backend_once(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_for = list[str]()

    def find(name: str) -> Any:
        looked_for.append(name)
        return find_backend(name)

    monkeypatch.setattr("spdbench.cli.sweep.points.find_backend", find)
    assert len(read_sweep(write(tmp_path, {**sweep, "grid": {"seed": list(range(50))}}))[1]) == 50
    assert looked_for == ["vanilla", "spd"]


def test_best_prints_options_with_which_run_does_the_same(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep["grid"]["options.spd.stages"] = [2]
    sweep["fixed"]["trace"] = True
    said = run(tmp_path, sweep, "--best", "tokens_per_cycle")
    assert said.code == 0, said.err
    table = tomllib.loads(said.out)["run"]
    assert (table["o"], table["drafter"]) == (["spd.executor=inline", "spd.stages=2"], ["oracle:0.9"])
    assert "# disqualified, as all are: synthetic_drafter\n" in said.out
    assert "# warnings: " in said.out
    assert "few_prompts" in said.out.partition("# warnings: ")[2].partition("\n")[0]
    (line,) = [line for line in said.out.splitlines() if "sets the options of: " in line]
    program, *words = shlex.split(line.partition("sets the options of: ")[2])
    assert program == "spdbench"

    (tmp_path / "spdbench.toml").write_text(said.out, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    alone = spdbench(*words, "--results", tmp_path / "alone")
    assert alone.code == 0, alone.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "points.jsonl").read_text(encoding="utf-8").splitlines()]
    (best,) = [line["run_keys"] for line in lines if "oracle-0.9" in line["name"]]
    assert sorted(read_result(path).run_key for path in (tmp_path / "alone").glob("*.json")) == sorted(best)


def test_best_of_what_a_file_cannot_set_has_it_in_the_command() -> None:
    settings = {"suite": "my suite", "allow_code_execution": True, "options": {"a.base_url": "http://h:1"}, "limit": 3}
    table, words = run_table("here", settings)
    assert tomllib.loads(table) == {"run": {"limit": "3"}}
    assert words == ["my suite", "--allow-code-execution", "-o", "a.base_url=http://h:1"]


@pytest.mark.parametrize("metric", ["speedupp", "speedup_ci"])
def test_unknown_metric_is_refused_before_any_work(sweep: dict[str, Any], tmp_path: Path, metric: str) -> None:
    said = run(tmp_path, sweep, "--best", metric)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"Error: --best {metric}: unknown metric; did you mean 'speedup'?")
    assert not (tmp_path / "out").exists()


def test_every_metric_of_a_comparison_that_is_a_number_can_be_the_best_one() -> None:
    results = [load(vanilla_result(), "vanilla.json"), load(pipeline_result(), "spd.json")]
    (table,) = compare(results, dialects=tuple(DIALECTS))
    for row in table.rows:
        for name, value in row.metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith("num_"):
                require_metric(name)
            elif isinstance(value, list | dict):
                with pytest.raises(InputError):
                    require_metric(name)


def test_one_point_fails_and_the_others_go_on(sweep: dict[str, Any], tmp_path: Path) -> None:
    sweep["grid"] = {"options.spd.stages": [4, 3], "drafters": ["oracle:0.5"]}  # six layers
    said = run(tmp_path, sweep)
    assert said.code == 1
    assert "1 of 2 points are in" in said.err
    failed = said.err.partition("Failed points")[2]
    assert "stages-4-drafters-oracle-0.5" in failed
    assert "exit code 2" in failed
    assert "stages-3" not in failed
    assert len(results(tmp_path)) == 2


def test_what_failed_points_lack_keeps_no_other_output_from_being_written(
    sweep: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("vl_convert")
    sweep["grid"] = {"options.spd.stages": [4]}  # six layers
    page = tmp_path / "page.html"
    said = run(tmp_path, sweep, "--chart", "pareto", tmp_path / "p.svg", "--report", page, "--best", "speedup")
    assert (said.code, said.out) == (1, "")
    assert page.exists()
    assert said.err.endswith(
        "Error: --chart pareto: No point has both times.\nError: --best speedup: no finished point has this metric\n"
    )


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_sweep_that_is_killed_leaves_no_run_behind(sweep: dict[str, Any], tmp_path: Path) -> None:
    running = started("sweep", write(tmp_path, sweep), "--results", tmp_path / "out")
    while not runs_of(sweep["fixed"]["suite"]):
        assert running.poll() is None
        time.sleep(0.02)
    running.kill()
    running.communicate()
    while runs_of(sweep["fixed"]["suite"]):
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {}}, "grids: unknown key; did you mean 'grid'?"),
        ({"grid": {}}, "nothing to sweep: give a grid"),
        ({"grid": {"dtype": []}}, "grid.dtype: is empty"),
        ({"grid": {"dtypes": ["float32"]}}, "dtypes: unknown key; did you mean 'dtype'?"),
        ({"grid": {"dtype": ["float33"]}}, "'float33' is not one of"),
        ({"grid": {"limit": ["many"]}}, "Invalid value for '--limit'"),
        ({"grid": {"options.spd.stagse": [2]}}, "spd.stagse: unknown option; did you mean 'stages'?"),
        ({"grid": {"options.sdp.stages": [2]}}, "no backend here has the label 'sdp'"),
        ({"grid": {"suite": ["quikc"]}}, "unknown suite 'quikc'; did you mean 'quick'?"),
        ({"grid": {"backends": [["vanila"]]}}, "unknown backend 'vanila'"),
        ({"grid": {"trace": ["yes please"]}}, "trace: 'yes please' has to be true or false"),
        ({"grid": {"concurrency": [[1, 2]]}}, "concurrency: 1,2: a point has one number of requests at once"),
        ({"grid": {"concurrency": [1, 4]}}, "grid: --concurrency 1: vanilla, spd take one request at a time"),
        ({"grid": {"results": ["here"]}}, "results: unknown key"),
        ({"grid": {"suite": [None]}}, "grid: suite: is missing"),
        ({"fixed": {"suite": "quick", "limits": 3}}, "fixed: limits: unknown key; did you mean 'limit'?"),
        ({"points": [{"options": 3}]}, "points.0: options: has to be a mapping"),
        ({"grid": {"seed": [1, 1]}}, "a point is there twice: {'seed': 1}"),
        ({"name": "a/b"}, "name: 'a/b' has to be"),
        ({"name": ".."}, "name: '..' has to be"),
        ({"grid": {"drafters": ["oracle:2"]}}, "grid: drafters: --drafter oracle:2: "),
        (
            {"grid": {"drafters": ["oracel:0.5"]}},
            "--drafter oracel:0.5: no such file or folder; did you mean 'oracle:P'?",
        ),
        ({"grid": {"drafters": [["spd=no/head"]]}}, "grid: drafters: --drafter no/head: no such file or folder"),
        ({"grid": {"seed": list(range(200)), "limit": list(range(1, 100))}}, "19,800 points; 10,000 are possible"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistake_is_one_message_before_any_work(
    sweep: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if "options.sdp.stages" in str(change) or "backends" in str(change):
        sweep["fixed"]["options"] = {}
    said = run(tmp_path, {**sweep, **change})
    assert said.code == 2
    assert message in said.err
    assert said.err.startswith(f"Error: {tmp_path / 'sweep.yaml'}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"model": "./absent"}, "-m ./absent: no such folder or file"),
        ({"model": "absent"}, "-m absent: no such folder or file"),
        ({"model": "{folder}"}, "{folder}: not a model folder, it has no config.json"),
        ({"model": "{folder}/mini.yaml"}, "mini.yaml: is a file but not a .gguf"),
        ({"model": None, "suite": "{folder}/own.yaml"}, "-m ./absent: no such folder or file"),
        ({"devices": "cpu,cuda:999"}, "--devices cuda:999: this machine has "),
        ({"devices": "gpu"}, "--devices gpu: not a device. Allowed: cpu, cuda:0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_models_and_devices_that_are_not_here_are_refused_before_any_work(
    sweep: dict[str, Any], tmp_path: Path, fixed: dict[str, str | None], message: str
) -> None:
    write_suite(tmp_path, name="own", model="./absent")
    sweep["fixed"] |= {key: value and value.format(folder=tmp_path) for key, value in fixed.items()}
    for words in (("--dry-run",), ()):
        said = run(tmp_path, sweep, *words)
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        assert said.err.startswith(f"Error: {tmp_path / 'sweep.yaml'}: stages-2-drafters-oracle-0.5_")
        assert message.format(folder=tmp_path) in said.err
        assert not results(tmp_path)
    there = run(tmp_path, sweep, "--dry-run", "--on", "slurm")  # models and devices are those of its nodes
    assert (there.code, len(there.out.splitlines()), there.err) == (0, 4, "")


def test_a_name_that_may_be_on_the_hub_is_noted(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--one--there").mkdir(parents=True)
    sweep["grid"] = {"model": ["no/such", "one/there"], "seed": [1, 2]}
    said = run(tmp_path, sweep, "--dry-run")
    assert (said.code, len(said.out.splitlines())) == (0, 4)
    assert said.err.startswith("NOTE: no folder no/such is here, so it is taken for a model of the hub")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "name: x\nname: y"])
def test_file_that_is_no_sweep(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
    said = spdbench("sweep", tmp_path / "sweep.yaml")
    assert said.code == 2
    assert str(tmp_path / "sweep.yaml") in said.err
    assert spdbench("sweep", tmp_path / "absent.yaml").code == 2


def test_lines_that_cannot_be_read_are_as_if_not_there(tmp_path: Path) -> None:
    lines = ["[" * 100_000, '{"name": "a", "name": "b"}', "[]", '{"name": []}', '{"name": "c", "exit_code": 1}']
    with (tmp_path / "points.jsonl").open("w+") as file:
        file.write("\n".join(lines))
        assert set(SweepLog(tmp_path, file)._last) == {"c"}


def test_second_sweep_in_one_folder_is_refused(sweep: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "points.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = run(tmp_path, sweep)
    assert said.code == 2
    assert "another sweep works in this folder" in said.err


def test_charts_and_page_of_a_sweep(sweep: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    page, chart = tmp_path / "sweep.html", tmp_path / "map.svg"
    said = run(tmp_path, sweep, "--report", page, "--chart", "heat-map", chart)
    assert said.code == 0, said.err
    assert chart.read_text().startswith("<svg")
    text = page.read_text()
    assert f"spdbench sweep {tmp_path / 'sweep.yaml'} --results {tmp_path / 'out'} --chart pareto pareto.svg" in text
    assert text.count('<th scope="row">spd</th>') == 4
    for words in (("--report", page), ("--chart", "pareto", tmp_path / "map.gif"), ("--chart", "map", chart)):
        said = run(tmp_path, sweep, *words)
        assert (said.code, said.out) == (2, "")
    assert run(tmp_path, sweep, "--report", page, "--force").code == 0


def test_which_metrics_are_better_when_lower() -> None:
    lower = ["ttft_s", "tpot_s", "energy_j_per_token", "device_s_per_token", "bubble_ratio", "imbalance"]
    lower += ["itl_p99_s_macro", "control_s_per_cycle", "peak_memory_bytes", "num_failed", "break_even_length"]
    higher = ["speedup", "tokens_per_s", "decode_tokens_per_s", "acceptance_rate", "tokens_per_cycle", "score"]
    higher += ["tokens_per_s_macro", "useful", "draft_slack_s", "cycle_efficiency"]
    assert [lower_is_better(name) for name in lower + higher] == [True] * len(lower) + [False] * len(higher)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_engine_that_is_not_installed(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = run(tmp_path, sweep, "--on", engine)
    assert said.code == 2
    assert f"--on {engine}: needs {package}: " in said.err
    assert f"pip install '{package}>=" in said.err


def test_addresses_of_servers_get_into_no_file(sweep: dict[str, Any], tmp_path: Path) -> None:
    def named(*urls: str) -> list[Point]:
        fixed = {
            **sweep["fixed"],
            "backends": ["plain=openai"],
            "options": {"plain.base_url": "http://10.1.2.3:8000/v1"},
        }
        grid = {"options.plain.base_url": list(urls)} if urls else {"options.plain.retries": [0, 1]}
        return read_sweep(write(tmp_path, {"name": "served", "fixed": fixed, "grid": grid}))[1]

    first = named("http://10.1.2.4:8000/v1", "http://10.1.2.5:8000/v1")
    assert [dict(point.settings) for point in first] == [{"options.plain.base_url": f"server {n}"} for n in (1, 2)]
    assert all("plain.base_url=http://10.1.2" in " ".join(point.words) for point in first)
    moved = named("http://10.9.9.9:8000/v1", "http://10.9.9.8:8000/v1")
    assert [point.name for point in moved] == [point.name for point in first]
    assert len({point.name for point in (*first, *named())}) == 4
    with open_log(tmp_path / "log") as log:
        log.record(Outcome(first[0], 0))
        assert not log.is_done(first[0])  # as there is no result
        with pytest.raises(InputError, match="with servers at other addresses"):
            log.is_done(moved[0])
    with open_log(tmp_path / "log") as log, pytest.raises(InputError, match="with servers at other addresses"):
        log.is_done(moved[0])
    text = (tmp_path / "log" / "points.jsonl").read_text()
    assert "10.1.2" not in text + "".join(point.name for point in first)
    assert "base_url=***" in text


def test_a_mapping_of_options_is_an_axis_for_each(sweep: dict[str, Any], tmp_path: Path) -> None:
    del sweep["grid"]
    sweep["points"] = [{"options": {"spd.stages": stages}, "drafters": "oracle:0.5"} for stages in (2, 3)]
    nested = read_sweep(write(tmp_path, sweep))[1]
    sweep["points"] = [{"options.spd.stages": stages, "drafters": "oracle:0.5"} for stages in (2, 3)]
    flat = read_sweep(write(tmp_path, sweep))[1]
    assert [dict(point.settings) for point in nested] == [dict(point.settings) for point in flat]
