"""Options that a file sets, and words that are empty: as a user would see them."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import click
import pytest

from spdbench.cli.defaults import file_options
from spdbench.cli.main import COMMANDS, run, spdbench
from spdbench.cli.parameters import CHAT_TEMPLATE, DRAFTER, MODEL
from spdbench.cli.setup import find_levels
from spdbench.errors import FileWord, InputError
from spdbench.models.checkpoints import embedded
from spdbench.prompts.templates import BUILT_IN
from spdbench.training.recipe import find_recipe, parse_recipe_options

TYPO = "not an option that a file can set"


def error_of(
    text: str, file: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What `spdbench compare nothing` says in `folder`, where `file` holds `text`; it must end with code 2."""
    (folder / file).write_text(text, "utf-8")
    monkeypatch.chdir(folder)
    assert run(["compare", "nothing.json"]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    return str(shown.err)


def test_a_pipe_in_the_place_of_a_file_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "spdbench.toml")
    monkeypatch.chdir(tmp_path)
    assert run(["compare", "absent.json"]) == 2
    assert "absent.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[compare]\ndetials = true", f"compare.detials: {TYPO}; did you mean 'details'?"),
        ("[comprae]\ndetails = true", "unknown table 'comprae'; did you mean 'compare'?"),
        ("[compare]\ndetails = 1", "compare.details: 1 is not true or false"),
        ("[compare]\nformat = 'word'", "compare.format: 'word' is not one of"),
        ("[compare]\nformat = ['csv']", "compare.format: takes one value, not a list"),
        ("[compare]\nformat = true", "compare.format: takes a value, not true or false"),
        ("[compare]\nformat = {a = 1}", "compare.format: {'a': 1} is not a value of this option"),
        ("compare = 3", "'compare' is int, expected a table of options"),
        ("[compare", "is not TOML"),
        ('compare.baseline = "a\\u0000b"', "compare.baseline: holds a NUL character"),
        ("[compare]\nbaseline = ''", "compare.baseline: is empty"),
        (f"compare.baseline = {'[' * 100_000}", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_file_and_key(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = error_of(text, "spdbench.toml", tmp_path, monkeypatch, capsys)
    assert "spdbench.toml: " in shown
    assert expected in shown


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("run", "allow-code-execution = true", TYPO),
        ("run", "events = 'log'", TYPO),
        ("report", "force = true", TYPO),
        ("project", "chart = 'drawn.svg'", TYPO),
        ("run", "o = ['openai.base_url=http://elsewhere/v1']", "taken from the command line only"),
    ],
)
def test_a_folder_that_others_made_gives_no_permission(
    command: str,
    text: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "spdbench.toml").write_text(f"[{command}]\n{text}", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert run([command, "quick"]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("run", "data = 'there'", {"data": "UP/there"}),
        ("run", "data = 'absent'", {"data": "UP/absent"}),
        ("run", "results = '/elsewhere'", {"results": "/elsewhere"}),
        ("run", "results = '~/there'", {"results": "HOME/there"}),
        ("run", "model = 'there'", {"model": "UP/there"}),
        ("run", "model = 'of/there'", {"model": "UP/of/there"}),
        ("run", "model = './absent'", {"model": "UP/./absent"}),
        ("run", "model = 'absent/hub-id'", {"model": "absent/hub-id"}),
        ("run", "model = 'smollm2'", {"model": "smollm2"}),
        ("run", "chat-template = 'there.jinja'", {"chat_template": "UP/there.jinja"}),
        ("run", "chat-template = 'chatml'", {"chat_template": "chatml"}),
        (
            "run",
            "drafter = ['eagle=./head', 'there', 'spd=auto', 'b=oracle:there.json#a.b', 'oracle:0.8']",
            {"drafters": ("eagle=UP/./head", "UP/there", "spd=auto", "b=oracle:UP/there.json#a.b", "oracle:0.8")},
        ),
        (
            "run",
            "o = ['medusa.tree=chain', 'served.model=of/there', 'llamacpp.model=./there.json', 'x.draft=../a=b']",
            {
                "options": (
                    "medusa.tree=chain",
                    "served.model=of/there",
                    "llamacpp.model=UP/./there.json",
                    "x.draft=UP/../a=b",
                )
            },
        ),
        ("run", "template-arg = ['a=there.json']", {"template_args": ("a=there.json",)}),
        ("distill", "exclude = ['there', '/b']", {"exclude": ("UP/there", "/b")}),
        ("compare", "baseline = 'there.json'", {"baseline": "UP/there.json"}),
        ("compare", "baseline = 'there'", {"baseline": "there"}),
        ("compare", "baseline = 'of'", {"baseline": "of"}),
        ("check", "baseline = 'there'", {"baseline": "UP/there"}),
        ("check", "baseline = 'there/main__*.json'", {"baseline": "UP/there/main__*.json"}),
    ],
)
def test_relative_paths_go_by_the_folder_of_the_file(
    command: str, given: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UP is the file's folder as seen from the current one."""
    for name in ("there", "of/there", "smollm2", "chatml", "auto", "chain", "below/deeper"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("there.json", "there.jinja"):
        (tmp_path / name).touch()
    (tmp_path / "spdbench.toml").write_text(f"[{command}]\n{given}", "utf-8")
    monkeypatch.setenv("HOME", "/home/of-hers")
    group = click.Context(spdbench)
    for place, up in ((tmp_path / "below/deeper", "../.."), (tmp_path, "")):
        monkeypatch.chdir(place)
        params = spdbench.get_command(group, command)
        assert params is not None
        found = file_options(params, command, COMMANDS)
        shown = {name: tuple(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}
        wanted = str(expected).replace("UP/", f"{up}/" if up else "").replace("HOME", "/home/of-hers")
        assert shown == ast.literal_eval(wanted)


def test_names_that_are_no_paths_are_those_that_are_known() -> None:
    known = {CHAT_TEMPLATE: set(BUILT_IN), MODEL: {embedded.NAME}, DRAFTER: {"auto", "random"}}
    assert all(not kind.may_be_path(name) for kind, names in known.items() for name in names)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "quick", "-m", ""], "-m: is empty"),
        (["run", ""], "SUITE: is empty"),
        (["run", "quick", "--results="], "--results: is empty"),
        (["run", "quick", "--devices", ""], "--devices: is empty"),
        (["run", "quick", "-b", "=vanilla"], "-b =vanilla: the label is empty"),
        (["run", "quick", "-b", "x="], "-b x=: the backend is empty"),
        (["run", "quick", "-b", "eagle", "--drafter", "eagle="], "--drafter eagle=: what drafts is empty"),
        (["compare", ""], "RESULT: is empty"),
        (["check", "x", "--baseline", ""], "--baseline: is empty"),
        (["report", "x", "-o", ""], "-o: is empty"),
        (["trace", ""], "RESULT: is empty"),
        (["show", "x", ""], "PROMPT: is empty"),
        (["suites", "--data", ""], "--data: is empty"),
        (["train", "spd", "--data", "", "--out", "x"], "--data: is empty"),
    ],
)
def test_an_empty_word_is_refused_in_one_line(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell makes one of a variable that is not set; taken as it is, it would mean the default, or this folder."""
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"Error: {expected}")
    assert shown.count("\n") == 1


def test_the_nearest_file_counts_and_the_command_line_beats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.spdbench.run]\nmodel = './of-the-project'\nbackend = ['vanilla']")
    monkeypatch.chdir(inner)
    assert run(["run", "quick"]) == 2
    assert "./of-the-project" in capsys.readouterr().err
    (inner / "pyproject.toml").write_text("[another, tool")  # says nothing of spdbench, so nobody reads it
    assert run(["run", "quick"]) == 2
    assert "./of-the-project" in capsys.readouterr().err
    (inner / "spdbench.toml").write_text("[run]\nmodel = './nearest'")
    assert run(["run", "quick"]) == 2
    assert "./nearest" in capsys.readouterr().err
    assert run(["run", "quick", "-m", "./typed"]) == 2
    assert "./typed" in capsys.readouterr().err


def test_a_file_beats_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, version: 1, model: ./of-the-suite,"
        " prompts: {source: [{inline: [{id: a, category: b, turns: [hi]}]}]}}"
    )
    monkeypatch.chdir(tmp_path)
    assert run(["run", "mine.yaml"]) == 2
    assert "./of-the-suite" in capsys.readouterr().err
    (tmp_path / "spdbench.toml").write_text("[run]\nmodel = './of-the-file'")
    assert run(["run", "mine.yaml"]) == 2
    assert "./of-the-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words", "expected"),
    [
        ("o = ['a.max_ngram=2', 'a.num_tokens=3']", ["-o", "a.num_tokens=5"], {"max_ngram": 2, "num_tokens": 5}),
        ("o = ['a.max_ngram=2', 'spd.stages=3', 'spd2.stages=3']", [], {"max_ngram": 2}),
    ],
)
def test_options_of_backends_are_merged_by_key_and_those_of_other_runs_are_skipped(
    given: str, words: list[str], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    chosen = specs_of(given, ["-b", "a=ngram", *words], tmp_path, monkeypatch)
    assert {key: getattr(chosen["a"].options, key) for key in expected} == expected
    assert "NOTE" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words", "expected"),
    [
        ("drafter = ['eagle=random', 'oracle:0.8', 'medusa=random']", [], ["random", "oracle:0.8"]),
        ("drafter = ['eagle=random', 'oracle:0.8']", ["spd=oracle:0.5"], ["random", "oracle:0.5"]),
        ("drafter = ['eagle=random', 'spd=random']", ["oracle:0.5"], ["oracle:0.5", "oracle:0.5"]),
        ("drafter = ['eagle=random']", ["oracle:0.5", "eagle=oracle:0.1"], ["oracle:0.1", "oracle:0.5"]),
    ],
)
def test_drafters_are_merged_by_label(
    given: str, words: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed = [part for word in words for part in ("--drafter", word)]
    chosen = specs_of(given, ["-b", "eagle", "-b", "spd", *typed], tmp_path, monkeypatch)
    assert [chosen[label].drafter for label in ("eagle", "spd")] == expected


def specs_of(given: str, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The backends that `spdbench run quick WORDS` would load, where the file's table [run] holds `given`."""
    found: list[Any] = []

    def stop(*chosen: Any) -> None:
        found.extend(find_levels(*chosen)[0])
        raise InputError("enough is known")

    (folder / "spdbench.toml").write_text(f"[run]\n{given}", "utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("spdbench.cli.setup.find_levels", stop)
    assert run(["run", "quick", *words]) == 2
    return {spec.label: spec for spec in found}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("eagel.tree=chain", "skipped; did you mean 'eagle'?"),
        ("ngram.max_ngrm=2", "spdbench.toml: run.o: ngram.max_ngrm: unknown option; did you mean 'max_ngram'?"),
        ("ngram.max_ngram=x", "spdbench.toml: run.o: ngram.max_ngram=x: Input should be"),
        ("ngram", "spdbench.toml: run.o: ngram: expected LABEL.KEY=VALUE"),
    ],
)
def test_a_mistake_in_a_files_option_of_a_backend_is_reported_with_the_file(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs_of(f"o = '{given}'", ["-b", "ngram", "-b", "eagle"], tmp_path, monkeypatch)
    assert expected in capsys.readouterr().err


def test_options_of_another_method_are_skipped_in_training() -> None:
    options = find_recipe("medusa").Options
    words = [FileWord(word, "spdbench.toml: train.o") for word in ("ttt=3", "heads=2")]
    assert parse_recipe_options([*words, "heads=5"], options).model_dump()["heads"] == 5
    with pytest.raises(InputError, match=r"spdbench.toml: train.o: haeds: unknown option; did you mean 'heads'"):
        parse_recipe_options([FileWord("haeds=2", "spdbench.toml: train.o")], options)
    with pytest.raises(InputError, match="-o ttt: unknown option"):
        parse_recipe_options(["ttt=3"], options)


def test_a_folder_that_was_deleted_has_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    Path("../gone").rmdir()
    assert run(["backends", "ngram"]) == run(["run", "--help"]) == 0
    assert "ngram  " in capsys.readouterr().out
    assert run(["compare", "x.json"]) == 2
    assert "the current folder was deleted" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"], ["completion", "bash"]])
def test_help_and_completion_work_whatever_the_file_holds(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spdbench.toml").write_text("[run", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(words) == 0
    assert capsys.readouterr().out
    assert run(["run", "quick", "-m", "--help"]) == run(["suites", "--json"]) == 2
    assert "spdbench.toml: is not TOML" in capsys.readouterr().err


def test_a_byte_order_mark_before_the_file_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TYPO in error_of("\ufeff[compare]\ndetials = true", "spdbench.toml", tmp_path, monkeypatch, capsys)
