"""EAGLE heads in folders as their authors leave them, written without the code that is tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, FFN, HEADS, KV, SIZE, VOCAB = 32, 48, 4, 2, 8, 262
IDS = list(range(1, VOCAB, 3))

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}

Shapes = dict[str, tuple[int, ...]]


def layer(prefix: str, inputs: int = WIDTH, width: int = WIDTH) -> Shapes:
    """A decoder layer whose queries, keys and values read `inputs` numbers; without an input norm."""
    return {
        f"{prefix}self_attn.q_proj.weight": (HEADS * SIZE, inputs),
        f"{prefix}self_attn.k_proj.weight": (KV * SIZE, inputs),
        f"{prefix}self_attn.v_proj.weight": (KV * SIZE, inputs),
        f"{prefix}self_attn.o_proj.weight": (width, HEADS * SIZE),
        f"{prefix}mlp.gate_proj.weight": (FFN, width),
        f"{prefix}mlp.up_proj.weight": (FFN, width),
        f"{prefix}mlp.down_proj.weight": (width, FFN),
        f"{prefix}post_attention_layernorm.weight": (width,),
    }


def eagle3_shapes(prefix: str = "layers.0.", width: int = WIDTH, num_aux: int = 3) -> Shapes:
    """An EAGLE-3 head of `width` for a target of `WIDTH`."""
    return {
        "fc.weight": (width, num_aux * WIDTH),
        **layer(prefix, 2 * width, width),
        f"{prefix}hidden_norm.weight": (width,),
        f"{prefix}input_layernorm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (len(IDS), width),
    }


def eagle1_shapes() -> Shapes:
    return {"fc.weight": (WIDTH, 2 * WIDTH), **layer("layers.0."), "embed_tokens.weight": (VOCAB, WIDTH)}


def tensors_of(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Matrices large enough to tell things apart, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    return {name: 1 + t if t.dim() == 1 and not name.endswith(".bias") else t for name, t in drawn.items()}


def vocabulary() -> dict[str, Tensor]:
    member = torch.zeros(VOCAB, dtype=torch.bool)
    member[IDS] = True
    return {"d2t": torch.tensor(IDS) - torch.arange(len(IDS)), "t2d": member}


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], pickled: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def safeailab(folder: Path) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], **LLAMA, "draft_vocab_size": len(IDS)}
    return save(folder, config, tensors_of(eagle3_shapes("midlayer.")) | vocabulary(), pickled=True)


def specforge(folder: Path) -> Path:
    config = {"architectures": ["LlamaForCausalLMEagle3"], **LLAMA, "draft_vocab_size": len(IDS)}
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, 2], "use_aux_hidden_state": True}
    return save(folder, config, tensors_of(eagle3_shapes("midlayer.")) | vocabulary())


def speculators(folder: Path) -> Path:
    config: dict[str, Any] = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"architectures": ["LlamaForCausalLM"]}},
        "transformer_layer_config": {**LLAMA, "head_dim": SIZE, "rope_parameters": {"rope_theta": 5e5}},
        "draft_vocab_size": len(IDS),
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [2, 3, 3],
    }
    shapes = {**eagle3_shapes(), "embed_tokens.weight": (VOCAB, WIDTH)}
    return save(folder, config, tensors_of(shapes) | vocabulary())


def eagle1_tensors() -> dict[str, Tensor]:
    return tensors_of({**eagle1_shapes(), "fc.bias": (WIDTH,)})


def eagle1(folder: Path) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], **LLAMA, "bias": True}
    return save(folder, config, eagle1_tensors(), pickled=True)


def eagle1_of_vllm(folder: Path) -> Path:
    config = {"architectures": ["EAGLEModel"], "model_type": "eagle", "model": LLAMA}
    return save(folder, config, {f"model.{name}": tensor for name, tensor in eagle1_tensors().items()})


def eagle1_of_speculators(folder: Path) -> Path:
    config = {
        "architectures": ["EagleSpeculator"],
        "speculators_model_type": "eagle",
        "transformer_layer_config": LLAMA,
        "fusion_bias": True,
        "layernorms": False,
    }
    names = {name: name.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer.") for name in eagle1_tensors()}
    return save(folder, config, {names[name]: tensor for name, tensor in eagle1_tensors().items()})
