"""Every command in the documentation's code blocks and workflows is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from spdbench.backend import find_backend, parse_options
from spdbench.cli.main import COMMANDS, spdbench
from spdbench.cli.options import parse_backend_options, parse_labels

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*.yml"))]


def commands_in(page: Path) -> list[tuple[str, str]]:
    """The `spdbench` commands of code blocks and of the steps of workflows."""
    text = page.read_text(encoding="utf-8")
    blocks = [("yml", text)] if page.suffix == ".yml" else re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    shells = [
        part for kind, block in blocks for part in (steps_of(yaml.safe_load(block)) if kind == "yml" else [block])
    ]
    lines = [line for shell in shells for line in re.sub(r"\\\n\s*", " ", shell).splitlines()]
    return [found for line in lines for found in re.findall(rf"\bspdbench ({'|'.join(COMMANDS)})\b([^;|&#`]*)", line)]


def steps_of(workflow: Any) -> Iterator[str]:
    jobs = workflow.get("jobs", {}) if isinstance(workflow, dict) else {}
    for job in jobs.values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


def test_workflows_have_commands() -> None:
    assert len(commands_in(ROOT / "docs" / "servers-workflow.yml")) >= 2
    assert len(commands_in(ROOT / "docs" / "gate.md")) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_have_options_and_backends_that_exist(page: Path) -> None:
    for name, rest in commands_in(page):
        words = [word for word in shlex.split(rest.replace("-o ...", "")) if word != "..."]
        command = spdbench.get_command(click.Context(spdbench), name)
        assert command is not None
        parsed, _, _ = command.make_parser(
            click.Context(command, info_name=name, **command.context_settings)
        ).parse_args(words)
        labels = parse_labels(parsed.get("backends") or ())
        options = parse_backend_options(parsed.get("options") or (), list(labels)) if labels else {}
        for label, given in options.items():
            if labels[label] in WRITTEN_BY_THE_READER:
                continue
            parse_options(label, find_backend(labels[label]).Options, given)


WRITTEN_BY_THE_READER = ("mine", "guessing")
