"""A model of transformers of which only a range of layers computes.

The model's list of layers is replaced by copies of its layers whose `forward` is another one; the weights are shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn


class LayerRange:
    """A module of which only `layers` compute. Those before them pass on the rows given to `run`."""

    def __init__(self, module: nn.Module, path: str, layers: range, tuple_size: int) -> None:
        self._layers = layers
        self._tuple_size = tuple_size
        self._rows_1SM = torch.empty(0)
        self._hidden_indices: frozenset[int] = frozenset()
        self._states: dict[int, Tensor] = {}
        originals = cast(nn.ModuleList, module.get_submodule(path))
        listed = [self._entry(index, originals[index]) for index in range(max(layers.stop, 1))]
        self._module = _with_submodule(module, path.split("."), nn.ModuleList(listed))

    def run(
        self, embeds_1SE: Tensor, rows_1SM: Tensor, hidden_indices: Collection[int], **kwargs: Any
    ) -> tuple[Any, dict[int, Tensor]]:
        """The module's own output, and the hidden states asked for, each `[S, M]`."""
        self._rows_1SM, self._hidden_indices = rows_1SM, frozenset(hidden_indices)
        try:
            return self._module(inputs_embeds=embeds_1SE, **kwargs), self._states
        finally:
            self._rows_1SM, self._states = torch.empty(0), {}

    def _entry(self, index: int, layer: nn.Module) -> nn.Module:
        """A layer with another `forward` and the same attributes, which models may read."""
        entry = copy.copy(layer)
        entry.forward = partial(self._compute, index, layer.forward) if index in self._layers else self._pass_on
        return entry

    def _compute(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if index + 1 in self._hidden_indices:
            self._states[index + 1] = (found[0] if self._tuple_size else found)[0]
        return found

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002 - the arguments of any layer
        if self._tuple_size:
            return (self._rows_1SM, *[None] * (self._tuple_size - 1))
        return self._rows_1SM


def _with_submodule(module: nn.Module, names: Sequence[str], new: nn.Module) -> nn.Module:
    """A copy of `module` that shares everything with it except the submodule called `names`."""
    first, *rest = names
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    copied._modules[first] = _with_submodule(module.get_submodule(first), rest, new) if rest else new
    return copied
