"""PPSD's exit head: decoder layers over stage 0's output, then a final norm and a head, by default the target's own.

    config.json         method, version, hidden_size, vocab_size, exit_layer, num_layers; model_sha256, num_stages,
                        trained_tokens
    model.safetensors   layers.I.* as in a target's checkpoint; norm.weight and lm_head.weight if they are its own;
                        matrices may be in 8 bits, as `packing` has them

Source: METHODS.md, section C; the published code is not available, so the format is our own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from spdbench.errors import InputError, validated
from spdbench.models.checkpoints.weights import sha256_of_files
from spdbench.models.cpu.linear import linear
from spdbench.models.decoder import Decoder
from spdbench.models.layer_ops import NormWeight
from spdbench_backends.drafter_files import load_tensors, read_config, require_version
from spdbench_backends.packing import unpacked
from spdbench_backends.spd.tensors import TensorTaker, dense_layer, layer_shapes, random_tensors

HEAD_NORM = "layers.0.self_attn.q_norm.weight"


class ExitConfig(BaseModel):
    """What a folder says of its head. `exit_layer` is how many of the target's layers come before it."""

    model_config = ConfigDict(strict=True, frozen=True)

    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    exit_layer: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_stages: int | None = Field(None, ge=1)
    trained_tokens: int | None = Field(None, ge=0)


@dataclass(frozen=True)
class ExitFile:
    """A head as read, still without a target."""

    path: Path
    config: ExitConfig
    tensors: dict[str, Tensor]
    sha256: str


def read_exit(path: Path) -> ExitFile:
    """The head in a folder.

    Raises:
        InputError: it is no such folder, or damaged.
    """
    config = read_config(path)
    if config.get("method") != "ppsd":
        raise InputError(f"{path}: is not a PPSD drafter: config.method is {config.get('method')!r}, expected 'ppsd'")
    require_version(path, config)
    file = path / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{path}: is not a drafter folder, it has no {file.name}")
    checked = validated(ExitConfig, config, f"{path}: config.")
    return ExitFile(path, checked, unpacked(load_tensors(file)), sha256_of_files([file]))


def random_exit(target: Decoder, stages: tuple[range, ...], seed: int) -> ExitFile:
    """An untrained head of one layer."""
    config = ExitConfig(
        hidden_size=target.config.hidden_size,
        vocab_size=target.config.vocab_size,
        exit_layer=stages[0].stop,
        num_layers=1,
    )
    shapes = layer_shapes(target, "layers.0.", head_norms=False)
    return ExitFile(Path("random"), config, random_tensors(shapes, seed), "")


def build_exit(file: ExitFile, target: Decoder, stages: tuple[range, ...]) -> Decoder:
    """The head as a decoder of its own layers alone, for `target` cut into `stages`.

    Raises:
        InputError: made for another target or another first stage, or damaged.
    """
    base, config = target.config, file.config
    for key, found, expected in (
        ("hidden_size", config.hidden_size, base.hidden_size),
        ("vocab_size", config.vocab_size, base.vocab_size),
        ("exit_layer", config.exit_layer, stages[0].stop),
    ):
        if found != expected:
            mend = "give ppsd.stages or ppsd.stage_layers that fit" if key == "exit_layer" else "made for another model"
            raise InputError(f"{file.path}: config.{key} is {found}, but here it is {expected}: {mend}")
    take = TensorTaker(file.path, file.tensors, target)
    normed = HEAD_NORM in file.tensors
    layers = {i: dense_layer(take, target, f"layers.{i}.", head_norms=normed) for i in range(config.num_layers)}
    norm = take.optional("norm.weight", base.hidden_size)
    head = take.optional("lm_head.weight", base.vocab_size, base.hidden_size)
    take.refuse_leftovers()
    return replace(
        target,
        layers=range(config.num_layers),
        weights=layers,
        embeddings_VM=None,
        final_norm=target.final_norm if norm is None else NormWeight(norm),
        head=target.head if head is None else linear(head),
    )
