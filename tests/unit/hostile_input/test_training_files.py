"""Data to train on, and what a killed training run left, broken or hostile: read, or refused in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spdbench.training import checkpoint
from spdbench.training.conversations import read_conversations
from spdbench.training.datafile import open_data
from spdbench.training.log import is_finished
from tests import hostile
from tests.hostile import broken_json, broken_json_lines, changed, settings

pytestmark = pytest.mark.usefixtures("own_cache")

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": [{"type": "text", "text": "a"}]}, {"from": "gpt", "value": "b"}]},
]


@settings(300)
@given(content=st.one_of(broken_json_lines(CHATS), broken_json(CHATS)))
def test_conversations(folder: Path, content: bytes) -> None:
    (folder / "c.jsonl").write_bytes(content)
    hostile.read("conversations", lambda: read_conversations(folder / "c.jsonl"), folder)


SETTINGS = {"created": "x", "model": {"id": "m"}, "seed": 0, "tokens": 40}
DATA = [
    {"schema": "spdbench.data/1", **SETTINGS},
    {"messages": CHATS[0]["messages"], "sampling": {"index": 0}, "num_tokens": 4},
]
SUMMARY = {"schema": "spdbench.data-summary/1", "dropped": {"repetitive": 1}, "generated_tokens": 9, "seconds": 1.5}


@settings(300)
@given(content=broken_json_lines(DATA), summary=broken_json(SUMMARY))
def test_data_files(folder: Path, content: bytes, summary: bytes) -> None:
    (folder / "d.jsonl").write_bytes(content)
    (folder / "d.jsonl.summary.json").write_bytes(summary)

    def resume() -> None:
        with open_data(folder / "d.jsonl", SETTINGS) as data:
            data.write_summary(complete=False)
        json.loads((folder / "d.jsonl.summary.json").read_bytes(), parse_constant=pytest.fail)

    hostile.read("data files", resume)
    for line in content.split(b"\n")[1:-1]:  # what was there before is still there
        assert line in (folder / "d.jsonl").read_bytes()


LOG: list[dict[str, Any]] = [
    {"schema": "spdbench.train/1", "method": "medusa"},
    {"step": 1},
    {"finished": True, "format": "spdbench"},
]


@settings(150)
@given(content=broken_json_lines(LOG))
def test_training_logs(folder: Path, content: bytes) -> None:
    (folder / "train.jsonl").write_bytes(content)
    (folder / "config.json").write_text("{}")
    hostile.read("training logs", lambda: is_finished(folder, LOG[0], "spdbench"), folder)


def _training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    return module, optimizer


@settings(200)
@given(data=st.data())
def test_training_checkpoints(folder: Path, data: st.DataObject) -> None:
    module, optimizer = _training()
    state = checkpoint.State(step=3, held_out=[1], best_weights=dict(module.state_dict()))
    checkpoint.save(folder, {"method": "m"}, state, module, optimizer, checkpoint.generators(torch.device("cpu")))
    valid = torch.load(folder / checkpoint.NAME, weights_only=True)
    torch.save(data.draw(changed(valid)), folder / checkpoint.NAME)
    hostile.read("training checkpoints", lambda: checkpoint.restore(folder, {"method": "m"}, *_training()), folder)


def test_so_many_inputs_were_tried_within_the_memory_limit() -> None:
    """The last test of this file: hypothesis may end a test early, and then has tried less than was asked for."""
    hostile.require_tried("training files", within=4)
