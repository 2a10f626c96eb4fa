"""Medusa heads on disk: the published layouts and our own, in and out, by tensor names and shapes.

    v0.1      {k}.{j}.linear.weight/bias blocks, {k}.{m}.weight the head's own linear layer
    v2        blocks only, the target's head serves all
    medusa-2  either of the two under medusa_head., inside a whole fine-tuned model: that model has to be the target
    vllm      blocks.{k}.layers.{j}.weight, lm_heads.{k}.weight or one for all, token_map for a smaller vocabulary
    spdbench  v2's blocks, lm_head.weight or the target's rows, draft_token_ids

Source: METHODS.md B. Strict: an unknown, missing or misshapen tensor is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spdbench.errors import InputError
from spdbench.models.checkpoint import Checkpoint, sha256_of_files
from spdbench.models.decoder import Decoder
from spdbench.models.kernels import Linear, linear
from spdbench_backends.medusa.head import MedusaWeights

Layout = Literal["v0.1", "v2", "medusa-2", "vllm", "spdbench"]

WEIGHTS = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", "pytorch_model.bin")
INSIDE = "medusa_head."
BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
OWN_LINEAR = re.compile(r"(\d+)\.(\d+)\.weight")
VLLM_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
VLLM_HEAD = re.compile(r"lm_heads\.(\d+)\.weight")
SHARED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class MedusaFile:
    """Heads as read: `tensors` under v0.1's names, `lm_head.weight` for a linear layer that all share."""

    path: Path
    layout: Layout
    tensors: Mapping[str, Tensor]
    sha256: str
    draft_token_ids: tuple[int, ...] | None = None
    trained_tokens: int | None = None
    head_accuracies: tuple[tuple[float, ...], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def holds_medusa_heads(directory: Path) -> bool:
    """True for a Medusa-2 checkpoint: a whole model with heads among its weights."""
    try:
        files = Checkpoint(directory).files
    except InputError:
        return False
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                if any(name.startswith(INSIDE) for name in handle.keys()):  # noqa: SIM118 - a handle, not a mapping
                    return True
    return False


def read_medusa(path: Path, target_directory: Path | None = None) -> MedusaFile:
    """The heads in a folder, whatever their layout.

    Raises:
        InputError: no heads, damaged, or those of a fine-tuned model that is not the target at `target_directory`.
    """
    if holds_medusa_heads(path):
        if target_directory is None or path.resolve() != target_directory.resolve():
            raise InputError(
                f"{path}: is a whole model with Medusa heads; its heads fit its own weights alone, so measure it with "
                f"-m {path} and --drafter auto"
            )
        return _from_inside(path)
    raw = _config(path)
    method = raw.get("method")
    if method not in (None, "medusa"):
        raise InputError(f"{path}: is a drafter for '{method}', not for medusa")
    file = next((path / name for name in WEIGHTS if (path / name).exists()), None)
    if file is None:
        raise InputError(f"{path}: has no Medusa heads (none of {', '.join(WEIGHTS)})")
    tensors = _load(file)
    digest = sha256_of_files([file])
    if method == "medusa":
        _refuse_unknown(tensors, file, (BLOCK,))
        try:
            ids = raw.get("draft_token_ids")
            accuracies = tuple(tuple(float(share) for share in ranks) for ranks in raw.get("head_accuracies", ()))
            draft_ids = None if ids is None else tuple(int(token) for token in ids)
        except (TypeError, ValueError):
            raise InputError(
                f"{path}/config.json: draft_token_ids and head_accuracies must be lists of numbers"
            ) from None
        return MedusaFile(path, "spdbench", tensors, digest, draft_ids, raw.get("trained_tokens"), accuracies)
    if raw.get("model_type") == "medusa" or any(name.startswith(("blocks.", "medusa_heads.")) for name in tensors):
        return _from_vllm(path, file, tensors, digest)
    _refuse_unknown(tensors, file, (BLOCK, OWN_LINEAR))
    own = any(OWN_LINEAR.fullmatch(name) for name in tensors)
    return MedusaFile(path, "v0.1" if own else "v2", tensors, digest)


def _config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: is not a drafter folder, it has no config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}/config.json: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}/config.json: is not a mapping")
    return raw


def _load(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            tensors = dict(load_file(file))
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # both libraries raise types of their own, and torch's message advises what must not be done
        raise InputError(
            f"{file}: cannot be read as weights: it is damaged, or holds more than plain tensors"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{file}: is not a mapping from names to tensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{file}: tensor {name} holds values that are not finite")
    return tensors


def _refuse_unknown(tensors: Mapping[str, Tensor], file: Path, known: tuple[re.Pattern[str], ...]) -> None:
    for name in sorted(tensors):
        if name != SHARED_HEAD and not any(pattern.fullmatch(name) for pattern in known):
            raise InputError(f"{file}: unknown tensor {name}")


def _from_inside(path: Path) -> MedusaFile:
    """The heads among a model's own weights."""
    tensors: dict[str, Tensor] = {}
    files = Checkpoint(path).files
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(INSIDE)]  # noqa: SIM118
            tensors |= {name.removeprefix(INSIDE): handle.get_tensor(name) for name in names}
    _refuse_unknown(tensors, path, (BLOCK, OWN_LINEAR))
    return MedusaFile(path, "medusa-2", tensors, sha256_of_files(files))


def _from_vllm(path: Path, file: Path, tensors: Mapping[str, Tensor], digest: str) -> MedusaFile:
    """vLLM's names as v0.1's; the linear layers come behind the blocks."""
    plain = {name.removeprefix("medusa_heads."): tensor for name, tensor in tensors.items()}
    token_map = plain.pop("token_map", None)
    plain.pop("original_lm_head", None)
    _refuse_unknown(plain, file, (VLLM_BLOCK, VLLM_HEAD))
    found: dict[str, Tensor] = {}
    depth = 1 + max((int(m[2]) for m in map(VLLM_BLOCK.fullmatch, plain) if m), default=-1)
    for name, tensor in plain.items():
        if block := VLLM_BLOCK.fullmatch(name):
            found[f"{block[1]}.{block[2]}.linear.{block[3]}"] = tensor
        elif head := VLLM_HEAD.fullmatch(name):
            found[f"{head[1]}.{depth}.weight"] = tensor
        else:
            found[name] = tensor
    linears = [name for name in found if OWN_LINEAR.fullmatch(name)]
    if len(linears) == 1 and sum(name.endswith(".0.linear.weight") for name in found) > 1:
        found[SHARED_HEAD] = found.pop(linears[0])
    ids = None if token_map is None else tuple(token_map.tolist())
    return MedusaFile(path, "vllm", found, digest, ids)


def build_medusa(file: MedusaFile, target: Decoder) -> MedusaWeights:
    """The heads for `target`.

    Raises:
        InputError: made for another hidden size or vocabulary, or with a tensor missing.
    """
    width, vocab, left = target.config.hidden_size, target.config.vocab_size, dict(file.tensors)

    def take(name: str, *shape: int) -> Tensor:
        found = left.pop(name, None)
        if found is None:
            raise InputError(f"{file.path}: tensor {name} is missing")
        if tuple(found.shape) != shape or not found.is_floating_point():
            raise InputError(
                f"{file.path}: tensor {name} has shape {list(found.shape)}, expected {list(shape)}: it was made for "
                "another model"
            )
        return found.to(target.device, target.dtype)

    ids = _draft_vocabulary(file, vocab)
    size = vocab if ids is None else len(ids)
    heads = 1 + max((int(name.split(".")[0]) for name in left if name[0].isdigit()), default=-1)
    if heads < 1:
        raise InputError(f"{file.path}: holds no heads")
    depth = 1 + max((int(m[2]) for m in map(BLOCK.fullmatch, left) if m), default=-1)
    blocks = tuple(
        tuple(
            linear(
                take(f"{k}.{j}.linear.weight", width, width),
                take(f"{k}.{j}.linear.bias", width) if f"{k}.{j}.linear.bias" in left else None,
            )
            for j in range(depth)
        )
        for k in range(heads)
    )
    linears: tuple[Linear, ...]
    if SHARED_HEAD in left:
        linears = (linear(take(SHARED_HEAD, size, width)),)
    elif any(OWN_LINEAR.fullmatch(name) for name in left):
        linears = tuple(linear(take(f"{k}.{depth}.weight", size, width)) for k in range(heads))
    else:
        assert target.head is not None
        linears = (target.head if ids is None else linear(target.head.plain()[ids]),)
    if left:
        raise InputError(f"{file.path}: unknown tensor {min(left)} ({len(left)} in all)")
    return MedusaWeights(blocks, linears, ids)


def _draft_vocabulary(file: MedusaFile, vocab: int) -> Tensor | None:
    ids = file.draft_token_ids
    if ids is None:
        return None
    if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= vocab:
        raise InputError(f"{file.path}: the draft vocabulary must be different ids below {vocab}")
    return torch.tensor(ids)


def random_medusa(target: Decoder, num_heads: int, seed: int) -> MedusaFile:
    """Untrained heads: blocks drawn from N(0, 0.02²), in front of the target's own head."""
    width, generator = target.config.hidden_size, torch.Generator().manual_seed(seed)
    tensors = {}
    for k in range(num_heads):
        tensors[f"{k}.0.linear.weight"] = torch.randn(width, width, generator=generator) * 0.02
        tensors[f"{k}.0.linear.bias"] = torch.zeros(width)
    return MedusaFile(Path("random"), "v2", tensors, "", trained_tokens=0)


def write_medusa(file: MedusaFile, directory: Path, layout: Layout) -> Path:
    """Writes the heads in a layout that can hold them; reading gives the same tensors. Returns `directory`."""
    own = any(OWN_LINEAR.fullmatch(name) for name in file.tensors)
    shared = SHARED_HEAD in file.tensors
    fits = {"v0.1": own, "v2": not own and not shared, "vllm": own or shared, "spdbench": not own, "medusa-2": False}
    smaller = file.draft_token_ids is not None and layout not in ("vllm", "spdbench")
    if not fits[layout] or smaller:
        raise InputError(f"{file.path}: these heads cannot be written as {layout}")
    directory.mkdir(parents=True, exist_ok=True)
    heads = len({name.split(".")[0] for name in file.tensors if name[0].isdigit()})
    depth = len({name.split(".")[1] for name in file.tensors if BLOCK.fullmatch(name)})
    tensors = {name: tensor.contiguous() for name, tensor in file.tensors.items()}
    if layout == "vllm":
        _write_vllm(file, directory, tensors, heads, depth)
    elif layout == "spdbench":
        config = {"method": "medusa", "num_heads": heads, **file.extra}
        for key in ("draft_token_ids", "trained_tokens", "head_accuracies"):
            if value := getattr(file, key):
                config[key] = value
        save_file(tensors, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        config = {"medusa_num_heads": heads, "medusa_num_layers": depth}
        if layout == "v2":
            config["version"] = "2"
            save_file(tensors, directory / "medusa_lm_head.safetensors")
        else:
            torch.save(tensors, directory / "medusa_lm_head.pt")
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def _write_vllm(file: MedusaFile, directory: Path, tensors: dict[str, Tensor], heads: int, depth: int) -> None:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if block := BLOCK.fullmatch(name):
            renamed[f"blocks.{block[1]}.layers.{block[2]}.{block[3]}"] = tensor
        elif own := OWN_LINEAR.fullmatch(name):
            renamed[f"lm_heads.{own[1]}.weight"] = tensor
        else:
            renamed["lm_heads.0.weight"] = tensor
    if file.draft_token_ids is not None:
        renamed["token_map"] = torch.tensor(file.draft_token_ids)
    save_file(renamed, directory / "model.safetensors")
    with_bias = any(name.endswith("bias") for name in renamed)
    config = {"model_type": "medusa", "num_heads": heads, "num_hidden_layers": depth, "medusa_fc_bias": with_bias}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
