"""The target model of a run: one object that all backends share; tokenizer and weights are loaded on first use."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from spdbench.errors import InputError, brief
from spdbench.models.checkpoints.config import (
    FAMILIES,
    ForeignModelError,
    ModelConfig,
    Sizes,
    model_config,
    read_raw_config,
    sizes,
)
from spdbench.models.checkpoints.facts_cache import cached_facts
from spdbench.models.checkpoints.fast_tokenizer import FastTokenizer, TokenizerFacts
from spdbench.models.checkpoints.find_model import ModelFiles, find_model
from spdbench.models.checkpoints.weights import Checkpoint
from spdbench.models.decoder import Decoder
from spdbench.models.hf import library
from spdbench.models.hf.decoder import HFDecoder, SplitError, split_model
from spdbench.models.hf.ends import EndsError, shared_ends
from spdbench.models.interface import TargetDecoder
from spdbench.models.load_decoder import NO_PART, load_decoder

Frequencies = tuple[tuple[float, ...], float]
"""Inverse frequencies of rotary positions, and the factor on cos and sin."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class LayerSource:
    """Where a target's layers come from, as plain data that can be sent to another process. `config` and `frequencies`
    are None where transformers' layers are used."""

    files: ModelFiles
    dtype: str
    config: ModelConfig | None
    frequencies: Frequencies | None

    def load(self, layers: range | None, device: str, head_ids: range | None = None) -> TargetDecoder:
        """The layers `layers` (all by default), read straight from the files, with embedding and head where they
        belong; of the head only the token ids `head_ids`, if these are given."""
        if self.config is None or self.frequencies is None:
            return Target(self.files, self.dtype, device).load_layers(layers)
        inverse, factor = self.frequencies
        with closing(Checkpoint(self.files.directory)) as checkpoint:
            decoder = load_decoder(
                checkpoint,
                self.config,
                (torch.tensor(inverse), factor),
                DTYPES[self.dtype],
                find_device(device),
                layers,
            )
        return decoder if head_ids is None else decoder.with_head_of(head_ids)


class Target:
    """A causal language model on `device` in `dtype`.

    `unsupported_reason` says what in it our own layers do not support, so that transformers' layers are used; None
    where ours are."""

    def __init__(self, files: ModelFiles, dtype: str, device: str) -> None:
        self.files = files
        self.dtype_name = dtype
        self.dtype = DTYPES[dtype]
        self.device = find_device(device)
        self._family = read_raw_config(files.directory)["model_type"]
        self._known: ModelConfig | None = None
        self.unsupported_reason: str | None = None
        self._frequencies: Frequencies | None = None
        try:
            facts = cached_facts(files.directory, "config", tuple[ModelConfig, Frequencies], self._own_config)
            assert facts is not None
            self._known, self._frequencies = facts
        except ForeignModelError as reason:
            library.require_causal(files.directory, self._standard)
            self.unsupported_reason = str(reason)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:  # values of other types
            raise InputError(f"{files.directory}/config.json: cannot be used ({brief(error)})") from None
        self.config: Sizes = self._known or sizes(files.directory, self._standard)

    def _own_config(self) -> tuple[ModelConfig, Frequencies]:
        """What our own layers need to know. Raises `ForeignModelError` where they do not support the model."""
        config = model_config(self.files.directory, self._standard)
        text = self._standard.get_text_config(decoder=True)
        inverse, factor = library.rotary_frequencies(text, config.head_dim, config.rotary_dim)
        return config, (tuple(inverse.tolist()), factor)

    @cached_property
    def _standard(self) -> Any:
        """transformers' config of the model."""
        return library.standard_config(self.files.directory, self._family)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with the part of transformers' interface that `prompts.chat` uses."""
        directory = self.files.directory
        facts = cached_facts(directory, "tokenizer", TokenizerFacts, lambda: library.tokenizer_facts(directory))
        return library.load_tokenizer(directory) if facts is None else FastTokenizer(facts)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every end-of-sequence id that a file of the model names: its settings, and the tokenizer's, which may be the
        only one to name the token that ends a turn."""
        named = self.tokenizer.eos_token_id
        return self.config.eos_ids | ({named} if isinstance(named, int) and named < self.config.vocab_size else set())

    @cached_property
    def decoder(self) -> TargetDecoder:
        """All layers, loaded once."""
        return self.load_layers()

    @property
    def own_decoder(self) -> Decoder:
        """`decoder`, for what needs our own layers.

        Raises:
            InputError: this model runs on transformers' layers.
        """
        decoder = self.decoder
        if not isinstance(decoder, Decoder):
            raise InputError(
                f"{self.files.id}: spdbench's own layers do not know this model ({self.unsupported_reason})"
            )
        return decoder

    @cached_property
    def ends(self) -> Decoder:
        """What drafters share of the model, its embedding, final norm and head: `decoder` itself where its layers are
        ours, else a decoder without layers.

        Raises:
            InputError: the model runs on transformers' layers, and its ends are of another kind than ours.
        """
        decoder = self.decoder
        if isinstance(decoder, Decoder):
            return decoder
        assert isinstance(decoder, HFDecoder)
        try:
            return shared_ends(decoder, self.files.directory)
        except EndsError as why:
            raise InputError(
                f"{self.files.id}: drafters share embedding, final norm and output head with the model, and those of "
                f"{self.unsupported_reason} cannot be shared ({why}). Use `-b ngram`, `suffix` or `recycling`, a "
                "smaller model (`-b draft_model`), or --drafter oracle:P."
            ) from None

    @property
    def source(self) -> LayerSource:
        """What a process needs to load layers of its own."""
        return LayerSource(self.files, self.dtype_name, self._known, self._frequencies)

    def load_layers(self, layers: range | None = None) -> TargetDecoder:
        """A new decoder for `layers` (all by default), read straight from the files.

        Raises:
            InputError: the weights do not fit the config, or transformers' layers cannot replace ours.
        """
        if self._known is None:
            return self._load_standard(layers)
        return self.source.load(layers, str(self.device))

    def load_for_generation(self) -> Any:
        """transformers' own model, for its own `generate`: a copy in addition to `decoder`."""
        self._check_weights()
        library.require_causal(self.files.directory, self._standard)
        return library.for_generation(
            library.load_causal_model(self.files.directory, self._standard, self.dtype, self.device)
        )

    def _load_standard(self, layers: range | None) -> HFDecoder:
        directory = self.files.directory
        self._check_weights()
        model = library.load_causal_model(directory, self._standard, self.dtype, self.device)
        try:
            with library.quiet():
                return split_model(model, self.config, library.range_cache, self.dtype, self.device, layers)
        except SplitError as why:
            raise InputError(
                f"{directory}: {self.unsupported_reason} is not supported: spdbench's own layers do not know it, and "
                f"transformers' cannot be run stage by stage ({why}). Fully supported: {', '.join(FAMILIES)}."
            ) from None

    def _check_weights(self) -> None:
        """Refuses weights that transformers would have to guess at, before it builds the model."""
        with closing(Checkpoint(self.files.directory)) as checkpoint:
            checkpoint.refuse_quantised()
            if (count := sum(1 for _ in checkpoint)) < self.config.num_layers:
                raise InputError(
                    f"{self.files.directory}/config.json: num_hidden_layers is {self.config.num_layers}, but there are "
                    f"only {count} tensors of weights"
                )

    @cached_property
    def num_parameters(self) -> int:
        with closing(Checkpoint(self.files.directory)) as checkpoint:
            return checkpoint.num_parameters(without=NO_PART)

    @property
    def num_bytes(self) -> int:
        """All parameters in the run's dtype."""
        return self.num_parameters * self.dtype.itemsize


def load_target(model: str, dtype: str, device: str) -> Target:
    """The target called `model`; its weights are loaded when they are needed.

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
    if name == "cpu":
        return torch.device("cpu")
    if not (parts := re.fullmatch("cuda(?::([0-9]{1,4}))?", name)):
        raise InputError(f"--devices {name}: not a device. Allowed: cpu, cuda:0, cuda:1, ...")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(parts[1] or 0)
    if index >= count:
        available = f"cuda:0 to cuda:{count - 1}" if count else "no GPU that torch can use"
        raise InputError(f"--devices {name}: this machine has {available}. Allowed: cpu{', cuda:N' if count else ''}.")
    return torch.device("cuda", index)
