"""The forward pass against transformers', for every family."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from spdbench.decoding.autoregressive import decode
from spdbench.models.checkpoints.config import FAMILIES, HYBRIDS
from spdbench.models.decoder import Decoder
from spdbench.models.interface import CancelledForwardError
from tests import tiny

PROMPT = tuple(range(7, 20))
MODELS = tuple(f"{family}_text" if family in HYBRIDS else family for family in FAMILIES)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    # With the usual small weights one layer of this family makes a difference 150 times as large: rounding would show.
    changes: dict[str, dict[str, Any]] = {"qwen3_5_moe_text": {"initializer_range": 0.1}}
    return {family: tiny.make_model(root / family, family, **changes.get(family, {})) for family in MODELS}


def reference(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", MODELS)
def test_greedy_output_equals_transformers_generate(folders: dict[str, Path], family: str) -> None:
    target = tiny.load(folders[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = reference(folders[family]).generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)  # type: ignore[operator]
    expected = ids[0, len(PROMPT) :].tolist()
    assert len(set(expected)) > 5, "a model that repeats itself proves little"
    assert list(decode(target.decoder, tiny.greedy(PROMPT, 40))) == expected


def test_a_window_means_nothing_to_a_family_without(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers keeps a key that it does not know, and its Llama attends to everything all the same."""
    shutil.copytree(folders["llama"], tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sliding_window": 5}))
    request = tiny.greedy(PROMPT, 40)
    found, plain = (list(decode(tiny.load(folder).decoder, request)) for folder in (config.parent, folders["llama"]))
    assert found == plain


WITHOUT_COMPILED_CODE = """
import sys
from pathlib import Path
from spdbench.decoding.autoregressive import decode
from tests import tiny
for folder in sys.argv[1:]:
    decoder = tiny.load(Path(folder)).decoder
    print(decoder.kernels, *decode(decoder, tiny.greedy(tiny.PROMPT, 20)))
"""


def test_where_compiled_code_cannot_be_had_torch_serves(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-c", WITHOUT_COMPILED_CODE, *map(str, folders.values())]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    for folder, line in zip(folders.values(), done.stdout.splitlines(), strict=True):
        kernels, *ids = line.split()
        assert kernels == "torch"
        expected = list(decode(tiny.load(folder).decoder, tiny.greedy(tiny.PROMPT, 20)))
        assert [int(token) for token in ids] == expected


@pytest.mark.parametrize("family", MODELS)
def test_hidden_states_are_those_of_transformers(folders: dict[str, Path], family: str) -> None:
    decoder = tiny.load(folders[family]).own_decoder
    cache = decoder.new_cache(len(PROMPT))
    with torch.inference_mode():
        hidden, states = decoder.forward(decoder.embed(decoder.ids(PROMPT)), 0, cache, hidden_indices=range(7))
        found = reference(folders[family])(torch.tensor([PROMPT]), output_hidden_states=True)
        theirs = [state[0] for state in found.hidden_states]
        ours = [
            decoder.forward(
                theirs[layer], 0, decoder.new_cache(len(PROMPT), range(layer, layer + 1)), range(layer, layer + 1)
            )[0]
            for layer in range(6)
        ]
    for layer in range(5):  # each from transformers' own input: in recurrent models differences of rounding grow
        torch.testing.assert_close(ours[layer], theirs[layer + 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.normed(ours[5]), theirs[6], rtol=1e-4, atol=1e-4)  # theirs is behind the norm
    for index in range(6):
        torch.testing.assert_close(states[index], theirs[index], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[6], hidden)  # before the final norm, unlike transformers' last one
    torch.testing.assert_close(decoder.logits(hidden), found.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_layer_ranges_in_turn_equal_one_forward(folders: dict[str, Path], family: str) -> None:
    decoder = tiny.load(folders[family]).decoder
    hidden = decoder.embed(decoder.ids(PROMPT))
    whole, _ = decoder.forward(hidden, 0, decoder.new_cache(len(PROMPT)))
    for layers in (range(2), range(2, 3), range(3, 6)):
        hidden, _ = decoder.forward(hidden, 0, decoder.new_cache(len(PROMPT), layers), layers)
    torch.testing.assert_close(hidden, whole, rtol=0, atol=0)


@pytest.mark.parametrize("family", MODELS)
def test_several_rows_give_the_logits_of_one_row_at_a_time(folders: dict[str, Path], family: str) -> None:
    decoder = tiny.load(folders[family]).decoder
    hidden = decoder.embed(decoder.ids(PROMPT))
    at_once, _ = decoder.forward(hidden, 0, decoder.new_cache(len(PROMPT)))
    cache = decoder.new_cache(len(PROMPT))
    parts = [decoder.forward(hidden[a:b], a, cache)[0] for a, b in ((0, 4), (4, 5), (5, 9), (9, 10), (10, 13))]
    expected = decoder.logits(at_once)
    torch.testing.assert_close(
        decoder.logits(torch.cat(parts)), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_a_stage_loads_only_its_own_layers(folders: dict[str, Path]) -> None:
    target = tiny.load(folders["llama"])
    middle, last = target.load_layers(range(2, 4)), target.load_layers(range(4, 6))
    assert isinstance(middle, Decoder)
    assert isinstance(last, Decoder)
    assert sorted(middle.weights) == [2, 3]
    assert middle.embeddings_VM is None
    assert middle.head is None
    assert last.head is not None


def test_bytes_per_token_add_up_over_stages(folders: dict[str, Path]) -> None:
    decoder = tiny.load(folders["llama"]).own_decoder
    stages = [decoder.bytes_per_token(range(s, s + 2), head=s == 4) for s in (0, 2, 4)]
    assert sum(stages) == decoder.bytes_per_token(range(6), head=True)
    assert decoder.head is not None
    assert stages[2] - stages[0] == decoder.head.nbytes + 32 * 4


def test_a_mixture_reads_only_the_experts_it_routes_to(folders: dict[str, Path]) -> None:
    layer = tiny.load(folders["qwen3_moe"]).own_decoder.weights[0]
    assert layer.experts is not None
    everything = layer.experts.gate_up.nbytes + layer.experts.down.nbytes
    assert layer.bytes_per_token() < everything


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_scaled_rotary_positions_match_transformers(tmp_path: Path, rope: dict[str, object]) -> None:
    folder = tiny.make_model(tmp_path, "llama", rope_parameters=rope)
    with torch.inference_mode():
        expected = reference(folder)(torch.tensor([PROMPT])).logits[0]
    decoder = tiny.load(folder).decoder
    hidden, _ = decoder.forward(decoder.embed(decoder.ids(PROMPT)), 0, decoder.new_cache(len(PROMPT)))
    torch.testing.assert_close(decoder.logits(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32(folders: dict[str, Path], dtype: str) -> None:
    full, low = tiny.load(folders["llama"]).decoder, tiny.load(folders["llama"], dtype).decoder
    logits = []
    for decoder in (full, low):
        hidden, _ = decoder.forward(decoder.embed(decoder.ids(PROMPT)), 0, decoder.new_cache(len(PROMPT)))
        logits.append(decoder.logits(hidden).float())
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * logits[0].abs().mean()


@torch.inference_mode()
def test_a_pass_that_nobody_wants_stops_between_layers_and_leaves_the_cache_as_it_was(decoder: Decoder) -> None:
    rows = decoder.embed(decoder.ids(PROMPT))
    cache, other = decoder.new_cache(64), decoder.new_cache(64)
    for each in (cache, other):
        decoder.forward(rows, 0, each)
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(CancelledForwardError):
        decoder.forward(rows[:2], len(rows), cache, cancelled=cancelled)
    assert cache.length == len(rows)
    assert len(asked) == 3
    found, expected = (decoder.forward(rows[:1], len(rows), each)[0] for each in (cache, other))
    assert torch.equal(found, expected)
