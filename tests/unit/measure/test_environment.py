"""What a result says about the machine, and what it must not say."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.measure import environment as module
from spdbench.measure.environment import environment, fingerprint, git_state
from spdbench.processors import cpu_model

MACHINE: dict[str, Any] = {
    "cpu": "A Processor",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 25_000_000_000,
    "gpus": [],
    "system": "Linux",
    "machine": "x86_64",
    "kernel": "6.1",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "read_bandwidth_bytes_per_s": 33_000_000_000,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return environment()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository that looks like spdbench's own."""
    (tmp_path / "spdbench").mkdir()
    (tmp_path / "spdbench" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for args in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *args], check=True)
    return tmp_path


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


def test_everything_is_json_and_the_facts_are_plausible(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert found["memory_bytes"] > 2**28
    assert found["read_bandwidth_bytes_per_s"] > 10**8
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]


def test_nothing_of_the_user_or_the_host_gets_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planted = {
        "HF_TOKEN": "hf_planted_token_1",
        "HOME": str(tmp_path / "planted_home_2"),
        "USER": "planted_user_3",
        "LOGNAME": "planted_user_3",
        "HOSTNAME": "planted_host_4",
        "OPENAI_API_KEY": "planted_key_5",
        "OMP_NUM_THREADS": "77345",
        "CUDA_VISIBLE_DEVICES": "planted_gpu_6",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    text = json.dumps([environment(), git_state()])
    assert "planted" not in text
    for secret in [*planted.values(), socket.gethostname(), str(Path(module.__file__).parent)]:
        assert json.dumps(secret)[1:-1] not in text


def test_login_name_and_home_folder_are_no_part_of_it(found: dict[str, Any]) -> None:
    words = json.dumps(found).replace('"', " ").split()
    assert getpass.getuser() not in words
    assert str(Path.home()) not in json.dumps(found)


def test_fingerprint_hangs_on_what_changes_timing() -> None:
    changes: list[dict[str, Any]] = [
        {"cpu": "Another"},
        {"cores": 4},
        {"threads": 1},
        {"cpu_quota": 1.5},
        {"memory_bytes": 50_000_000_000},
        {"gpus": ["NVIDIA H200"]},
        {"machine": "aarch64"},
        {"system": "Darwin"},
        {"versions": {"python": "3.11.7", "torch": "2.14.0"}},
    ]
    prints = {fingerprint(MACHINE | change) for change in changes}
    assert len(prints) == len(changes)
    assert fingerprint(MACHINE) not in prints


def test_a_quota_of_processor_time_is_recorded_where_there_is_one(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_bandwidth_bytes_per_s", lambda _: 1)
    monkeypatch.setattr(module, "cpu_quota", lambda: 0.5)
    limited = environment()
    assert limited["cpu_quota"] == 0.5
    assert limited["fingerprint"] != found["fingerprint"]


def test_fingerprint_is_the_same_at_every_call(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_bandwidth_bytes_per_s", lambda _: 1)
    again = environment()
    assert again["fingerprint"] == found["fingerprint"]
    assert again["read_bandwidth_bytes_per_s"] == 1


def test_fingerprint_does_not_hang_on_noise() -> None:
    for change in (
        {"read_bandwidth_bytes_per_s": 31_000_000_000},
        {"memory_bytes": 24_900_000_000},
        {"kernel": "6.2"},
        {"versions": {"python": "3.11.8", "torch": "2.13.0"}},
    ):
        assert fingerprint(MACHINE | change) == fingerprint(MACHINE)


def test_reading_faster_than_a_pass_over_the_probe_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_sum_ns", lambda _: 2_000_000_000)
    monkeypatch.setattr(module, "PROBE_BYTES", {"cpu": 4_000_000})
    monkeypatch.setattr(module, "PROBE_NS", 0)
    assert module.read_bandwidth_bytes_per_s() == 2_000_000


def test_bandwidth_stands_where_most_reads_are_interrupted_and_one_is_lucky(monkeypatch: pytest.MonkeyPatch) -> None:
    num_reads = 20
    each = module.READ_BYTES["cpu"] * torch.get_num_threads()
    reads = iter([1_000_000, *[2_000_000] * 4, *[50_000_000] * 15])
    monkeypatch.setattr(module, "_sum_ns", lambda _: next(reads))
    monkeypatch.setattr(module, "PROBE_BYTES", {"cpu": num_reads * each})
    monkeypatch.setattr(module, "PROBE_NS", 0)
    assert module.read_bandwidth_bytes_per_s() == pytest.approx(each * 500)


def test_processor_without_a_name_is_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor : 0\n")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert cpu_model() == "riscv64"


@needs_git
def test_git_state_is_the_commit_and_whether_sources_differ(checkout: Path) -> None:
    clean = git_state(checkout)
    assert clean is not None
    assert len(clean) >= 7
    assert int(clean, 16)
    (checkout / "notes.txt").write_text("not a source", encoding="utf-8")
    assert git_state(checkout) == clean
    (checkout / "spdbench" / "new.py").touch()
    assert git_state(checkout) == f"{clean}+dirty"


@needs_git
def test_git_state_is_not_led_astray_by_the_callers_git_variables(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = git_state(checkout)
    monkeypatch.setenv("GIT_DIR", str(tmp_path_factory.mktemp("another") / ".git"))
    assert git_state(checkout) == expected


@needs_git
def test_wheel_installed_below_the_users_repository_reports_nothing_of_it(checkout: Path) -> None:
    site = checkout / ".venv" / "lib" / "python3.11" / "site-packages"
    (site / "spdbench").mkdir(parents=True)
    assert git_state(site) is None


@needs_git
def test_users_repository_that_is_not_spdbench_is_not_reported(checkout: Path) -> None:
    shutil.rmtree(checkout / "spdbench")
    assert git_state(checkout) is None


def test_no_git_and_a_broken_checkout_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spdbench").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".git").write_text("gitdir: /nowhere\n", encoding="utf-8")
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None
