"""The registry of backends, and the way from `-o` words to typed options."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Annotated

import pytest
from pydantic import BeforeValidator, Field, model_validator

from spdbench.backend import BackendOptions, find_backend, installed_backends, parse_options
from spdbench.errors import InputError


class Options(BackendOptions):
    stages: int | None = Field(None, ge=1, description="how many")
    ratio: float = Field(0.5, description="how much")
    fast: bool = Field(False, description="whether")
    sizes: Annotated[tuple[int, ...], BeforeValidator(lambda text: text.split(","))] = Field((), description="a list")

    @model_validator(mode="after")
    def check(self) -> Options:
        if self.ratio > 9:
            raise ValueError("ratio is out of this world")
        return self


def refusal(**given: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_options("two", Options, given)
    return str(caught.value)


def test_shipped_backends_are_found_by_their_entry_points() -> None:
    names = list(installed_backends())
    assert {"vanilla", "spd"} <= set(names)
    assert names == sorted(names)
    assert find_backend("vanilla").kind == "autoregressive"


def test_unknown_backend_is_named_with_the_nearest_and_all_known() -> None:
    with pytest.raises(InputError, match=r"unknown backend 'vanila'; did you mean 'vanilla'.*Known: .*spd.*vanilla"):
        find_backend("vanila")


def test_class_that_does_not_fit_the_protocol_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("odd", "collections:OrderedDict", "spdbench.backends")
    monkeypatch.setattr("spdbench.backend.installed_backends", lambda: {"odd": point})
    with pytest.raises(InputError, match=r"backend 'odd' \(collections:OrderedDict\) lacks kind, Options, load"):
        find_backend("odd")


def test_words_become_typed_options_and_the_rest_keeps_its_default() -> None:
    options = parse_options("two", Options, {"stages": " 3 ", "fast": "true", "sizes": "3,1,2"})
    assert isinstance(options, Options)
    assert (options.stages, options.ratio, options.fast, options.sizes) == (3, 0.5, True, (3, 1, 2))


def test_what_a_shipped_backend_takes_arrives_with_its_types() -> None:
    spd = find_backend("spd").Options
    options = parse_options("three", spd, {"stages": "3", "stage_layers": "12,10,8"}).model_dump()
    assert (options["stages"], options["stage_layers"], options["executor"]) == (3, (12, 10, 8), "auto")
    assert parse_options("three", spd, {"stage_layers": "8;7"}).model_dump()["stage_layers"] == (8, 7)


def test_no_words_are_all_defaults() -> None:
    assert parse_options("two", Options, {}) == Options()


def test_unknown_key_is_named_with_its_label_and_the_nearest() -> None:
    assert refusal(stagse="3").startswith(
        "-o two.stagse: unknown option; did you mean 'stages'? Known: fast, ratio, sizes"
    )


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("stages", "three", "valid integer"),
        ("stages", "0", "greater than or equal to 1"),
        ("ratio", "much", "valid number"),
        ("fast", "perhaps", "valid boolean"),
        ("sizes", "3,many", "valid integer"),
    ],
)
def test_wrong_value_is_named_with_label_key_and_reason(key: str, value: str, reason: str) -> None:
    message = refusal(**{key: value})
    assert message.startswith(f"-o two.{key}={value}: ")
    assert reason in message


def test_options_that_do_not_go_together_say_why() -> None:
    assert "ratio is out of this world" in refusal(ratio="10")


def test_options_cannot_be_changed_after_parsing() -> None:
    options = Options()
    with pytest.raises(ValueError, match="frozen"):
        options.ratio = 1.0  # type: ignore[misc]
