"""Journals: what a kill, a full disk, a damaged file and a second writer do to them."""

from __future__ import annotations

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from spdbench.errors import InputError
from spdbench.measure.journal import MAX_TRANSIENT, Journal, create_journal, resume_journal
from spdbench.types import FirstDivergence
from tests.builders import make_run, vanilla_steps

IDENTITY: dict[str, Any] = {"suite": "quick", "temperature": 0.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "quick__spd__m.journal.jsonl"


def written(path: Path, num_runs: int = 3) -> Journal:
    journal = create_journal(path, "2026-01-01", IDENTITY)
    for number in range(num_runs):
        journal.append(make_run(prompt=f"p{number}"))
    return journal


def test_runs_come_back_as_they_were_written(path: Path) -> None:
    journal = written(path)
    assert [run.prompt_id for run in journal.runs()] == ["p0", "p1", "p2"]
    assert journal.run(("p1", 0, 0)) == make_run(prompt="p1")
    assert ("p1", 0, 0) in journal
    assert ("p9", 0, 0) not in journal


def test_resuming_finds_everything_that_was_finished(path: Path) -> None:
    journal = written(path)
    divergence = FirstDivergence("tie", 2, 7, 8, 1.5, inf, 0.0)
    journal.add_comparison(("p1", 0, 0), divergence)
    written_divergences = journal.divergences
    journal.close()
    again = resume_journal(path, IDENTITY)
    assert len(again) == 3
    assert again.outcomes == {("p1", 0, 0): "tie"}
    assert again.divergences == written_divergences
    assert again.divergences["p1", 0, 0].divergence == replace(divergence, found_logit=None)  # infinity is no JSON
    assert again.created == "2026-01-01"
    again.append(make_run(prompt="p3"))
    assert [run.prompt_id for run in again.runs()] == ["p0", "p1", "p2", "p3"]


def test_what_failed_for_a_reason_that_may_pass_is_asked_again_a_few_times(path: Path) -> None:
    lost = make_run(prompt="p1").model_copy(update={"finish_reason": "error", "transient": True})
    journal, again = written(path, 1), True
    for number in range(1, MAX_TRANSIENT + 1):
        journal.append(lost)
        assert (lost.key in journal, len(journal)) == (True, 2)
        journal.close()
        journal, again = resume_journal(path, IDENTITY), number < MAX_TRANSIENT
        assert (lost.key in journal.asked_again, lost.key in journal) == (again, not again)
        assert (lost.key in journal.resumed_prompts) == (not again)
    journal.close()
    other = path.with_name("other.jsonl")
    with create_journal(other, "2026-01-01", IDENTITY) as journal:
        journal.append(lost)
    with resume_journal(other, IDENTITY) as journal:
        journal.append(make_run(prompt="p1"))
    with resume_journal(other, IDENTITY) as journal:
        assert (list(journal.runs()), journal.asked_again) == ([make_run(prompt="p1")], set())


def test_every_cut_of_the_file_loses_at_most_the_line_that_was_cut(path: Path) -> None:
    written(path).close()
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for cut in range(header, len(whole), 97):
        path.write_bytes(whole[:cut])
        journal = resume_journal(path, IDENTITY)
        assert len(journal) == whole[:cut].count(b"\n") - 1
        journal.append(make_run(prompt="new"))
        assert [run.prompt_id for run in journal.runs()][-1] == "new"
        journal.close()


@pytest.mark.parametrize("header", [b"", b'{"journal": "spdb', b"hello\n", b'{"journal": "other/1"}\n', b"[]\n"])
def test_a_broken_header_cannot_be_resumed(path: Path, header: bytes) -> None:
    path.write_bytes(header)
    with pytest.raises(InputError, match=r"line 1 is not the header of a journal"):
        resume_journal(path, IDENTITY)
    assert path.read_bytes() == header


def test_damage_in_the_middle_is_named_by_line(path: Path) -> None:
    written(path).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[2][:40] + b"\n" + lines[3])
    with pytest.raises(InputError, match="line 3 is damaged"):
        resume_journal(path, IDENTITY)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\n", b"\r\n"),
        (b'{"run"', b'{"x":1,"run"'),
        (b'{"run"', b'{ "run"'),
        (b'"identical"', b'"banana"'),
        (b'"turn":0', b'"turn":1,"turn":0'),
    ],
)
def test_what_an_editor_did_to_it_is_noticed_at_once(path: Path, old: bytes, new: bytes) -> None:
    journal = written(path)
    journal.add_comparison(("p1", 0, 0), None)
    journal.close()
    header, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(header + b"\n" + rest.replace(old, new))
    with pytest.raises(InputError, match=r"line \d is damaged"):
        resume_journal(path, IDENTITY)


@pytest.mark.parametrize(
    "line",
    [
        {"outcome": ["p9", 0, 0, "identical"]},
        {"run": make_run(prompt="p9").model_copy(update={"num_new_tokens": 4}).model_dump(mode="json")},
        {"run": make_run(vanilla_steps(9), prompt="p9").model_dump(mode="json")},
    ],
    ids=["an outcome of no request", "totals that the columns contradict", "longer than the limit"],
)
def test_lines_that_no_run_writes_are_refused(path: Path, line: dict[str, Any]) -> None:
    create_journal(path, "2026-01-01", IDENTITY | {"max_new_tokens": 8}).close()
    line |= {"of": json.loads(path.read_bytes())["mark"]}
    with path.open("ab") as file:
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        resume_journal(path, IDENTITY | {"max_new_tokens": 8})


def test_lines_of_another_journal_are_refused(path: Path) -> None:
    other = path.with_name("quick__ngram__m.journal.jsonl")
    written(path, 1).close()
    with create_journal(other, "2026-01-01", IDENTITY) as journal:
        journal.append(make_run(prompt="p1"))
    with path.open("ab") as file:
        file.write(other.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(InputError, match="line 3 is damaged"):
        resume_journal(path, IDENTITY)


def test_journals_of_older_versions_without_marks_are_resumed(path: Path) -> None:
    written(path).close()
    header, *lines = path.read_bytes().splitlines(keepends=True)
    mark = json.loads(header)["mark"].encode()
    old = [
        header.replace(b'"mark": "' + mark + b'", ', b""),
        *(line.replace(b',"of":"' + mark + b'"', b"") for line in lines),
    ]
    assert mark not in b"".join(old)
    path.write_bytes(b"".join(old))
    with resume_journal(path, IDENTITY) as journal:
        journal.append(make_run(prompt="p3"))
    with resume_journal(path, IDENTITY) as journal:
        assert [run.prompt_id for run in journal.runs()] == ["p0", "p1", "p2", "p3"]


def test_a_journal_that_was_deleted_stops_the_run_at_once(path: Path) -> None:
    journal = written(path)
    path.unlink()
    with pytest.raises(InputError, match="was deleted while the run was writing it"):
        journal.append(make_run(prompt="p3"))


def test_resuming_something_else_names_what_differs(path: Path) -> None:
    written(path).close()
    with pytest.raises(InputError, match=r"--resume: .* was begun with other settings: temperature 0.0, now 0.7"):
        resume_journal(path, {**IDENTITY, "temperature": 0.7})


def test_a_new_run_sets_an_unfinished_one_aside(path: Path) -> None:
    written(path).close()
    before = path.read_bytes()
    create_journal(path, "2026-01-02", IDENTITY).close()
    assert path.with_name(path.name + ".old").read_bytes() == before
    assert len(resume_journal(path, IDENTITY)) == 0


def test_what_was_set_aside_is_kept_until_its_request_is_finished(path: Path) -> None:
    journal = written(path)
    for num_tokens in (6, 5):
        journal.set_aside(make_run(vanilla_steps(num_tokens), prompt="p3"))
    journal.set_aside(make_run(prompt="p1"))
    journal.append(make_run(prompt="p1", repeat=1))
    journal.close()
    again = resume_journal(path, IDENTITY)
    assert len(again) == 4
    assert [run.decode_s for run in again.taken_aside(("p3", 0, 0))] == [0.05, 0.04]
    assert again.taken_aside(("p3", 0, 0)) == []
    again.append(make_run(prompt="p3"))
    again.close()
    assert resume_journal(path, IDENTITY).taken_aside(("p3", 0, 0)) == []


def test_two_writers_cannot_share_a_journal(path: Path) -> None:
    journal = written(path)
    with pytest.raises(InputError, match="another run is writing this now"):
        resume_journal(path, IDENTITY)
    with pytest.raises(InputError, match="another run is writing this now"):
        create_journal(path, "later", IDENTITY)
    journal.close()
    resume_journal(path, IDENTITY).close()


@pytest.mark.parametrize("unfinished", [False, True])
def test_of_several_runs_that_begin_at_once_with_one_name_one_writes(path: Path, unfinished: bool) -> None:
    for _ in range(20):
        if unfinished:
            path.with_name(path.name + ".old").unlink(missing_ok=True)
            with written(path, 1):
                pass
        together = Barrier(6)

        def begin(number: int, together: Barrier = together) -> Journal | None:
            together.wait()
            try:
                return create_journal(path, f"run {number}", IDENTITY)
            except InputError as error:
                assert "another run is writing this now" in str(error)  # noqa: PT017 - in a thread of its own
                return None

        with ThreadPoolExecutor(6) as pool:
            begun = list(pool.map(begin, range(6)))
        (journal,) = [one for one in begun if one is not None]
        journal.append(make_run(prompt="p0"))
        journal.close()
        assert json.loads(path.read_bytes().splitlines()[0])["created"] == journal.created
        resumed = resume_journal(path, IDENTITY)
        assert len(resumed) == 1
        resumed.remove()
        if unfinished:
            assert b'"p0"' in path.with_name(path.name + ".old").read_bytes()


class FullDisk:
    """Takes ten bytes of a line, then has no room."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._room = 10

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: memoryview) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self._room = self._room, 0
        return int(self._file.write(data[:taken]))


def test_a_full_disk_is_a_clear_error_and_keeps_what_was_finished(path: Path) -> None:
    journal = written(path)
    journal._file = FullDisk(journal._file)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"the disk is full. What was finished is kept"):
        journal.append(make_run(prompt="p3"))
    journal.close()
    assert [run.prompt_id for run in resume_journal(path, IDENTITY).runs()] == ["p0", "p1", "p2"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*--results"):
        create_journal(tmp_path / "file" / "x.jsonl", "now", IDENTITY)


def test_appending_costs_the_same_at_the_end_as_at_the_start(path: Path) -> None:
    """Memory holds an offset a line, never a line; each append writes one line."""
    journal = create_journal(path, "now", IDENTITY)
    for number in range(2000):
        journal.append(make_run(prompt=f"p{number}"))
    size = path.stat().st_size
    journal.append(make_run(prompt="last"))
    assert (
        path.stat().st_size - size
        == len(
            json.dumps({"run": make_run(prompt="last").model_dump(mode="json"), "of": 8 * "0"}, separators=(",", ":"))
        )
        + 1
    )
    assert all(isinstance(offset, int) for offset in journal.offsets.values())
    journal.close()
