"""What the benchmarks' times are worked into: turns, spreads, ratios, goals, and the shape of their JSON."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claim, distill, generate, hybrid, instructions, llamacpp, memory, scaling
from benchmarks.shared import sides
from benchmarks.shared.sides import Goal, Report, mean_by_round, milliseconds, ratio, spread, take_turns, times
from benchmarks.shared.workload import Decoded, common_prefix
from spdbench.cli.distill.command import command as distill_command


def test_sides_warm_up_and_then_alternate() -> None:
    calls: list[str] = []

    def side(name: str) -> int:
        calls.append(name)
        return len(calls)

    results = take_turns({name: partial(side, name) for name in "abc"}, rounds=2)
    assert calls == list("abcabcabc")
    assert results == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}


def test_spread_of_rounds() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.min, found.q1, found.median, found.q3, found.max) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert found.rounds == (5.0, 1.0, 2.0, 4.0, 3.0)


def test_spread_of_one_round_is_that_round() -> None:
    assert set(spread([7.0]).rounds) == {7.0}
    assert milliseconds(spread([0.0195])) == "19.5 (19.5 to 19.5)"


def test_ratio_is_taken_round_by_round_so_that_a_drift_of_both_cancels() -> None:
    theirs, ours = [2.0, 20.0, 200.0], [1.0, 10.0, 100.0]
    assert ratio(theirs, ours).rounds == (2.0, 2.0, 2.0)
    assert times(ratio([1.0, 2.0, 6.0], [1.0, 1.0, 2.0])) == "2.00x (1.50 to 2.50)"


def test_ratio_of_unequal_numbers_of_rounds_is_refused() -> None:
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_mean_by_round() -> None:
    assert mean_by_round([[1.0, 2.0, 3.0], [3.0, 4.0, 8.0]]) == [2.0, 3.0, 5.5]


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("speed", 3.0, at_least=3.0), True),
        (Goal("speed", 2.99, at_least=3.0), False),
        (Goal("cost", 1.25, at_most=1.25), True),
        (Goal("cost", 1.26, at_most=1.25), False),
        (Goal("both", 0.9, at_least=0.0, at_most=1.0), True),
        (Goal("both", -0.1, at_least=0.0, at_most=1.0), False),
    ],
)
def test_goals_are_met_at_their_bound(goal: Goal, met: bool) -> None:
    assert goal.met is met
    assert str(goal).endswith("met)" if met else "missed)")
    assert ("at least 0" in str(goal)) is (goal.at_least == 0.0)


def test_report_is_json_with_every_round_and_verdict() -> None:
    report = Report("mine", {"rounds": 2}, {"cores": 2}, {"before": 1, "after": 2})
    report.tables["times"] = [{"side": "a", "seconds": spread([1.0, 3.0])}]
    report.goals.append(Goal("cost", 1.5, at_most=1.25))
    found = json.loads(report.as_json())
    assert found["benchmark"] == "mine"
    assert found["settings"] == {"rounds": 2}
    assert found["machine"] == {"cores": 2}
    assert found["read_bandwidth_bytes_per_s"] == {"before": 1, "after": 2}
    seconds = {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "max": 3.0, "rounds": [1.0, 3.0]}
    assert found["tables"] == {"times": [{"side": "a", "seconds": seconds}]}
    assert found["goals"] == [{"what": "cost", "measured": 1.5, "at_least": None, "at_most": 1.25, "met": False}]


def test_run_measures_the_bandwidth_before_and_after_and_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {
        "cpu": "A Processor",
        "cores": 2,
        "threads": 1,
        "read_bandwidth_bytes_per_s": 10_000_000_000,
        "versions": {"torch": "2", "transformers": "5"},
    }
    monkeypatch.setattr(sides, "environment", lambda: dict(machine))
    monkeypatch.setattr(sides, "read_bandwidth_bytes_per_s", lambda: 20_000_000_000)
    out = tmp_path / "out.json"
    chosen = sides.parser(None, rounds=3, tokens=4).parse_args(["--tokens", "8", "--threads", "1", "--json", str(out)])

    def measure(chosen: argparse.Namespace, report: Report) -> None:
        report.tables["rows"] = [{"tokens": chosen.tokens}]
        report.goals.append(Goal("speed", 2.0, at_least=3.0))

    sides.run("mine", chosen, measure)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["read_bandwidth_bytes_per_s"] == {"before": 10_000_000_000, "after": 20_000_000_000}
    assert found["machine"]["cpu"] == "A Processor"
    assert found["tables"] == {"rows": [{"tokens": 8}]}
    settings = {"rounds": 3, "tokens": 8, "threads": 1, "dtypes": ["bfloat16", "float32"]}
    assert found["settings"] == settings
    printed = capsys.readouterr().out
    assert "speed: 2.00 (target: at least 3; missed)" in printed
    assert "10.0 GB/s before, 20.0 after" in printed


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--tokens", "-1"], ["--json", "no/such/folder/out.json"]])
def test_options_that_could_only_fail_later_are_refused_at_once(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sides.parser(None, rounds=1, tokens=1).parse_args(arguments)


def test_ids_in_common() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 3)) == 3
    assert common_prefix((1, 2, 3), (1, 9, 3)) == 1
    assert common_prefix((1, 2), (1, 2, 3)) == 2
    assert common_prefix((), (1,)) == 0


def test_llamacpp_rows_leave_the_first_token_out_of_decoding() -> None:
    def turns(seconds: float, first: float, ids: tuple[int, ...]) -> list[Decoded]:
        return [Decoded(seconds, ids, first), Decoded(2 * seconds, ids, 2 * first)]

    rows = llamacpp.as_rows(
        {
            ("a", "bfloat16"): turns(7.0, 3.0, (1, 2, 3, 4, 5)),
            ("a", llamacpp.THEIRS): turns(10.0, 2.0, (1, 2, 9, 4, 5)),
            ("b", "bfloat16"): turns(9.0, 1.0, (1, 2, 3, 4, 5)),
            ("b", llamacpp.THEIRS): turns(20.0, 4.0, (1, 2, 3, 4, 5)),
        },
        {"bfloat16": 270, llamacpp.THEIRS: 90},
        tokens=5,
    )
    by_key: dict[tuple[str, str], dict[str, Any]] = {(row["prompt"], row["side"]): row for row in rows}
    ours = by_key["a", "vanilla, bfloat16"]
    assert ours["call"].rounds == pytest.approx((1.4, 2.8))
    assert ours["decode"].rounds == pytest.approx((1.0, 2.0))
    assert ours["call_ratio"].median == pytest.approx(0.7)
    assert ours["decode_ratio"].median == pytest.approx(0.5)
    assert ours["same_ids"] == 2
    assert by_key["b", "vanilla, bfloat16"]["same_ids"] == 5
    assert by_key["b", llamacpp.THEIRS]["bytes_per_token"] == 90
    every = by_key[llamacpp.ALL, "vanilla, bfloat16"]
    assert every["call"].rounds == pytest.approx((1.6, 3.2))
    assert every["call_ratio"].median == pytest.approx(16 / 30)
    assert every["same_ids"] is None


def test_llamacpp_is_skipped_in_one_line_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["llamacpp", "--python", "/no/such/python"])
    llamacpp.main()
    assert capsys.readouterr().out == "skipped: llama-cpp-python is not installed for /no/such/python; see --python\n"


def test_memory_of_the_model_is_its_own_and_the_pages_of_its_files() -> None:
    found = {
        "model_bytes": 100,
        "anonymous": {"runtime": 300, "peak": 410},
        "checkpoint": {"runtime": 0, "peak": 5},
        "resident": {"runtime": 400, "peak": 900},
    }
    assert memory.over_model(found) == pytest.approx(1.15)


def test_memory_counts_the_pages_of_a_mapped_file(tmp_path: Path) -> None:
    import mmap

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 2**20)
    assert memory.mapped_bytes(tmp_path) == 0
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as area:
        assert sum(area[::4096]) > 0
        assert memory.mapped_bytes(tmp_path) == 2**20
        assert memory.mapped_bytes(tmp_path / "other") == 0
    assert memory.status_bytes("VmHWM") >= memory.status_bytes("RssAnon") > 0


def test_scaling_rows_compare_with_the_first_setting_and_judge_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    times_by_rows = {1: 0.010, 8: 0.011, 16: 0.015}
    sides_by_rows = {count: partial(float, seconds) for count, seconds in times_by_rows.items()}
    monkeypatch.setitem(scaling.SETTINGS, "rows", lambda *_: sides_by_rows)
    report = Report("scaling", {}, {}, {})
    rows = scaling.scaling("rows", "float32", argparse.Namespace(rounds=3), report)
    assert [(row["dtype"], row["rows"], round(row["ratio"].median, 6)) for row in rows] == [
        ("float32", 1, 1.0),
        ("float32", 8, 1.1),
        ("float32", 16, 1.5),
    ]
    assert [goal.met for goal in report.goals] == [True, False]
    assert report.goals[0].what == "rows 8 over 1, float32"


def test_hybrid_measures_every_side_and_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "linear_key_head_dim": 8, "head_dim": 16}
    monkeypatch.setattr(hybrid, "SIZES", {**hybrid.SIZES, **sizes, "linear_value_head_dim": 8})
    report = Report("hybrid", {}, {}, {})
    hybrid.measure(argparse.Namespace(dtypes=["float32"], rounds=1, tokens=6, threads=1), report)
    rows = report.tables["float32"]
    assert {*hybrid.SIDES, *hybrid.COMPARED_WITH, *hybrid.COMPARED_WITH.values()} < {row["side"] for row in rows}
    assert all(row["seconds"].median > 0 for row in rows)
    assert [row["cells"][-1] for row in rows[: len(hybrid.SIDES)]] == ["6"] * len(hybrid.SIDES)
    assert "a snapshot of all layers has 0.0" in capsys.readouterr().out


def test_a_run_of_the_claim_that_was_interrupted_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    files = [tmp_path / f"quick__{label}__smollm2__t0.json" for label in ("vanilla", "eagle")]
    files[0].touch()
    assert not claim.are_whole(files)
    files[1].touch()
    assert claim.are_whole(files)
    (tmp_path / "quick__eagle__smollm2__t0.journal.jsonl").touch()
    assert not claim.are_whole(files)


def test_runs_of_the_claim_with_other_settings_are_not_mixed(tmp_path: Path) -> None:
    words = {"sampled_limit": 8, "max_new_tokens": 64, "drafters": Path("heads"), "stages": (2, 3)}
    chosen = argparse.Namespace(results=tmp_path / "runs", limit=20, **words)
    claim.hold(chosen)
    claim.hold(chosen)
    with pytest.raises(SystemExit, match="other settings"):
        claim.hold(argparse.Namespace(**{**vars(chosen), "limit": 4}))


def test_distill_divides_the_counts_of_the_summaries_by_their_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    summaries = iter([(9, 9, 9.0), (600, 300, 2.0), (1000, 600, 2.0), (810, 500, 2.0)])  # the first to warm up

    def distilled(*_: object) -> dict[str, Any]:
        return dict(zip(("generated_tokens", "tokens", "seconds"), next(summaries), strict=True))

    monkeypatch.setattr(distill, "distilled", distilled)
    report = Report("distill", {}, {}, {})
    distill.measure(argparse.Namespace(dtypes=["bfloat16"], rounds=3), report)
    (row,) = report.tables["distill"]
    assert row["generated_per_s"].rounds == (300.0, 500.0, 405.0)
    assert row["kept_per_s"].rounds == (150.0, 300.0, 250.0)
    assert [(goal.measured, goal.at_least, goal.met) for goal in report.goals] == [(405.0, 400.0, True)]


def test_distill_runs_the_command_as_it_is() -> None:
    name, *options = distill.words("float32", argparse.Namespace(tokens=70, threads=2), Path("d.jsonl"))
    with distill_command.make_context(name, options) as context:
        assert context.params["tokens"] == 70
        assert context.params["dtype"] == "float32"


@pytest.mark.parametrize("module", [distill, generate, hybrid, llamacpp, memory, scaling])
def test_every_script_opens_with_why_regimes_and_output(module: Any) -> None:
    assert {"Why", "Regimes", "Output"} <= {line.partition(":")[0] for line in (module.__doc__ or "").splitlines()}


def test_instructions_are_repeatable_different_and_of_every_category(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = instructions.conversations(2000, seed=1)
    assert rows == instructions.conversations(2000, seed=1) != instructions.conversations(2000, seed=2)
    turns = [row["turns"] for row in rows]
    assert len({first for first, *_ in turns}) == 2000
    assert {len(each) for each in turns} == {1, 2}
    assert {row["category"] for row in rows} == set(instructions.CATEGORIES)
    assert not [first for first, *_ in turns if "{" in first]
    monkeypatch.setattr(instructions, "CATEGORIES", {"one": (lambda _rng: "Always the same.", 1)})
    with pytest.raises(ValueError, match="only 1 different conversations, not 2"):
        instructions.conversations(2, seed=1)
