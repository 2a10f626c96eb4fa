"""Transformers' layers by range, against the whole model; and that what cannot be split is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spdbench.decoding.autoregressive import decode
from spdbench.errors import InputError
from spdbench.models.checkpoints.config import Sizes
from spdbench.models.hf import library
from spdbench.models.hf.decoder import HFDecoder, SplitError, split_model
from spdbench.models.target import Target
from tests import tiny

PROMPT = tuple(range(7, 20))
LLAMAS: dict[str, dict[str, Any]] = {
    "llama-gelu": {"hidden_act": "gelu"},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
}
MODELS = (*tiny.FOREIGN, *LLAMAS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {
        name: tiny.make_model(root / name, name.partition("-")[0], **LLAMAS.get(name, {"seed": 1})) for name in MODELS
    }


@pytest.fixture(scope="module")
def targets(folders: dict[str, Path]) -> dict[str, Target]:
    return {name: tiny.load(folder) for name, folder in folders.items()}


def decoder_of(target: Target) -> HFDecoder:
    assert isinstance(target.decoder, HFDecoder)
    return target.decoder


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_output_equals_transformers_generate(
    folders: dict[str, Path], targets: dict[str, Target], name: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = reference(folders[name]).generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)
    expected = ids[0, len(PROMPT) :].tolist()
    assert len(set(expected)) > 5, "a model that repeats itself proves little"
    assert targets[name].unsupported_reason is not None
    assert list(decode(decoder_of(targets[name]), tiny.greedy(PROMPT, 40))) == expected


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(
    folders: dict[str, Path], targets: dict[str, Target], name: str
) -> None:
    decoder = decoder_of(targets[name])
    with torch.inference_mode():
        embedded = decoder.embed(decoder.ids(PROMPT))
        hidden, states = decoder.forward(embedded, 0, decoder.new_cache(len(PROMPT)), hidden_indices=range(7))
        found = reference(folders[name])(torch.tensor([PROMPT]), output_hidden_states=True)
    for index in range(1, 6):
        torch.testing.assert_close(states[index], found.hidden_states[index][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[0], embedded, rtol=0, atol=0)
    torch.testing.assert_close(states[6], hidden, rtol=0, atol=0)
    torch.testing.assert_close(decoder.logits(hidden), found.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_layer_ranges_in_turn_equal_one_forward(targets: dict[str, Target], name: str) -> None:
    decoder = decoder_of(targets[name])
    hidden = decoder.embed(decoder.ids(PROMPT))
    whole, _ = decoder.forward(hidden, 0, decoder.new_cache(len(PROMPT)))
    for layers in (range(2), range(2, 3), range(3, 6)):
        hidden, states = decoder.forward(
            hidden, 0, decoder.new_cache(len(PROMPT), layers), layers, hidden_indices=range(9)
        )
        assert set(states) == {*range(layers.start + 1, layers.stop + 1), *([0] if layers.start == 0 else [])}
    torch.testing.assert_close(hidden, whole, rtol=0, atol=0)


def test_a_cache_goes_back_and_only_back(targets: dict[str, Target]) -> None:
    decoder = decoder_of(targets["gemma2"])
    hidden = decoder.embed(decoder.ids(PROMPT))
    cache = decoder.new_cache(len(PROMPT), range(2, 4))
    expected, _ = decoder.forward(hidden, 0, decoder.new_cache(len(PROMPT), range(2, 4)), range(2, 4))
    decoder.forward(hidden[:9], 0, cache, range(2, 4))
    mark = cache.length
    decoder.forward(hidden[2:5], 9, cache, range(2, 4))
    assert (mark, cache.length) == (9, 12)
    cache.rollback(mark)
    cache.rollback(11)
    assert cache.length == 9
    last, _ = decoder.forward(hidden[9:], 9, cache, range(2, 4))
    torch.testing.assert_close(last, expected[9:], rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_fit_the_cache_are_refused(targets: dict[str, Target]) -> None:
    decoder = decoder_of(targets["gpt2"])
    hidden = decoder.embed(decoder.ids(PROMPT))
    with pytest.raises(IndexError, match="do not fit a cache of 0/12 tokens"):
        decoder.forward(hidden, 0, decoder.new_cache(12))
    with pytest.raises(IndexError, match="positions 1 to 14 do not fit"):
        decoder.forward(hidden, 1, decoder.new_cache(20))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3"])
def test_a_stage_keeps_only_its_own_layers(targets: dict[str, Target], name: str) -> None:
    whole = decoder_of(targets[name])
    hidden = whole.embed(whole.ids(PROMPT))
    for layers in (range(2), range(2, 5), range(5, 6)):
        part = targets[name].load_layers(layers)
        assert isinstance(part, HFDecoder)
        assert part.layers == layers
        expected, _ = whole.forward(hidden, 0, whole.new_cache(len(PROMPT), layers), layers)
        found, _ = part.forward(hidden, 0, part.new_cache(len(PROMPT)))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        held = sum(weight.nbytes for weight in part.model.parameters() if weight.device.type != "meta")
        assert held < whole.bytes_per_token(layers, head=True) + 0.2 * targets[name].num_bytes
        if layers.stop == 6:
            torch.testing.assert_close(part.logits(found), whole.logits(found), rtol=0, atol=0)
        hidden = expected


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2"])
def test_bytes_per_token_add_up_to_all_but_the_embeddings(targets: dict[str, Target], name: str) -> None:
    decoder = decoder_of(targets[name])
    stages = [decoder.bytes_per_token(range(s, s + 2), head=s == 4) for s in (0, 2, 4)]
    looked_up = sum(module.weight.nbytes for module in decoder.model.modules() if isinstance(module, nn.Embedding))
    assert sum(stages) == decoder.bytes_per_token(range(6), head=True) == targets[name].num_bytes - looked_up
    assert stages[0] == stages[1] < stages[2]


def test_a_tied_embedding_is_read_as_the_head(tmp_path: Path) -> None:
    target = tiny.load(tiny.make_model(tmp_path, "gpt2", tie_word_embeddings=True))
    positions = 256 * 32 * 4
    assert target.decoder.bytes_per_token(range(6), head=True) == target.num_bytes - positions


def test_a_mixture_reads_only_the_experts_it_routes_to(targets: dict[str, Target]) -> None:
    decoder = decoder_of(targets["mixtral"])
    everything = sum(weight.nbytes for weight in decoder.model.model.layers[0].parameters())
    experts = 4 * 3 * 32 * 48 * 4
    assert decoder.bytes_per_token(range(1), head=False) == everything - experts // 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision_passes_the_check(folders: dict[str, Path], name: str, dtype: str) -> None:
    decoder = decoder_of(tiny.load(folders[name], dtype))
    assert decoder.embed(decoder.ids(PROMPT)).dtype == decoder.dtype


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows what is mapped")
def test_no_weight_stays_in_a_mapped_file(tmp_path: Path) -> None:
    decoder = tiny.load(tiny.make_model(tmp_path, "gpt2")).decoder
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert decoder.layers == range(6)


class Layer(nn.Module):
    """Adds to each row a mix of the rows up to it, which it keeps in the cache."""

    def __init__(self, index: int, width: int) -> None:
        super().__init__()
        self.index, self.mix = index, nn.Linear(width, width)

    def forward(self, rows: Tensor, past_key_values: Any = None) -> Any:
        mixed = self.mix(rows)
        seen, num_old = mixed, 0
        if past_key_values is not None:
            seen, _ = past_key_values.update(mixed[:, None], mixed[:, None], self.index)
            seen, num_old = seen[:, 0], seen.shape[2] - mixed.shape[1]
        total = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1)[None, :, None]
        return rows + total[:, num_old:]


class Made(nn.Module):
    """A model with the surface of transformers', made to break one habit at a time."""

    base_model_prefix = ""
    config: Any = None

    def __init__(self, habit: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.habit = habit
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        layers = [Layer(index, 8) for index in range(4)]
        self.layers = nn.ModuleList(layers[:2] if habit == "half a list" else layers)
        if habit == "two lists":
            self.more = nn.ModuleList(Layer(index, 8) for index in range(4))

    @property
    def base_model(self) -> Made:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,  # noqa: ARG002 - transformers' own
    ) -> Any:
        rows = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if self.habit == "looks ahead":
            rows = rows + rows.flip(1).cumsum(1).flip(1)
        if self.habit == "ignores the cache":
            past_key_values = None
        first = rows
        for layer in self.layers:
            for _ in range(2 if self.habit == "twice" else 1):
                rows = layer(rows, past_key_values=past_key_values)
            if self.habit == "remembers the first layer's output":
                first = rows if layer.index == 0 else first
                rows = rows + 0.1 * first
        logits = self.head(rows)
        return type("Output", (), {"logits": logits * float("nan") if self.habit == "no numbers" else logits})


SIZES = Sizes("made", 4, 8, 50, 100, frozenset())


def split_made(habit: str) -> HFDecoder:
    return split_model(Made(habit).eval(), SIZES, library.range_cache, torch.float32, torch.device("cpu"))


def test_a_made_up_model_without_bad_habits_is_split() -> None:
    assert split_made("").layers == range(4)


@pytest.mark.parametrize(
    ("habit", "why"),
    [
        ("remembers the first layer's output", "layer by layer its logits are off by"),
        ("looks ahead", "token by token its logits are off by"),
        ("ignores the cache", "token by token its logits are off by"),
        ("twice", "it does not call its layers once each"),
        ("half a list", "it has 0 lists of 4 layers"),
        ("two lists", "it has 2 lists of 4 layers"),
        ("no numbers", "its logits are not numbers"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(habit: str, why: str) -> None:
    with pytest.raises(SplitError, match=why):
        split_made(habit)


@pytest.mark.parametrize("family", ["bert", "mamba"])
def test_architectures_that_cannot_be_split_are_refused(tmp_path: Path, family: str) -> None:
    target = tiny.load(tiny.make_model(tmp_path, family))
    with pytest.raises(InputError, match=f"architecture '{family}' is not supported: .* Fully supported: llama, mis"):
        target.decoder  # noqa: B018


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["olmo2"], tmp_path / "model"))


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Any] = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


DOWN = "model.layers.3.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({DOWN: None}, f"1 tensors are missing from the weights, e.g. {DOWN}"),
        ({DOWN: torch.ones(32, 5)}, "cannot be loaded by transformers|do not have the shapes"),
        ({"model.extra": torch.ones(2)}, r"1 tensors have no place in this model, e.g. model\.extra"),
        ({DOWN: torch.ones(32, 48).to(torch.float8_e4m3fn)}, f"{DOWN} is F8_E4M3; only unquantised"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied: Path, change: dict[str, Tensor | None], why: str) -> None:
    rewrite(copied, change)
    with pytest.raises(InputError, match=why):
        tiny.load(copied).decoder  # noqa: B018


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("num_hidden_layers", 3, "have no place in this model"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0, expected at least 1"),
        ("vocab_size", "many", "cannot be used"),
    ],
)
def test_a_config_that_cannot_be_or_does_not_belong(copied: Path, key: str, value: object, why: str) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=why):
        tiny.load(copied).decoder  # noqa: B018


def test_what_is_built_of_our_own_layers_says_that_it_cannot_be(targets: dict[str, Target]) -> None:
    with pytest.raises(InputError, match=r"own layers do not know this model \(architecture 'gpt2'\)"):
        targets["gpt2"].own_decoder  # noqa: B018
