"""Stands for a model that only its server has: a name, and nothing that could be loaded."""

from __future__ import annotations

from pathlib import Path

from spdbench.errors import InputError
from spdbench.models.checkpoints.config import Sizes
from spdbench.models.checkpoints.find_model import ModelFiles
from spdbench.models.interface import TargetDecoder
from spdbench.models.target import Target

NOT_KNOWN = "unknown"
ENDLESS = 2**31
"""Tokens of context: the server knows how many it has, and says so when they do not suffice."""


class RemoteTarget(Target):
    """A target whose weights, tokenizer and sizes nobody here knows."""

    def __init__(self, name: str) -> None:
        self.files = ModelFiles(name, Path("/nonexistent"), f"unknown, served as {name}")
        self.dtype_name = NOT_KNOWN
        self.unknown = None
        self.config = Sizes(NOT_KNOWN, 0, 0, 0, ENDLESS, frozenset())

    tokenizer = None

    @property
    def decoder(self) -> TargetDecoder:
        raise InputError(f"-m: {self.files.id} is with its server alone; name the same model with -m to load it here")
