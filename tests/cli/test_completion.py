"""Completion by shells, as a user would see it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from spdbench.cli.main import run


def completions(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is told of `spdbench LINE`, kind and all."""
    for name, value in {"_SPDBENCH_COMPLETE": "bash_complete", "COMP_WORDS": f"spdbench {line}"}.items():
        monkeypatch.setenv(name, value)
    assert run([]) == 0
    monkeypatch.delenv("_SPDBENCH_COMPLETE")
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("co", ["plain,compare", "plain,completion"]),
        ("run --keep", ["plain,--keep-drafts"]),
        ("run gs", ["plain,gsm8k", "file,gs"]),
        ("run quick -b me", ["plain,medusa"]),
        ("run quick -b big=me", ["plain,medusa"]),  # bash replaces what comes behind the `=`
        ("run quick --dtype float3", ["plain,float32"]),
        ("run quick --dtype=float3", ["plain,float32"]),
        ("backends rec", ["plain,recycling"]),
        ("train me", ["plain,medusa"]),
        *(
            (f"{command} re", ["file,re"])
            for command in ("compare", "check", "answers", "results", "report", "project")
        ),
        *((f"{command} 'a b/re", ["file,a b/re"]) for command in ("show", "trace", "import", "sweep")),
        ("compare one two ", ["file,"]),
        ("run quick --drafter my", ["file,my"]),
        ("run quick -m my", ["file,my"]),
        ("run quick --drafter eagle=my", ["file,my"]),
        ("compare x --baseline my", ["file,my"]),
    ],
)
def test_a_shell_completes_commands_options_names_and_files(
    line: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completions(line, monkeypatch, capsys) == expected


def test_a_real_bash_completes_with_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One shell for all lines; it calls a stub, which says what `spdbench` would."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    assert run(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out, "utf-8")
    (tmp_path / "results").mkdir()
    (tmp_path / "results here, too.json").touch()
    (tmp_path / "stub").write_text('#!/bin/sh\nprintf "plain,resume\\nfile,res\\n"; echo "$COMP_WORDS" >>seen', "utf-8")
    (tmp_path / "stub").chmod(0o755)
    lines = (
        'source ./script; COMP_LINE="spdbench compare res"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(spdbench compare res)'
    )
    call = "COMP_CWORD=2; _spdbench_completion ./stub; printf '%s\\n' \"${COMPREPLY[@]}\"; complete -p spdbench"
    done = subprocess.run([bash, "-c", f"{lines}; {call}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    *offered, registered = done.stdout.splitlines()
    assert sorted(offered) == ["results", "results here, too.json", "resume"]
    assert "-F _spdbench_completion spdbench" in registered
    assert (tmp_path / "seen").read_text("utf-8") == "spdbench compare res\n"
    assert not done.stderr


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("heads/t", ["heads/two words"]),
        ("eagle=heads/o", ["eagle=heads/one"]),
        ("--drafter=eagle=heads/t", ["--drafter=eagle=heads/two words"]),
        ("eagle=absent", []),
    ],
)
def test_fish_completes_files_behind_a_label(
    word: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the script's own function, in a real fish where there is one."""
    assert run(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    assert "_spdbench_completion_paths __fish_complete_path $metadata[2]" in script
    assert "_spdbench_completion_paths __fish_complete_directories $metadata[2]" in script
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("no fish")
    (tmp_path / "heads").mkdir()
    for name in ("one", "two words"):
        (tmp_path / "heads" / name).touch()
    call = f"{script}\n_spdbench_completion_paths __fish_complete_path {shlex.quote(word)}"
    done = subprocess.run([fish, "--no-config", "-c", call], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == expected
    assert not done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_SPDBENCH_COMPLETE=" + shell in capsys.readouterr().out
