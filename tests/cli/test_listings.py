"""`spdbench backends`, `suites` and `env`: for people at 80 columns, for programs as JSON."""

from __future__ import annotations

import io
import json
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner
from pydantic import Field

from spdbench import __version__
from spdbench.backend import BackendOptions
from spdbench.cli.env import command as env
from spdbench.cli.files import show_text
from spdbench.cli.listings import backends, suites
from spdbench.measure import environment as measured
from spdbench.prompts.suite import shipped_suites

WIDTH = 80


def stdout(command: Any, *args: str) -> str:
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


class Odd:
    """Takes one option of every type."""

    class Options(BackendOptions):
        count: int = Field(0, description="a number " * 20)
        one: int = Field(1)
        rate: float = Field(0.5)
        quiet: bool = Field(False)
        mode: Literal["slow", "fast"] = Field("slow")
        sizes: tuple[int, ...] = Field((3, 1))
        words: str | None = Field(None)
        path: str = Field(description="must be given")

    kind = "draft_verify"

    def load(self) -> None: ...
    def describe(self) -> None: ...
    def prepare(self) -> None: ...
    def generate(self) -> None: ...
    def spans(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    """`odd` and `gone` are installed and nothing else."""
    points = [
        EntryPoint("odd", f"{__name__}:Odd", "spdbench.backends"),
        EntryPoint("gone", "no_such_module:Gone", "spdbench.backends"),
    ]
    monkeypatch.setattr("spdbench.plugins.entry_points", lambda group: [p for p in points if p.group == group])


def test_backends_lists_what_ships_with_every_option() -> None:
    text = stdout(backends)
    assert "vanilla  autoregressive" in text
    assert "spd  pipeline" in text
    assert "-o spd.stages=int\n        pipeline stages n; default: the drafter's" in text
    assert "-o eagle.top_k=int  [default 8]" in text
    assert "-o spd.executor=auto|process|inline|streams|torchrun  [default auto]" in text


def test_backends_can_be_asked_for_one() -> None:
    text = stdout(backends, "vanilla")
    assert "vanilla" in text
    assert "spd.stages" not in text


def test_backends_as_json_says_the_same() -> None:
    found = {listing["name"]: listing for listing in json.loads(stdout(backends, "--json"))}
    assert {"spd", "vanilla"} <= found.keys()
    assert found["spd"]["kind"] == "pipeline"
    assert found["spd"]["error"] is None
    assert found["spd"]["package"] == f"spdbench {__version__}"
    stages = next(option for option in found["spd"]["options"] if option["key"] == "stages")
    assert (stages["type"], stages["default"], stages["required"]) == ("int", None, False)
    assert stages["help"]


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize(
    "line",
    [
        "-o odd.count=int  [default 0]",
        "-o odd.one=int  [default 1]",
        "-o odd.rate=float  [default 0.5]",
        "-o odd.quiet=true|false  [default false]",
        "-o odd.mode=slow|fast  [default slow]",
        "-o odd.sizes=int,int,...  [default 3,1]",
        "-o odd.words=text  [default none]",
        "-o odd.path=text  [required]",
    ],
)
def test_options_are_shown_as_they_would_be_typed(line: str) -> None:
    assert f"    {line}\n" in stdout(backends, "odd")


@pytest.mark.usefixtures("odd")
def test_a_backend_that_cannot_be_imported_is_listed_with_its_reason() -> None:
    text = stdout(backends)
    assert "gone  cannot be used" in text
    assert "ModuleNotFoundError" in text
    assert "odd  draft_verify" in text
    assert longest_line(text) <= WIDTH


@pytest.mark.parametrize("command", [backends, suites], ids=["backends", "suites"])
def test_listings_fit_an_80_column_terminal(command: Any) -> None:
    assert longest_line(stdout(command)) <= WIDTH


def longest_line(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_suites_lists_what_ships_with_its_sources() -> None:
    text = stdout(suites)
    for name in shipped_suites():
        assert any(line.split("  ")[0] == name for line in text.splitlines()), name
    assert "from hub openai/gsm8k" in text
    assert "from inline" in text


def test_suites_as_json_says_the_same() -> None:
    found = {suite["name"]: suite for suite in json.loads(stdout(suites, "--json"))}
    yardsticks = {"spec_bench", "speed_bench", "sharegpt", "long_context"}
    assert found.keys() == yardsticks | {"quick", "mtbench", "gsm8k", "humaneval"}
    assert found["quick"]["num_prompts"] >= 24
    assert found["mtbench"]["num_prompts"] is None
    assert all(suite["description"] and suite["sources"] for suite in found.values())


def test_a_suites_prompts_are_shown() -> None:
    text = stdout(suites, "quick")
    assert text.startswith("quick v1, from inline\n")
    assert longest_line(text) <= WIDTH
    found = json.loads(stdout(suites, "quick", "--json"))
    assert all(f"\n{prompt['id']}  ({prompt['category']})\n" in text for prompt in found)
    assert max(len(prompt["turns"]) for prompt in found) == 2


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "PROBE_BYTES", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("lines", "is_paged"), [("5", True), ("500", False)])
def test_what_is_longer_than_the_terminal_goes_to_the_pager(
    lines: str, is_paged: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LINES", lines)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PAGER", f"tee {tmp_path / 'paged'}")
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    text = "".join(f"line {number}\n" for number in range(20))
    show_text(text)
    assert (tmp_path / "paged").exists() is is_paged
    assert ((tmp_path / "paged").read_text() if is_paged else screen.getvalue()) == text


@pytest.mark.usefixtures("small_probe")
def test_env_as_json_is_what_a_result_holds() -> None:
    found = json.loads(stdout(env, "--json"))
    assert found["spdbench"]["version"] == __version__
    assert len(found["environment"]["fingerprint"]) == 16
    assert found["environment"]["versions"]["torch"]


@pytest.mark.usefixtures("small_probe")
def test_env_is_one_fact_a_line() -> None:
    lines = stdout(env).splitlines()
    assert all(": " in line for line in lines)
    names = [line.partition(":")[0] for line in lines]
    assert names[0] == "spdbench"
    assert {"cpu", "cores", "threads", "memory", "torch", "read bandwidth", "fingerprint", "energy"} <= set(names)
    assert {"gpus", "driver", "cuda", "system", "kernel", "python", "transformers", "numpy"} <= set(names)
    assert any(line.endswith("GB/s") for line in lines)


def test_a_suite_of_ones_own_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text(textwrap.dedent("name: own\nversion: 1\n"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "own" not in {suite["name"] for suite in json.loads(stdout(suites, "--json"))}
