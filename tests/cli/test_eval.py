"""`spdbench eval` and `spdbench lm-eval` on a tiny model and local tasks, without a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spdbench.judge.results.evaluation import Evaluation
from tests.cli.run_helpers import Said, spdbench, write_suite
from tests.lm_tasks import copy_tasks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and its libraries' own


@pytest.fixture(autouse=True)
def _offline(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True, scope="module")
def _own_files_once() -> Iterator[None]:
    """Lm-eval's own task files, ten thousand and more, are parsed once and not for each test that looks for a name
    among all of them."""
    import lm_eval.tasks
    from lm_eval.tasks import _index

    load_yaml, home = _index.load_yaml, Path(lm_eval.tasks.__file__).parent

    @cache
    def parsed(path: Path, resolve_func: bool, recursive: bool) -> Any:
        return load_yaml(path, resolve_func=resolve_func, recursive=recursive)

    def load(path: Path, *, resolve_func: bool = True, recursive: bool = True) -> Any:
        if home in Path(path).parents:
            return deepcopy(parsed(path, resolve_func, recursive))
        return load_yaml(path, resolve_func=resolve_func, recursive=recursive)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index, "load_yaml", load)
        yield


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return copy_tasks(tmp_path / "tasks")


class Evals:
    """`spdbench eval` on the tiny model and the local tasks."""

    def __init__(self, model: Path, tasks: Path, folder: Path) -> None:
        self.model, self.tasks, self.folder = model, tasks, folder

    def __call__(self, *words: str | Path) -> Said:
        common = ("-m", self.model, "--dtype", "float32", "--threads", "1", "--include-path", self.tasks)
        return spdbench("eval", *common, "--results", self.folder / "eval", *words)

    def file(self, tasks: str, label: str) -> Evaluation:
        path = self.folder / f"eval/{tasks}__{label}__{self.model.name}.json"
        return Evaluation.model_validate_json(path.read_bytes())


@pytest.fixture
def evaluate(tiny_model: Path, tasks: Path, tmp_path: Path) -> Evals:
    return Evals(tiny_model, tasks, tmp_path)


def test_lossless_backends_answer_and_score_like_vanilla_sample_by_sample(
    evaluate: Evals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository, of which lm-eval asks git
    backends = ("-b", "vanilla", "-b", "spd", "-b", "ngram", "-b", "eagle", "-o", "spd.executor=inline")
    more = ("--drafter", "oracle:0.6", "--tasks", "gsm8k,humaneval", "--allow-code-execution")
    said = evaluate(*backends, *more)
    assert said.code == 0, said.err
    assert "NOTE: answers that are code are run, each by itself;" in said.err
    assert "not a git repository" not in capfd.readouterr().err
    assert "exact_match" in said.out
    assert "pass_at_1" in said.out
    vanilla = evaluate.file("gsm8k+humaneval", "vanilla")
    assert len(vanilla.samples) == 3 * 2 + 2
    assert vanilla.tasks["gsm8k"].num_documents == 3
    assert vanilla.tasks["gsm8k"].num_fewshot == 2
    assert vanilla.tasks["gsm8k"].scores.keys() == {"exact_match,strict", "exact_match,flexible"}
    for label in ("spd", "ngram", "eagle"):
        other = evaluate.file("gsm8k+humaneval", label)
        assert other.samples == vanilla.samples
        assert other.tasks == vanilla.tasks


def test_lm_evals_own_command_line_gives_what_eval_gives(
    evaluate: Evals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository, of which lm-eval asks git
    evaluate("-b", "spd", "-o", "spd.executor=inline", "--drafter", "oracle:0.6", "--tasks", "gsm8k", "--limit", "2")
    ours = evaluate.file("gsm8k", "spd")
    from lm_eval.loggers.utils import get_git_commit_hash

    # As lm-eval's own command line finds it; `eval` has replaced it in this process.
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", get_git_commit_hash)
    capfd.readouterr()
    arguments = f"backend=spd,model={evaluate.model},drafter=oracle:0.6,dtype=float32,threads=1,spd.executor=inline"
    where = ("--include_path", evaluate.tasks, "--output_path", evaluate.folder / "theirs", "--log_samples")
    said = spdbench(
        *("lm-eval", "run", "--model", "spdbench", "--model_args", arguments),
        *("--tasks", "gsm8k", "--limit", "2", *where),
    )
    assert said.code == 0, said.err
    assert "not a git repository" not in capfd.readouterr().err
    [results] = (evaluate.folder / "theirs").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["gsm8k"]
    assert {key: score.value for key, score in ours.tasks["gsm8k"].scores.items()} == {
        key: theirs[key] for key in ours.tasks["gsm8k"].scores
    }
    [samples] = (evaluate.folder / "theirs").rglob("samples_gsm8k_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    mine = {(s.document, s.filter): (s.answers, s.prompt_sha256) for s in ours.samples}
    assert {(r["doc_id"], r["filter"]): (r["filtered_resps"], r["prompt_hash"]) for r in rows} == mine


def test_chat_template_and_fewshot_change_the_prompt(evaluate: Evals) -> None:
    hashes = []
    for words in ((), ("--num-fewshot", "0"), ("--apply-chat-template",)):
        said = evaluate("--tasks", "gsm8k", "--limit", "1", *words)
        assert said.code == 0, said.err
        hashes.append(evaluate.file("gsm8k", "vanilla").samples[0].prompt_sha256)
    assert len(set(hashes)) == 3


def test_suite_draws_scored_prompts_from_a_task(evaluate: Evals) -> None:
    source = {"lm_eval": "gsm8k", "include_path": "tasks"}
    suite = write_suite(evaluate.folder, prompts={"source": [source]}, score="gsm8k")
    where = ("--results", evaluate.folder / "results", "--data", evaluate.folder)
    words = ("run", suite, "-m", evaluate.model, "-b", "vanilla", "--threads", "1", *where)
    refused = spdbench(*words)
    assert refused.code == 2
    assert "--allow-code-execution" in refused.err  # task files hold code, and a suite alone may run none
    said = spdbench(*words, "--allow-code-execution")
    assert said.code == 0, said.err
    result = json.loads((evaluate.folder / f"results/mini__vanilla__{evaluate.model.name}.json").read_text())
    assert result["suite"]["source"] == "lm_eval gsm8k"
    assert all(run["score"] is not None for run in result["runs"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--tasks", "gsm9k"),
            "--tasks gsm9k: lm-eval knows no task, group or tag of that name; did you mean 'gsm8k'?",
        ),
        (("--tasks", "nothing"), "of task files over local JSONL; docs/lm-eval.md shows one"),
        (("--tasks", ","), "--tasks: names no task"),
        (
            ("--tasks", "humaneval"),
            "--tasks humaneval: scores answers by running the code in them; --allow-code-execution lets it",
        ),
        (("--tasks", "gsm8k", "-b", "vanila"), "unknown backend 'vanila'; did you mean 'vanilla'?"),
        (("--tasks", "gsm8k", "--include-path", "no-such"), "--include-path no-such: no such folder"),
    ],
)
def test_wrong_input_is_one_message(evaluate: Evals, words: tuple[str, ...], expected: str) -> None:
    said = evaluate(*words)
    assert said.code == 2
    assert expected in said.err
    assert said.err.count("Error") == 1
    assert "Traceback" not in said.err


def test_task_whose_data_needs_the_network_says_so(evaluate: Evals) -> None:
    text = (evaluate.tasks / "gsm8k.yaml").read_text()
    text = text.replace("dataset_path: json", "dataset_path: nobody/no-such-data")
    text = "\n".join(line for line in text.split("\n") if "FOLDER" not in line and "data_files" not in line)
    text = text.replace(f"  cache_dir: {evaluate.tasks}/cache", "  cache_dir: null")
    (evaluate.tasks / "gsm8k.yaml").write_text(text)
    said = evaluate("--tasks", "gsm8k")
    assert said.code == 2
    assert "--tasks gsm8k: its data cannot be loaded" in said.err
    assert "It may need the network" in said.err
    assert "Traceback" not in said.err


def test_lm_evals_command_line_gives_our_messages_too(evaluate: Evals) -> None:
    def said(*words: str) -> Said:
        common = ("--include_path", str(evaluate.tasks), "--limit", "1")
        return spdbench("lm-eval", "run", "--model", "spdbench", *common, *words)

    unknown = said("--model_args", "pretrained=x", "--tasks", "gsm8k")
    assert (unknown.code, "--model_args pretrained=x: unknown key" in unknown.err) == (2, True)
    model = f"model={evaluate.model}"
    task = said("--model_args", model, "--tasks", "gsm9k")
    assert (task.code, "Tasks not found: gsm9k" in task.err) == (2, True)
    code = said("--model_args", model, "--tasks", "humaneval")
    assert (code.code, "--confirm_run_unsafe_code" in code.err) == (2, True)
    assert "Traceback" not in unknown.err + task.err + code.err


@pytest.mark.parametrize("words", [("eval", "--tasks", "gsm8k"), ("lm-eval", "ls", "tasks")])
def test_without_lm_eval_the_extra_is_told(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = spdbench(*words)
    assert said.code == 2
    assert "pip install 'lm-eval>=" in said.err
