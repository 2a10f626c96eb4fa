"""Writes EAGLE heads in the published layouts and our own, so that they mean the same to those who read them.

What a layout has no words for is refused, not left out. Source: METHODS.md A.7. Must not know of targets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spdbench_backends.drafter_files import VERSION
from spdbench_backends.eagle.checkpoint_layouts import feeds_back_normed
from spdbench_backends.eagle.formats import FAMILIES, EagleFile, Layout
from spdbench_backends.eagle.sizes import Sizes, sizes_of

CHAIN = 3
"""How many tokens a speculators config proposes to draft; whoever serves the head may choose otherwise."""


def write_eagle(file: EagleFile, directory: Path, layout: Layout, aux: Sequence[int] | None = None) -> Path:
    """Writes the head into `directory`, which it returns; reading it gives the same tensors.

    `aux` are the hidden states that the head reads, as `EagleWeights` knows them: needed where the head comes from
    another layout whose config lists layers, which are counted in two ways.

    Raises:
        InputError: `layout` cannot say what this head does.
    """
    sizes = sizes_of(file)
    if layout != "spdbench":
        _require_sayable(file, layout, sizes)
    if aux is None and file.config.aux_ids is not None and file.layout not in ("spdbench", layout):
        raise file.error(
            f"to write it as {layout}, which counts layers in its own way, say which hidden states it reads"
        )
    config = _WRITERS[layout](file, sizes, _aux_ids(file, layout, aux))
    prefix = "midlayer." if file.is_eagle3 and layout in ("safeailab", "specforge") else "layers.0."
    tensors = {
        prefix + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name: tensor.contiguous()
        for name, tensor in file.tensors.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if layout == "safeailab":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file(tensors, directory / "model.safetensors")
    return directory


def _require_sayable(file: EagleFile, layout: Layout, sizes: Sizes) -> None:
    config, tensors = file.config, file.tensors
    anywhere = {
        "a draft vocabulary listed in its config (d2t and t2d say the same)": config.draft_token_ids is not None,
        "no lm_head.weight, which stands for the target's rows": file.is_eagle3 and "lm_head.weight" not in tensors,
        "an lm_head.weight of its own in EAGLE-1": not file.is_eagle3 and "lm_head.weight" in tensors,
    }
    not_specforge = {
        "more than one layer": file.is_eagle3 and sizes.num_layers > 1,
        "norms of query and key heads": any(
            name.endswith("_norm.weight") and ".self_attn." in name for name in tensors
        ),
        "norm_before_residual": config.norm_before_residual,
        "norm_output": feeds_back_normed(file),
        "a sliding window": config.sliding_window is not None,
    }
    not_safeailab = {
        "norm_before_fc": "input_norm.weight" in tensors,
        "fc_norm": any(name.startswith("fc_norm.") for name in tensors),
    }
    refused = anywhere
    if layout != "speculators":
        refused = refused | not_specforge
    if layout == "safeailab":
        refused = refused | not_safeailab
    elif not file.is_eagle3:
        refused = {"EAGLE-1 tensors": True}
    if what := next((what for what, present in refused.items() if present), ""):
        raise file.error(f"cannot be written as {layout}, which knows no head with {what}")


def _aux_ids(file: EagleFile, layout: Layout, aux: Sequence[int] | None) -> list[int] | None:
    """The ids as `layout` counts them: layers whose outputs are read where SGLang serves it, else hidden states."""
    if aux is None and file.layout == "spdbench":
        aux = file.config.aux_ids
    if aux is None:
        return None if file.config.aux_ids is None else list(file.config.aux_ids)
    return [index - 1 for index in aux] if layout in ("safeailab", "specforge") else list(aux)


def _llama(file: EagleFile, sizes: Sizes) -> dict[str, Any]:
    """The head as a Llama config describes it, complete: readers have defaults of their own for what is missing."""
    config, geometry = file.config, sizes.geometry
    vocab = config.vocab_size or next(
        (len(file.tensors[n]) for n in ("t2d", "embed_tokens.weight") if n in file.tensors), None
    )
    rope = {} if config.rope_scaling is None else {"rope_scaling": config.rope_scaling}
    return {
        **({} if vocab is None else {"vocab_size": vocab}),
        "hidden_size": sizes.width,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": geometry.num_heads,
        "num_key_value_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        **rope,
        "tie_word_embeddings": False,
    }


def _draft_sizes(file: EagleFile) -> dict[str, int]:
    """What EAGLE-3's layouts add to a Llama config."""
    head, wide = file.tensors.get("lm_head.weight"), file.config.target_hidden_size
    size = file.config.draft_vocab_size if head is None else len(head)
    found = {"draft_vocab_size": size, "target_hidden_size": wide}
    return {key: value for key, value in found.items() if value is not None}


def _safeailab(file: EagleFile, sizes: Sizes, aux: list[int] | None) -> dict[str, Any]:
    written = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_llama(file, sizes)}
    if not file.is_eagle3:
        return {**written, "bias": "fc.bias" in file.tensors}
    nested = {} if aux is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": aux}}
    return {**written, **_draft_sizes(file), **nested}


def _specforge(file: EagleFile, sizes: Sizes, aux: list[int] | None) -> dict[str, Any]:
    tensors = file.tensors
    nested: dict[str, Any] = {"use_aux_hidden_state": True}
    if aux is not None:
        nested["eagle_aux_hidden_state_layer_ids"] = aux
    if "input_norm.weight" in tensors:
        nested["norm_before_fc"] = True
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **_llama(file, sizes),
        **_draft_sizes(file),
        **({"fc_norm": True} if "fc_norm.0.weight" in tensors else {}),
        **({"norm_output": True} if file.config.norm_output else {}),
        "eagle_config": nested,
    }


def _speculators(file: EagleFile, sizes: Sizes, aux: list[int] | None) -> dict[str, Any]:
    config, tensors = file.config, file.tensors
    qwen = "layers.0.self_attn.q_norm.weight" in tensors
    layer = {"model_type": "qwen3" if qwen else "llama", **_llama(file, sizes)}
    if config.sliding_window is not None:
        layer |= {"sliding_window": config.sliding_window, "use_sliding_window": True}
    family = FAMILIES.get(config.target_family or "")
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": CHAIN}],
            "verifier": {"name_or_path": file.extra.get("model_id"), "architectures": [family] if family else []},
        },
        "transformer_layer_config": layer,
        **_draft_sizes(file),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": "input_norm.weight" in tensors,
        "fc_norm": "fc_norm.0.weight" in tensors,
        "norm_output": feeds_back_normed(file),
        **({} if aux is None else {"eagle_aux_hidden_state_layer_ids": aux}),
    }


def _spdbench(file: EagleFile, sizes: Sizes, aux: list[int] | None) -> dict[str, Any]:
    own = {"aux_ids", "norm_output"}
    return {
        **file.extra,
        "method": "eagle3" if file.is_eagle3 else "eagle",
        "version": VERSION,
        **_llama(file, sizes),
        **file.config.model_dump(mode="json", exclude=own, exclude_none=True),
        "norm_output": feeds_back_normed(file),
        **({} if aux is None else {"aux_hidden_states": aux}),
    }


_WRITERS: Mapping[Layout, Callable[[EagleFile, Sizes, list[int] | None], dict[str, Any]]] = {
    "safeailab": _safeailab,
    "specforge": _specforge,
    "speculators": _speculators,
    "spdbench": _spdbench,
}
