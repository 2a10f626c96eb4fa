"""`spdbench report` from the outside: a page, a chart, and one message for everything that is in the way."""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from spdbench.cli.main import run
from spdbench.cli.reading import compare, report
from spdbench.errors import InputError
from spdbench.judge.results.schema import served_model
from spdbench.render.report import page, vega
from tests.builders import failed_run, make_backend, make_result, make_run, write_result
from tests.unit.render.report.reports import HOSTILE, results

FIXTURES = Path(__file__).parents[1] / "fixtures" / "results"


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the megabyte of script that draws the charts; what it draws is tested in a browser."""
    monkeypatch.setattr(vega, "vl_convert", lambda: None)
    monkeypatch.setattr(vega, "script", lambda: "/* library */")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return written(tmp_path / "results")


def written(folder: Path, **more: Any) -> Path:
    folder.mkdir()
    for name, result in results(**more).items():
        write_result(result, folder / name)
    return folder


def invoke(*args: object, command: Any = report.command) -> Result:
    """Runs the command; an error comes out as an exception, as the main entry would see it."""
    return CliRunner().invoke(command, list(map(str, args)), catch_exceptions=False)


def refusal(*args: object) -> str:
    with pytest.raises(InputError) as caught:
        invoke(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_flag_stands_once_below_the_table_with_the_labels_that_it_concerns(tmp_path: Path) -> None:
    folder = written(tmp_path / "few", num_prompts=2)
    invoke(folder, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    flags = re.findall(r'<strong class="flag">(\w+)</strong>', text)
    assert len(flags) == len(set(flags))
    assert '<strong class="flag">few_prompts</strong>, vanilla, eagle, medusa, spd: only 2 prompts' in text


def test_each_chart_says_what_its_numbers_and_its_command_are(files: Path, tmp_path: Path) -> None:
    invoke(files, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("The chart's numbers: <a ") == text.count("The command that draws it as a file: <code>") > 3


def test_a_verdict_keeps_its_label_apart(files: Path, tmp_path: Path) -> None:
    """Right-to-left letters would turn the figures behind them around."""
    invoke(files, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"<bdi>eagle</bdi>: [0-9.]+x \[", text)
    assert text.count("<bdi>") == 4


def test_a_chart_with_nothing_to_show_says_that_alone(tmp_path: Path) -> None:
    runs = [failed_run(f"p{number}") for number in range(2)]
    for name, backend in (("a", make_backend()), ("b", make_backend("draft_verify"))):
        write_result(make_result(runs, backend), tmp_path / f"{name}.json")
    invoke(tmp_path, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    reason = "No label has an answer to a prompt that a baseline answered, so there are no speed-ups."
    assert text.count(reason) == 2  # below the first heading, and once for the two others
    assert f"Speed-up by category, Each prompt against the baseline: {reason}" in text
    assert "A dot is one prompt" not in text
    assert text.count("<figure") == 1


def test_page_is_written_and_named(files: Path, tmp_path: Path) -> None:
    done = invoke(files, "-o", tmp_path / "report.html")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert done.stderr == f"Wrote {tmp_path / 'report.html'}\n"
    text = (tmp_path / "report.html").read_text()
    assert text.startswith("<!doctype html>")
    assert list(tmp_path.glob("*.part")) == []


def test_page_is_read_back_by_compare_and_by_report(files: Path, tmp_path: Path) -> None:
    invoke(files, "-o", tmp_path / "report.html")
    direct = json.loads(invoke(files, "--format", "json", command=compare.command).stdout)
    through = json.loads(invoke(tmp_path / "report.html", "--format", "json", command=compare.command).stdout)
    for table in (direct, through):
        for row in table["tables"][0]["rows"]:
            row.pop("file")
    assert through == direct
    assert invoke(tmp_path / "report.html", "-o", tmp_path / "again.html").exit_code == 0
    [first, again] = [
        re.sub(r"spdbench report \S+", "", (tmp_path / f"{name}.html").read_text()) for name in ("report", "again")
    ]
    assert first == again


def test_page_asks_for_nothing_from_elsewhere(files: Path, tmp_path: Path) -> None:
    invoke(files, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"<(?:link|img|iframe|object|embed|base)\b", text) == []
    assert re.findall(r'\b(?:src|action|formaction|poster)="', text) == []
    assert {link.split(":")[0] for link in re.findall(r'href="([^"]*)', text)} == {"data"}
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)', text)
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe-eval" not in policy
    assert policy.count("sha256-") == 2


def test_the_library_is_packed_and_runs_by_the_hash_of_what_is_unpacked(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = "/* </script> <!-- */" * 1000
    monkeypatch.setattr(vega, "script", lambda: library)
    invoke(files, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    [packed] = re.findall(r'id="library">"([^<"]*)"</script>', text)
    assert zlib.decompress(base64.b64decode(packed)).decode() == library
    assert len(packed) < len(library) / 10
    assert library[:20] not in text
    assert f"sha256-{base64.b64encode(hashlib.sha256(library.encode()).digest()).decode()}" in text


def test_words_of_a_page_about_a_server_and_its_client(tmp_path: Path) -> None:
    runs = [make_run(prompt=f"p{number}") for number in range(2)]
    served = make_result(runs, make_backend(label="served"))
    environment = {"memory_bytes": 24 * 2**30, "read_bandwidth_bytes_per_s": 1.2e10, "fingerprint": "0a1b"}
    served = served.model_copy(update={"model": served_model("stub"), "environment": environment})
    write_result(served, tmp_path / "a.json")
    invoke(tmp_path, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert " | stub | dtype unknown | greedy" in text
    facts = dict(re.findall(r'<th scope="row">([^<]*)</th><td>([^<]*)</td>', text))
    assert facts["model"] == "stub (weights and dtype unknown: only its server has them)"
    assert [facts[name] for name in ("memory", "read bandwidth", "machine id")] == ["24.0 GiB", "12.0 GB/s", "0a1b"]
    assert '<span class="option">--limit</span>' in text  # in no name of an option does a line end


@pytest.mark.parametrize("where", ["text", "label", "prompt"])
def test_what_models_and_users_write_is_text(where: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "results", **{where: HOSTILE})
    invoke(folder, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    body = re.sub(r'<script type="application/json" id="spdbench-results">.*?</script>', "", text, flags=re.DOTALL)
    [packed] = re.findall(r'id="answers">"([^<"]*)"</script>', body)
    answers = zlib.decompress(base64.b64decode(packed)).decode()
    assert "window.pwned" in body + answers  # it is there to read
    assert not {"\u202e", "\x1b"} & set(answers)
    assert "<script>window.pwned" not in body
    assert "<img" not in body
    assert "\u202e" not in body
    assert "\x1b" not in body
    assert len(re.findall("<script", body)) == 4  # two of data, two of code


@pytest.mark.parametrize("form", report.FORMATS)
def test_one_chart_as_a_file(form: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def to_file(chart: Any, panels: Any, *how: str) -> bytes:
        asked.append((chart.name, len(panels), *how))
        return b"drawn"

    monkeypatch.setattr(vega, "to_file", to_file)
    out = tmp_path / "a.file"
    invoke(files, "--chart", "waterfall", "--format", form, "--style", "paper", "-o", out)
    assert asked == [("waterfall", 3, form, "paper")]
    assert out.read_bytes() == b"drawn"


@pytest.mark.parametrize("form", report.FORMATS)
def test_a_chart_has_the_format_that_its_file_ends_in(
    form: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vega, "to_file", lambda *how: how[2].encode())
    invoke(files, "--chart", "speedup", "-o", tmp_path / f"a.{form.upper()}")
    assert (tmp_path / f"a.{form.upper()}").read_bytes() == form.encode()


def test_a_format_that_the_file_does_not_end_in_is_refused(files: Path, tmp_path: Path) -> None:
    chart = ("--chart", "speedup")
    assert "ends in .png, and --format is svg" in refusal(files, *chart, "--format", "svg", "-o", tmp_path / "a.png")
    assert "allowed: svg, png, pdf" in refusal(files, *chart, "-o", tmp_path / "a.html")


def test_choices_of_the_command_are_those_of_the_renderer() -> None:
    assert tuple(vega.CHARTS) == report.CHARTS


def test_folder_without_results(tmp_path: Path) -> None:
    assert "no result files" in refusal(tmp_path, "-o", tmp_path / "report.html")
    assert invoke().exit_code == 2


def test_results_that_do_not_compare(tmp_path: Path) -> None:
    runs = [make_run(prompt=f"p{n}") for n in range(2)]
    a = write_result(make_result(runs), tmp_path / "a.json")
    for changes, why in (
        ({"dtype": "bfloat16"}, "dtype (float32, not bfloat16)"),
        ({"machine": "b"}, "the machine that measured them"),
    ):
        b = write_result(make_result(runs, **changes), tmp_path / "b.json")  # type: ignore[arg-type]
        message = refusal(a, b, "-o", tmp_path / "report.html")
        assert message.startswith(f"{a} and {b} do not compare: they differ in {why}.")
    assert not (tmp_path / "report.html").exists()


def test_results_of_several_suites_are_one_page_with_a_line_a_suite_and_the_mean(files: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for path in sorted(files.glob("*.json")):
        (more / path.name).write_text(path.read_text().replace('"name":"quick"', '"name":"other"'))
    out = tmp_path / "report.html"
    invoke(files, more, "-o", out)
    said = json.loads(invoke(files, more, "--format", "json", command=compare.command).stdout)
    [summary] = said["summaries"]
    assert [summary] == json.loads(invoke(out, "--format", "json", command=compare.command).stdout)["summaries"]
    assert summary["suites"] == ["quick", "other"]
    text = out.read_text()
    for label in summary["labels"]:
        if not label["is_baseline"]:
            assert f"{label['label']}: {label['mean']:.2f}x" in text
    assert "over 2 suites" in text
    assert all(f"<li>{suite}: spd: " in text for suite in summary["suites"])
    assert "suite (quick v1, not other v1)" in refusal(files, more, "--chart", "speedup", "-o", tmp_path / "a.svg")


def test_results_of_several_loads_are_one_page_that_says_up_to_which_it_pays(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for at_once in (1, 4):
        for name, result in results().items():
            backend = result.backend.model_copy(update={"options": {"concurrency": at_once}})
            write_result(result.model_copy(update={"backend": backend}), folder / f"{at_once}-{name}")
    out = tmp_path / "report.html"
    invoke(folder, "-o", out)
    text = out.read_text()
    assert "<li>eagle: pays at every load measured, up to 4 requests at once</li>" in text
    assert all(f"<li>eagle, at {at_once}: " in text for at_once in (1, 4))
    assert "1, 4 at once" in text
    assert "concurrency=" not in text
    [said, direct] = [invoke(source, "--format", "json", command=compare.command).stdout for source in (out, folder)]
    assert json.loads(said)["loads"] == json.loads(direct)["loads"]
    assert "--concurrency (1, not 4)" in refusal(folder, "--chart", "speedup", "-o", tmp_path / "a.svg")


def test_existing_output_stays_without_force(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    assert "--force" in refusal(files, "-o", out)
    assert out.read_text() == "mine"
    assert invoke(files, "-o", out, "--force").exit_code == 0
    assert out.read_text() != "mine"


def test_output_is_never_one_of_the_results(files: Path, tmp_path: Path) -> None:
    victim = files / "quick__spd.json"
    (tmp_path / "link.html").symlink_to(victim)
    for out in (victim, tmp_path / "link.html"):
        assert "is one of the results" in refusal(files, "-o", out, "--force")


def test_output_that_cannot_be_written(files: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(files, "-o", tmp_path / "nowhere" / "report.html")
    assert invoke(files, "-o", tmp_path).exit_code == 2


def test_full_disk_leaves_the_older_page(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    out.write_text("older")

    def full(self: Path, target: Path) -> None:  # noqa: ARG001
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left" in refusal(files, "-o", out, "--force")
    assert out.read_text() == "older"
    assert list(tmp_path.glob("*.part")) == []


def test_options_of_a_chart_need_a_chart(files: Path, tmp_path: Path) -> None:
    for option in (("--format", "svg"), ("--style", "paper")):
        done = invoke(files, "-o", tmp_path / "a.html", *option)
        assert done.exit_code == 2
        assert "--chart" in done.stderr


def test_chart_without_anything_to_show_says_why(tmp_path: Path) -> None:
    alone = write_result(make_result([make_run()]), tmp_path / "a.json")
    assert "--chart timeline: None of these" in refusal(alone, "--chart", "timeline", "-o", tmp_path / "a.svg")


def test_page_of_one_result_is_a_page(tmp_path: Path) -> None:
    alone = write_result(make_result([make_run()]), tmp_path / "a.json")
    assert invoke(alone, "-o", tmp_path / "report.html").exit_code == 0


def test_report_of_another_version(files: Path, tmp_path: Path) -> None:
    invoke(files, "-o", tmp_path / "report.html")
    newer = tmp_path / "newer.html"
    newer.write_text((tmp_path / "report.html").read_text().replace("spdbench.report/1", "spdbench.report/7"))
    assert "spdbench.report/7" in refusal(newer, "-o", tmp_path / "other.html")


def test_without_the_library_one_sentence_says_how_to_get_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "vl_convert":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run(["report", str(files), "-o", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'vl-convert-python>=" in error
    assert error.count("\n") == 1


def test_page_of_the_fixtures(tmp_path: Path) -> None:
    names = [FIXTURES / f"{name}.json" for name in ("vanilla", "spd_oracle", "eagle_with_failure")]
    assert invoke(*names, "-o", tmp_path / "report.html").exit_code == 0
    text = (tmp_path / "report.html").read_text()
    assert "synthetic_drafter" in text
    assert "oracle:0.8" in text
    assert page.SCRIPT_END not in text.partition('id="spdbench-results">')[2].partition("</script>")[0]
