"""Tiny random models of every family with a real tokenizer, made without any download."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from spdbench.decoding.sampling import warp
from spdbench.models.checkpoints.find_model import find_model
from spdbench.models.interface import TargetDecoder
from spdbench.models.kv_cache import KVCache
from spdbench.models.target import Target
from spdbench.types import GenerationRequest, Sampling

EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
RECURRENT: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": RECURRENT,
    "qwen3_5_moe_text": {
        **RECURRENT,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
    },
}
FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 6, "original_max_position_embeddings": 256},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Architectures that spdbench's own layers do not support: learned positions, scaled and projected embeddings, capped
scores and logits, fused projections, norms after their layers, experts."""
SIZES: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPT = tuple(range(30, 41))
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def swap_tokens(folder: Path, first: str, second: str) -> None:
    """Gives two tokens of a model folder's tokenizer each other's id."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))


def make_model(folder: Path, family: str = "llama", vocab_size: int = 262, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model of `family` in `folder`, with the files that a user's model has."""
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, **{**SIZES, **(EXTRAS | HYBRIDS | FOREIGN).get(family, {}), **changes}
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if family in HYBRIDS:
            _draw_hybrid_parts(model)
        model.save_pretrained(folder)
        if vocab_size >= 262:
            make_tokenizer().save_pretrained(folder)
    return folder


def _draw_hybrid_parts(model: Any) -> None:
    """Numbers for what a new model has constants for, or states that forget everything at once."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(-4.0, -1.0)
            elif name.endswith(("norm.weight", "dt_bias")):
                weight.add_(torch.randn_like(weight), alpha=0.2)


def nest(folder: Path) -> Path:
    """Turns a hybrid text model into one that also reads images, as far as its files show it: a config within another,
    other names, and tensors that are no part of the language model. Returns the folder."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    text = json.loads(path.read_text())
    family = text["model_type"].removesuffix("_text")
    path.write_text(json.dumps({"model_type": family, "text_config": text, "tie_word_embeddings": False}))
    tensors = {
        name.replace("model.", "model.language_model.")
        if name.startswith("model.layers") or "embed" in name
        else name: t
        for name, t in load_file(weights).items()
    }
    tensors["model.language_model.norm.weight"] = tensors.pop("model.norm.weight")
    tensors |= {name: torch.ones(3) for name in ("mtp.norm.weight", "model.visual.norm.weight")}
    save_file(tensors, weights, {"format": "pt"})
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id a byte, and `</s>`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load(folder: Path, dtype: str = "float32") -> Target:
    return Target(find_model(str(folder)), dtype, "cpu")


def greedy(
    prompt_ids: tuple[int, ...], max_new_tokens: int, eos_ids: frozenset[int] = frozenset()
) -> GenerationRequest:
    return GenerationRequest(prompt_ids, (), max_new_tokens, Sampling(), 0, eos_ids)


def rows(cache: KVCache, layer: int) -> list[torch.Tensor]:
    """Valid keys and values of one layer, each `[K, length, D]`."""
    return [part[:, : cache.length] for part in cache.slots(layer)]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.inference_mode()
def next_probabilities(decoder: TargetDecoder, ids: tuple[int, ...], sampling: Sampling) -> list[float]:
    """The warped distribution of the token after `ids`, by one forward over all of them."""
    hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(ids)), 0, decoder.new_cache(len(ids)))
    return [float(p) for p in warp(decoder.logits(hidden_SM[-1:])[0], sampling)]
