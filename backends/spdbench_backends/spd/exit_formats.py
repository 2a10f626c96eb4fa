"""PPSD's exit head on disk. The published code is not available (arXiv 2509.19368), so the format is our own:
decoder layers over stage 0's output, then a final norm and a head, by default the target's own.

    config.json         method, version, hidden_size, vocab_size, exit_layer, num_layers; model_sha256, num_stages,
                        stage_layers where stages are uneven, trained_tokens
    model.safetensors   layers.I.* as in a target's checkpoint; norm.weight and lm_head.weight if they are its own;
                        matrices may be in 8 bits
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from spdbench.decoding.sampling import DraftVocabulary
from spdbench.errors import InputError
from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, geometry_of
from spdbench.models.checkpoints.weights import Checkpoint, sha256_of_files
from spdbench.models.decoder import Decoder
from spdbench_backends.drafter_files.folder import (
    FOLDER_VERSION,
    DrafterConfig,
    DrafterFile,
    checked_config,
    read_config,
    read_tensors,
    require_version,
)
from spdbench_backends.drafter_files.tensors import TargetTensors, random_tensors, require_target
from spdbench_backends.spd.formats import MAX_LAYERS, drafter_decoder


class ExitConfig(DrafterConfig):
    """`exit_layer` is how many of the target's layers come before the head."""

    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    exit_layer: int = Field(ge=1)
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_stages: int | None = Field(None, ge=1)
    stage_layers: list[int] | None = None


ExitFile = DrafterFile[ExitConfig]


def read_exit(path: Path) -> ExitFile:
    """The head in a folder.

    Raises:
        InputError: it is no such folder, or damaged.
    """
    raw = read_config(path, "ppsd", ours_alone=True)
    if "method" not in raw:
        raise InputError(f"{path}: is not a PPSD drafter: its config names no method")
    require_version(path, raw, FOLDER_VERSION)
    files = Checkpoint(path).files
    config = checked_config(ExitConfig, raw, path)
    return ExitFile(path, "spdbench", config, read_tensors(files), sha256_of_files(files))


def random_exit(target: Decoder, stages: tuple[range, ...], seed: int) -> ExitFile:
    """An untrained head of one layer."""
    base = target.config
    config = ExitConfig(
        hidden_size=base.hidden_size, vocab_size=base.vocab_size, exit_layer=stages[0].stop, num_layers=1
    )
    return ExitFile(Path("random"), "spdbench", config, random_tensors(_exit_tensors(target, 1).required, seed))


def build_exit(file: ExitFile, target: Decoder, stages: tuple[range, ...]) -> Decoder:
    """The head as a decoder of its own layers alone, for `target` cut into `stages`.

    Raises:
        InputError: made for another target or another first stage, or damaged.
    """
    base, config = target.config, file.config
    require_target(
        file,
        ("config.hidden_size", config.hidden_size, base.hidden_size),
        ("config.vocab_size", config.vocab_size, base.vocab_size),
    )
    fitting = ": give ppsd.stages or ppsd.stage_layers that fit"
    require_target(file, ("config.exit_layer", config.exit_layer, stages[0].stop), remedy=fitting)
    tensors = TargetTensors(file, _exit_tensors(target, config.num_layers), target)
    decoder = drafter_decoder(tensors, target, "layers", config.num_layers, DraftVocabulary(target.config.vocab_size))
    return replace(decoder, final_norm=tensors.norm("norm.weight") or target.final_norm)


def _exit_tensors(target: Decoder, num_layers: int) -> ExpectedTensors:
    base, expected = target.config, ExpectedTensors()
    for index in range(num_layers):
        expected.add_layer(f"layers.{index}.", geometry_of(base), base.hidden_size, base.intermediate_size)
    expected.add({"norm.weight": (base.hidden_size,)}, optional=True)
    expected.add({"lm_head.weight": (base.vocab_size, base.hidden_size)}, optional=True)
    return expected
