"""Writes Medusa heads in the published layouts and our own, so that they mean the same to those who read them.

What a layout has no place for is refused, not left out. Source: METHODS.md B. Must not know of targets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from spdbench.errors import InputError
from spdbench_backends.drafter_files import VERSION
from spdbench_backends.medusa.formats import TOKEN_MAP, MedusaFile

WrittenLayout = Literal["v0.1", "v2", "vllm", "spdbench"]


def write_medusa(file: MedusaFile, directory: Path, layout: WrittenLayout) -> Path:
    """Writes the heads in a published layout or our own; reading them gives the same tensors. Returns `directory`.

    Raises:
        InputError: the layout has no place for something that these heads have, or lack.
    """
    if lack := _lack(file, layout):
        raise InputError(f"{file.path}: cannot be written as {layout}, which {lack}")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in file.names(layout)}
    if layout == "vllm" and file.config.draft_token_ids is not None:
        tensors[TOKEN_MAP] = torch.tensor(file.config.draft_token_ids)
    if layout == "v0.1":
        torch.save(tensors, directory / "medusa_lm_head.pt")
    else:
        save_file(tensors, directory / ("medusa_lm_head.safetensors" if layout == "v2" else "model.safetensors"))
    (directory / "config.json").write_text(json.dumps(_written(file, layout), indent=1), encoding="utf-8")
    return directory


def _lack(file: MedusaFile, layout: WrittenLayout) -> str | None:
    """What stands between the heads and the layout."""
    config, own = file.config, len(file.heads) == len(file.blocks)
    if layout == "spdbench":
        return None
    if layout == "vllm":
        if not file.heads:
            return "knows no heads without a linear layer"
        return (
            None if config.vocab_size or config.draft_token_ids is None else "has to name the whole vocabulary's size"
        )
    if config.draft_token_ids is not None:
        return "knows no draft vocabulary"
    if any(block.bias_M is None for head in file.blocks for block in head):
        return "has a bias in every block"
    if layout == "v0.1":
        return None if own else "has a linear layer for every head"
    return "has no linear layers" if file.heads else None


def _written(file: MedusaFile, layout: WrittenLayout) -> dict[str, Any]:
    config, num_heads, num_blocks = file.config, len(file.blocks), len(file.blocks[0])
    width = file.blocks[0][0].weight_MM.shape[0]
    if layout == "spdbench":
        kept = config.model_dump(mode="json", exclude_defaults=True)
        return {**file.extra, "method": "medusa", "version": VERSION, "hidden_size": width, **kept}
    if layout == "vllm":
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": width,
            "vocab_size": config.vocab_size or len(file.heads[0]),
            "num_heads": num_heads,
            "num_hidden_layers": num_blocks,
            "truncated_vocab_size": len(file.heads[0]),
            "medusa_fc_bias": file.blocks[0][0].bias_M is not None,
            "original_lm_head": len(file.heads) < num_heads,
        }
    sizes = {"medusa_num_heads": num_heads, "medusa_num_layers": num_blocks}
    version = {"version": "2"} if layout == "v2" else {}
    return {"base_model_name_or_path": config.base_model, **sizes, **version}
