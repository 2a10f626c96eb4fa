"""Models, weights, drafters and trees that are broken or hostile: read, or refused in one message."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from spdbench.models.checkpoints.config import ForeignModelError, model_config, read_raw_config
from spdbench.models.checkpoints.find_model import find_model
from spdbench.models.checkpoints.gguf_file import read_gguf
from spdbench.models.checkpoints.weights import Checkpoint
from spdbench.models.decoder import Decoder
from spdbench.models.hf import library
from spdbench_backends.eagle.build import random_eagle
from spdbench_backends.eagle.formats import read_eagle, write_eagle
from spdbench_backends.medusa.drafter import random_medusa
from spdbench_backends.medusa.formats import read_medusa, write_medusa
from spdbench_backends.medusa.trees import find_tree
from spdbench_backends.spd.exit_formats import random_exit, read_exit
from spdbench_backends.spd.formats import random_head, read_head, write_published
from tests import hostile
from tests.hostile import broken_json, changed, damaged, settings

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def drafters(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Config and tensors of a drafter of each method."""
    folder = tmp_path_factory.mktemp("drafters")
    write_medusa(random_medusa(decoder, 2, 0), folder / "medusa", "spdbench")
    write_eagle(random_eagle(decoder, 0), folder / "eagle", "spdbench")
    found = {
        name: (
            json.loads((folder / name / "config.json").read_bytes()),
            (folder / name / "model.safetensors").read_bytes(),
        )
        for name in ("medusa", "eagle")
    }
    stages = (range(3), range(3, 6))
    for name, file in (("spd", random_head(decoder, stages, 0)), ("ppsd", random_exit(decoder, stages, 0))):
        config = {"method": name, **file.config.model_dump(mode="json")}
        found[name] = config, save({key: tensor.contiguous() for key, tensor in file.tensors.items()})
    return found


READERS: dict[str, Callable[[Path], object]] = {
    "medusa": read_medusa,
    "eagle": read_eagle,
    "spd": read_head,
    "ppsd": read_exit,
}


@pytest.mark.parametrize("method", READERS)
@settings(150)
@given(data=st.data())
def test_drafter_folders(
    folder: Path, drafters: dict[str, tuple[dict[str, Any], bytes]], method: str, data: st.DataObject
) -> None:
    config, tensors = drafters[method]
    other_config = data.draw(st.booleans())
    (folder / "config.json").write_bytes(
        data.draw(broken_json(config)) if other_config else json.dumps(config).encode()
    )
    (folder / "model.safetensors").write_bytes(tensors if other_config else data.draw(damaged(tensors)))
    hostile.read("drafter folders", lambda: READERS[method](folder), folder)


@settings(100)
@given(data=st.data())
def test_published_heads(folder: Path, decoder: Decoder, data: st.DataObject) -> None:
    file = random_head(decoder, (range(3), range(3, 6)), 0)
    config = data.draw(changed(file.config.model_dump(mode="json")))
    write_published(folder / "head.pt", config if isinstance(config, dict) else {}, file.tensors)
    if data.draw(st.booleans()):
        (folder / "head.pt").write_bytes(data.draw(damaged((folder / "head.pt").read_bytes())))
    hostile.read("published heads", lambda: read_head(folder / "head.pt"), folder)


@settings(300)
@given(data=st.data())
def test_model_configs(folder: Path, tiny_model: Path, data: st.DataObject) -> None:
    config = json.loads((tiny_model / "config.json").read_bytes())
    generation = {"eos_token_id": [1, 2], "max_length": 20}
    (folder / "config.json").write_bytes(data.draw(broken_json(config)))
    (folder / "generation_config.json").write_bytes(data.draw(st.one_of(st.just(b"{}"), broken_json(generation))))

    def read() -> None:
        with contextlib.suppress(ForeignModelError):
            model_config(folder, library.standard_config(folder, read_raw_config(folder)["model_type"]))

    hostile.read("model configs", read, folder)


TENSORS = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a.weight": "one.safetensors", "b.weight": "one.safetensors"}}


def _read_weights(folder: Path) -> None:
    weights = Checkpoint(folder)
    try:
        weights.refuse_quantised()
        weights.num_parameters()
        weights.tensor("a.weight", (2, 3))
    finally:
        weights.close()


@settings(300)
@given(content=damaged(save(TENSORS)), index=broken_json(INDEX), sharded=st.booleans())
def test_safetensors(folder: Path, content: bytes, index: bytes, sharded: bool) -> None:
    for path in folder.iterdir():
        path.unlink()
    if sharded:
        save_file(TENSORS, folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(index)
    else:
        (folder / "model.safetensors").write_bytes(content)
    hostile.read("safetensors", lambda: _read_weights(folder), folder)


@settings(200)
@given(data=st.data())
def test_torch_files(folder: Path, data: st.DataObject) -> None:
    content = data.draw(st.one_of(changed(TENSORS), st.just({**TENSORS, "a.weight": hostile.Unpickled()})))
    torch.save(content, folder / "pytorch_model.bin")
    if data.draw(st.booleans()):
        (folder / "pytorch_model.bin").write_bytes(data.draw(damaged((folder / "pytorch_model.bin").read_bytes())))
    hostile.read("torch files", lambda: _read_weights(folder), folder)


@settings(150)
@given(note=broken_json({"source": "x.gguf", "sha256": "a" * 64}))
def test_source_notes(folder: Path, note: bytes) -> None:
    (folder / "spdbench.json").write_bytes(note)
    save_file(TENSORS, folder / "model.safetensors")
    hostile.read("source notes", lambda: find_model(str(folder)), folder)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_token_list(["a", "b"])
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.ones((2, 8), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path.read_bytes()


@settings(300)
@given(data=st.data())
def test_gguf_headers(folder: Path, gguf: bytes, data: st.DataObject) -> None:
    (folder / "m.gguf").write_bytes(data.draw(damaged(gguf)))
    hostile.read("GGUF headers", lambda: read_gguf(folder / "m.gguf"), folder)


TREE = [[0], [1], [0, 0], [0, 1], [1, 0]]


@settings(250)
@given(content=broken_json(TREE), ending=st.sampled_from([".json", ".yaml"]))
def test_trees(folder: Path, content: bytes, ending: str) -> None:
    (folder / f"t{ending}").write_bytes(content)
    hostile.read("trees", lambda: find_tree(str(folder / f"t{ending}")), folder)


def test_so_many_inputs_were_tried_within_the_memory_limit() -> None:
    """The last test of this file: hypothesis may end a test early, and then has tried less than was asked for."""
    hostile.require_tried("model files", within=8)
