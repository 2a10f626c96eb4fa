"""`spdbench backends`, `suites` and `env`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Annotated, Any, Literal

import pytest
from click.testing import CliRunner
from pydantic import Field

from spdbench.backend import BackendOptions
from spdbench.cli import backends, env, suites
from spdbench.errors import InputError


class Loud:
    """Shouts.

    And more that the list leaves out.
    """

    class Options(BackendOptions):
        width: int = Field(4, description="how many")
        ratio: float | None = Field(None, description="how much")
        fast: bool = Field(True, description="whether")
        mode: Literal["a", "b"] = Field("a", description="which")
        layers: Annotated[tuple[int, ...], Field(description="each")] = (1, 2)
        path: str = Field(description="where")

    kind = "draft_verify"
    lossless = True
    load = describe = prepare = generate = None


class Unfinished:
    kind = "draft_verify"


@pytest.fixture
def strange_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends: one that works, one that lacks methods, one that cannot be imported."""
    points = {
        name: EntryPoint(name, value, "spdbench.backends")
        for name, value in {
            "loud": f"{__name__}:Loud",
            "unfinished": f"{__name__}:Unfinished",
            "missing": "no_such_module_anywhere:X",
        }.items()
    }
    monkeypatch.setattr("spdbench.backend.installed_backends", lambda: points)


def listed(*args: str) -> dict[str, Any]:
    done = CliRunner().invoke(backends.command, [*args, "--json"], catch_exceptions=False)
    return {listing["name"]: listing for listing in json.loads(done.stdout)}


def test_shipped_backends_are_listed_with_kind_and_package() -> None:
    found = listed()
    assert {"vanilla", "spd"} <= found.keys()
    assert found["vanilla"]["kind"] == "autoregressive"
    assert found["spd"]["package"].startswith("spdbench ")
    assert found["spd"]["description"]
    assert all(option["help"] for option in found["spd"]["options"])


def test_listing_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys\n"
        "from spdbench.cli.main import run\n"
        "assert run(['backends']) == 0\n"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.usefixtures("strange_backends")
def test_options_are_shown_in_the_words_of_a_command_line() -> None:
    options = listed("loud")["loud"]["options"]
    assert [(option["key"], option["type"], option["default"]) for option in options] == [
        ("width", "int", 4),
        ("ratio", "float", None),
        ("fast", "true|false", True),
        ("mode", "a|b", "a"),
        ("layers", "int,int,...", [1, 2]),
        ("path", "text", None),
    ]
    assert [option["key"] for option in options if option["required"]] == ["path"]


@pytest.mark.usefixtures("strange_backends")
def test_text_gives_each_option_as_it_is_typed() -> None:
    text = CliRunner().invoke(backends.command, ["loud"], catch_exceptions=False).stdout
    assert text.startswith("loud  draft_verify  (from unknown)\n    Shouts.\n")
    assert "    -o loud.layers=int,int,...  [default 1,2]\n        each\n" in text
    assert "    -o loud.fast=true|false  [default true]\n" in text
    assert "    -o loud.path=text  [required]\n" in text


@pytest.mark.usefixtures("strange_backends")
def test_backend_that_cannot_be_used_is_listed_with_the_reason() -> None:
    found = listed()
    assert found["loud"]["error"] is None
    assert "lacks Options, load" in found["unfinished"]["error"]
    assert "no_such_module_anywhere:X cannot be imported: ModuleNotFoundError" in found["missing"]["error"]


def test_unknown_backend_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown backend 'vanila'; did you mean 'vanilla'"):
        listed("vanila")


def test_shipped_suites_are_listed_with_their_sources() -> None:
    done = CliRunner().invoke(suites.command, ["--json"], catch_exceptions=False)
    found = {suite["name"]: suite for suite in json.loads(done.stdout)}
    assert {"quick", "mtbench", "gsm8k", "humaneval"} <= found.keys()
    assert found["quick"]["num_prompts"] >= 24
    assert all(suite["description"] and suite["sources"] for suite in found.values())


@pytest.mark.parametrize("command", [backends.command, suites.command, env.command])
def test_listings_are_plain_and_fit_80_columns(command: Any) -> None:
    done = CliRunner().invoke(command, [], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_env_says_what_a_result_would_carry() -> None:
    done = CliRunner().invoke(env.command, ["--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["environment"]["read_bandwidth_bytes_per_s"] > 0
    text = CliRunner().invoke(env.command, [], catch_exceptions=False).stdout
    assert found["environment"]["fingerprint"] in text
    assert found["environment"]["versions"]["torch"] in text
