"""`spdbench distill` on a tiny random model, whose ids are read as words: its bytes are no text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spdbench.cli.distill.filling import new_slots
from spdbench.models.decoder import Decoder
from spdbench.prompts.chat import ChatFormat
from spdbench.training.conversations import read_conversations
from spdbench.training.datafile import DataFile
from spdbench.training.distill.batched import slot_bytes
from tests.cli.run_helpers import Said, spdbench


@pytest.fixture(autouse=True)
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: ChatFormat, ids: Sequence[int]) -> str:
        return "".join(f" w{token}." for token in ids)

    monkeypatch.setattr(ChatFormat, "decode", decode)
    monkeypatch.setattr("spdbench.training.distill.talk.MAX_USER_TOKENS", 12)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "data.jsonl"


def distill(model: Path, out: Path, *words: str | Path, tokens: int = 200) -> Said:
    common = ("-m", model, "--dtype", "float32", "--devices", "cpu", "--threads", "1", "--max-new-tokens", "16")
    return spdbench("distill", "--out", out, "--tokens", str(tokens), *common, *words)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_name(path.name + ".summary.json").read_text())
    return found


def write_prompts(path: Path, *prompts: Any) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def test_model_writes_conversations_until_there_are_enough_tokens(tiny_model: Path, out: Path) -> None:
    said = distill(tiny_model, out)
    assert said.code == 0, said.err
    assert said.out == ""
    assert "tok/s kept" in said.err
    assert "NOTE: no prompts of gsm8k, " in said.err
    assert "--data DIR" in said.err
    header, *kept = rows(out)
    assert header["schema"] == "spdbench.data/1"
    assert (header["tokens"], header["seed"], header["model"]["id"]) == (200, 0, tiny_model.name)
    assert header["excluded"]["quick"] > 0
    assert sum(row["num_tokens"] for row in kept) >= 200
    assert {row["sampling"]["temperature"] == 0 for row in kept} == {True, False}
    assert len(read_conversations(out).messages) == len(kept)
    assert summary(out)["complete"]
    assert summary(out)["tokens"] == sum(row["num_tokens"] for row in kept)


def test_after_its_time_no_conversation_begins_and_all_that_began_are_kept(tiny_model: Path, out: Path) -> None:
    said = distill(tiny_model, out, "--budget", "1s", "--batch", "4", tokens=1_000_000)
    assert said.code == 0, said.err
    assert "Time or prompts are used up" in said.err
    assert len(rows(out)) == summary(out)["conversations"] + 1
    assert summary(out)["complete"]


def test_same_command_says_that_all_is_done(tiny_model: Path, out: Path) -> None:
    distill(tiny_model, out)
    before = out.read_bytes()
    assert distill(tiny_model, out).code == 0
    assert out.read_bytes() == before


def test_interrupted_run_keeps_what_is_finished_and_goes_on(
    tiny_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = DataFile.add

    def stop_after_two(self: DataFile, outcome: Any) -> None:
        add(self, outcome)
        if self.num_conversations == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(DataFile, "add", stop_after_two)
        patched.setattr("spdbench.cli.distill.filling.ignore_from_now_on", lambda: None)
        said = distill(tiny_model, out)
    assert said.code == 130
    assert "the same command goes on from there" in said.err
    assert not summary(out)["complete"]
    first = rows(out)
    assert len(first) == 3
    said = distill(tiny_model, out)
    assert said.code == 0, said.err
    assert "goes on after 2 conversations" in said.err
    again = rows(out)
    assert again[:3] == first
    assert len({row["sampling"]["index"] for row in again[1:]}) == len(again) - 1
    assert len({str(row["messages"]) for row in again[1:]}) == len(again) - 1


def test_file_cut_anywhere_is_gone_on_with(tiny_model: Path, out: Path) -> None:
    distill(tiny_model, out, tokens=60)
    whole = out.read_bytes()
    for size in range(0, len(whole), 401):
        out.write_bytes(whole[:size])
        assert distill(tiny_model, out, tokens=60).code == 0
        found = rows(out)
        assert sum(row["num_tokens"] for row in found[1:]) >= 60
        assert len({row["sampling"]["index"] for row in found[1:]}) == len(found) - 1


def test_prompts_of_a_file_are_answered_once_each(tiny_model: Path, out: Path, tmp_path: Path) -> None:
    prompts = write_prompts(
        tmp_path / "p.jsonl",
        {"question_id": 1, "category": "a", "turns": ["Say one.", "Say two."]},
        {"messages": [{"role": "user", "content": "Say three."}, {"role": "assistant", "content": "Old."}]},
        {"turns": ["Say one."]},
    )
    said = distill(tiny_model, out, "--prompts", prompts, tokens=10_000)
    assert said.code == 0, said.err
    assert "All prompts are used up" in said.err
    kept = sorted(rows(out)[1:], key=lambda row: row["sampling"]["index"])
    users = [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in kept]
    assert users == [["Say one.", "Say two."], ["Say three."]]
    assert "Old." not in out.read_text()
    assert summary(out)["dropped"] == {"duplicate": 1}
    assert distill(tiny_model, out, "--prompts", prompts, tokens=10_000).code == 0
    assert summary(out)["dropped"] == {"duplicate": 1}


def test_half_a_surrogate_pair_in_a_turn_is_skipped_and_named_by_its_line(
    tiny_model: Path, out: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"turns": ["Say one."]}\n{"turns": ["Say \\ud800 two."]}\n')
    said = distill(tiny_model, out, "--prompts", prompts)
    assert said.code == 0
    assert f"NOTE: {prompts}: 1 of 2 conversations are skipped. The first: {prompts} line 2: turns: must be" in said.err
    assert "must be text, but holds half of a surrogate pair" in said.err


def test_prompts_that_are_nearly_all_dropped_just_end_and_can_be_gone_on_with(
    tiny_model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spdbench.cli.distill.filling.MAX_DROPPED_IN_A_ROW", 3)
    prompts = write_prompts(tmp_path / "p.jsonl", *[{"turns": ["Say one."]}] * 7)
    for _ in range(2):
        said = distill(tiny_model, out, "--prompts", prompts, tokens=10_000)
        assert said.code == 0, said.err
        assert "All prompts are used up" in said.err
        assert "(dropped: duplicate 6; cut short: nothing)" in said.err
        assert len(rows(out)) == 2
        assert summary(out)["dropped"] == {"duplicate": 6}


def test_prompts_that_are_all_of_a_suite_end_with_their_number(
    tiny_model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spdbench.cli.distill.filling.MAX_DROPPED_IN_A_ROW", 3)
    mine = write_prompts(tmp_path / "mine.jsonl", {"turns": ["Name the seven colours of a rainbow in order, please."]})
    five = write_prompts(tmp_path / "five.jsonl", *[{"turns": ["Name the seven colours of a rainbow in order!"]}] * 5)
    said = distill(tiny_model, out, "--prompts", five, "--exclude", mine, tokens=10_000)
    assert said.code == 0, said.err
    assert "(dropped: overlap 5; cut short: nothing)" in said.err
    assert summary(out)["dropped"] == {"overlap": 5}


def test_suite_prompt_in_a_later_turn_or_a_system_message_is_counted(
    tiny_model: Path, out: Path, tmp_path: Path
) -> None:
    text = "Name the seven colours of a rainbow in order, please."
    mine = write_prompts(tmp_path / "mine.jsonl", {"turns": [text]})
    prompts = write_prompts(
        tmp_path / "p.jsonl",
        {"turns": ["Say one.", text]},
        {"messages": [{"role": "system", "content": text}, {"role": "user", "content": "Say three."}]},
    )
    said = distill(tiny_model, out, "--prompts", prompts, "--exclude", mine, tokens=10_000)
    assert said.code == 0, said.err
    assert "rainbow" not in out.read_text()
    assert len(rows(out)) == 2
    assert summary(out)["dropped"] == {"overlap": 1}
    assert summary(out)["cut_short"] == {"overlap": 1}


def test_prompts_that_are_in_a_suite_are_kept_out_and_counted(tiny_model: Path, out: Path, tmp_path: Path) -> None:
    mine = write_prompts(tmp_path / "mine.jsonl", {"turns": ["Name the seven colours of a rainbow in order, please."]})
    data = tmp_path / "data"
    (data / "gsm8k").mkdir(parents=True)
    write_prompts(data / "gsm8k" / "question.jsonl", {"question_id": 1, "turns": ["Kim has 3 kites and 4 hats."]})
    prompts = write_prompts(
        tmp_path / "p.jsonl",
        {"turns": ["Please name the seven colours of a rainbow in order!"]},
        {"turns": ["If Kim has 3 kites and 4 hats, what is that?"]},
        {"turns": ["Say three."]},
    )
    said = distill(tiny_model, out, "--prompts", prompts, "--exclude", mine, "--data", data, tokens=10_000)
    assert said.code == 0, said.err
    assert summary(out)["dropped"] == {"overlap": 2}
    assert rows(out)[0]["excluded"].items() >= {"gsm8k": 1, str(mine): 1}.items()
    note = next(line for line in said.err.splitlines() if line.startswith("NOTE: no prompts of "))
    assert "mtbench" in note
    assert "gsm8k" not in note


def test_model_without_a_chat_template_is_said(tiny_model: Path, out: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    said = distill(bare, out, tokens=40)
    assert said.code == 0, said.err
    assert "no chat template" in said.err
    assert rows(out)[0]["template_sha256"] is None


def test_other_settings_are_refused(tiny_model: Path, out: Path) -> None:
    distill(tiny_model, out, tokens=20)
    said = distill(tiny_model, out, "--seed", "7", tokens=20)
    assert said.code == 2
    assert "was begun with other settings: seed 0, now 7" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "250"], "more than the model's context of 256"),
        (["--devices", "cpu,cpu"], "one device makes the data"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
        (["--exclude", "/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
        (["--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["--tokens", "0"], "0 is not in the range"),
        (["--tokens", "9" * 18], "are free there"),
        (["--out", "/proc/here/d.jsonl"], "cannot be written"),
        (["--out", "/tmp"], "is a folder"),
    ],
)
def test_wrong_input_is_one_clear_message(words: list[str], said: str, tiny_model: Path, out: Path) -> None:
    found = distill(tiny_model, out, *words)
    assert found.code == 2
    assert said in found.err
    assert not out.exists()


def test_out_that_is_no_regular_file_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    link = tmp_path / "null"  # a link, so that a failure of this test cannot take the device away
    link.symlink_to("/dev/null")
    said = distill(tiny_model, link)
    assert said.code == 2
    assert f"--out {link}: is no regular file" in said.err
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("free", "said"),
    [([10], "the model tiny-llama needs about"), ([1 << 40, 10], "a conversation of ")],
    ids=["model", "conversation"],
)
def test_too_little_memory_is_said_before_anything_is_written(
    free: list[int], said: str, tiny_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(free)
    monkeypatch.setattr("spdbench.training.space.available_bytes", lambda _: next(left))
    found = distill(tiny_model, out)
    assert found.code == 2
    assert said in found.err
    assert "Give a smaller" in found.err
    assert "--draft-vocab" not in found.err
    assert not out.exists()


def test_fewer_conversations_run_side_by_side_where_memory_holds_no_more(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each = slot_bytes(decoder, 100)
    assert each > 2 * 6 * 2 * 100 * 8 * 4  # keys and values of 6 layers with 2 heads of 8 float32
    for free, expected in ((11 * each, 8), (each, 1), (1 << 40, 20)):
        monkeypatch.setattr("spdbench.training.space.available_bytes", lambda _, free=free: free)
        slots = new_slots(decoder, 20, 10_000, 100, 1)
        assert sum(len(part.lengths) for part in slots) == expected
        note = f"NOTE: {expected} conversations at a time, not 20: "
        assert (note in capsys.readouterr().err) is (expected < 20)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "Hi"}, "line 1: has no `messages`, `conversations` or `turns`, and no `instruction` with `output`"),
        ({"turns": []}, "line 1: turns: must be a text or a list of texts"),
        ({"turns": [1]}, "line 1: turns: must be a text or a list of texts"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "line 1: has no message of a user"),
    ],
)
def test_row_that_is_no_prompt_is_named(row: Any, said: str, tiny_model: Path, out: Path, tmp_path: Path) -> None:
    found = distill(tiny_model, out, "--prompts", write_prompts(tmp_path / "p.jsonl", row))
    assert found.code == 2
    assert said in found.err


def test_model_that_writes_nothing_of_worth_ends_with_the_reasons(
    tiny_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatFormat, "decode", lambda *_: "\ufffd")
    monkeypatch.setattr("spdbench.cli.distill.filling.MAX_DROPPED_IN_A_ROW", 5)
    said = distill(tiny_model, out)
    assert said.code == 1
    assert "5 conversations in a row were dropped: " in said.err
    assert summary(out)["num_dropped"] == 5
    assert summary(out)["generated_tokens"] > 0
    assert not summary(out)["complete"]


def test_prompts_with_a_system_message_are_answered_where_the_template_takes_none(
    tiny_model: Path, out: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "strict")
    template = model / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' or messages[-1]['content'] == 'odd' %}{{ raise_exception('no') }}"
    template.write_text(refusal + "{% endif %}" + template.read_text())
    asked = [[("user", "How deep is it?")], [("system", "Rhyme."), ("user", "How high is it?")], [("user", "odd")]]
    rows_of = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in asked]
    said = distill(model, out, "--prompts", write_prompts(tmp_path / "prompts.jsonl", *rows_of))
    assert said.code == 0, said.err
    assert "NOTE: --prompts: 1 of 3 conversations are skipped. The first: conversation 3: " in said.err
    assert "NOTE: the chat template takes no system message: in 1 of 2 conversations its text opens" in said.err
    assert [row["messages"][0]["role"] for row in rows(out)[1:]] == ["user", "system"]
    only = write_prompts(tmp_path / "odd.jsonl", rows_of[2])
    said = distill(model, tmp_path / "none.jsonl", "--prompts", only)
    assert said.code == 2
    assert "conversation 1: the model's chat template refuses this conversation: no" in said.err
