"""The target model of a run: one object that all backends share; tokenizer and weights load at the first touch."""

from __future__ import annotations

from contextlib import closing
from functools import cached_property
from typing import Any

import torch

from spdbench.errors import InputError
from spdbench.models import hf
from spdbench.models.checkpoint import Checkpoint
from spdbench.models.config import ModelConfig, model_config, read_raw_config
from spdbench.models.decoder import Decoder, load_decoder
from spdbench.models.load import ModelFiles, find_model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class Target:
    """A causal language model, greedy ids and logits on `device` in `dtype`."""

    def __init__(self, files: ModelFiles, dtype: str, device: str) -> None:
        self.files = files
        self.dtype_name = dtype
        self.dtype = DTYPES[dtype]
        self.device = find_device(device)
        read_raw_config(files.directory)
        self._standard = hf.standard_config(files.directory)
        self.config: ModelConfig = model_config(files.directory, self._standard)

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the model."""
        return hf.load_tokenizer(self.files.directory)

    @cached_property
    def decoder(self) -> Decoder:
        """All layers, loaded once."""
        return self.load_layers()

    def load_layers(self, layers: range | None = None) -> Decoder:
        """A decoder of its own for `layers`, read straight from the files."""
        frequencies = hf.rotary_frequencies(self._standard, self.config.head_dim)
        with closing(Checkpoint(self.files.directory)) as checkpoint:
            return load_decoder(checkpoint, self.config, frequencies, self.dtype, self.device, layers)

    @cached_property
    def num_parameters(self) -> int:
        with closing(Checkpoint(self.files.directory)) as checkpoint:
            return checkpoint.num_parameters()

    @property
    def num_bytes(self) -> int:
        """All parameters in the run's dtype."""
        return self.num_parameters * self.dtype.itemsize


def load_target(model: str, dtype: str, device: str) -> Target:
    """The target called `model`; its weights stay on disk until they are needed.

    Raises:
        InputError: no such model, dtype or device, or an architecture that is not supported.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: not supported. Allowed: {', '.join(DTYPES)}.")
    find_device(device)
    return Target(find_model(model), dtype, device)


def find_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`, checked against what this machine has.

    Raises:
        InputError: the name is none of these, or there is no such GPU.
    """
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdigit()):
        raise InputError(f"--devices {name}: not a device. Allowed: cpu, cuda:0, cuda:1, ...")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "no GPU that torch can use"
        raise InputError(f"--devices {name}: this machine has {there}. Allowed: cpu{', cuda:N' if count else ''}.")
    return torch.device("cuda", int(index or 0))
