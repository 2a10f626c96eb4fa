"""What SECURITY.md promises: each promise names tests that exist, and the source calls nothing that would break it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("spdbench", "backends") for path in sorted((ROOT / folder).rglob("*.py"))]
RUNS_CODE = {"eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
JAIL = "measure/jail.py"
"""Runs what a model wrote: that is its purpose."""
READS_ANSWERS = "judge/answer_code.py"
"""Compiles what a model wrote to see whether it is Python, and runs nothing."""


def calls() -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Every call in the source: its file, what is called, and its keywords."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                named = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
                yield path, ast.unparse(node.func), named


def test_every_named_test_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 20
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{name}"


def test_every_promise_names_a_test() -> None:
    promises = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## What is promised")[2]
    items = re.split(r"\n- ", promises.partition("## What is not promised")[0])[1:]
    assert len(items) >= 8
    assert all("`tests/" in item for item in items)


def test_weights_are_never_unpickled() -> None:
    found = [(path, named) for path, name, named in calls() if name == "torch.load"]
    assert sorted(path.name for path, _ in found) == ["checkpoint.py", "weights.py"]
    assert all(named.get("weights_only") == "True" for _, named in found)
    imported = {
        alias.name.partition(".")[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    }
    assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def test_code_that_comes_with_a_model_is_never_allowed() -> None:
    loading = [(path, named) for path, name, named in calls() if name.endswith(".from_pretrained")]
    assert len(loading) >= 5
    for path, named in loading:
        assert named.get("trust_remote_code") == "False" or "gguf_file" in named, path
    assert not [path for path, _, named in calls() if named.get("trust_remote_code") == "True"]


def test_text_is_never_run_outside_of_the_sandbox() -> None:
    found = {path.relative_to(ROOT / "spdbench").as_posix() for path, name, _ in calls() if name in RUNS_CODE}
    assert found == {JAIL}
    compiling = {path.relative_to(ROOT / "spdbench").as_posix() for path, name, _ in calls() if name == "compile"}
    assert compiling == {JAIL, READS_ANSWERS}
    shells = [path for path, _, named in calls() if named.get("shell") == "True"]
    assert not shells


@pytest.mark.parametrize("name", ["SafeLoader"])
def test_yaml_is_read_as_data(name: str) -> None:
    loaders = {found for _, found, _ in calls() if found.startswith("yaml.") and "oader" in found}
    assert loaders == {f"yaml.{name}"}
