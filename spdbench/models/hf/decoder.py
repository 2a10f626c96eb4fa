"""The target's forward pass by layer range, computed by a model of transformers: for what our own layers do not know.

The model's own code runs as it is; only its list of layers is another one, in which those ahead of a range do nothing
but hand on the rows that the range begins with. What the model does before its first layer and after its last is thus
its own affair. Nothing is taken on trust: a model is used once it was seen to give layer by layer, in pieces and after
rollbacks the logits that it gives by itself. Must not know any architecture, nor import transformers.

Shapes: S rows, M model width, E embedding width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spdbench.models.attention_context import TreeRows
from spdbench.models.checkpoints.config import Sizes

NewSlots = Callable[[range], tuple[Any, list[Any]]]
"""An empty cache for a model of which only a range of layers runs, and these layers' slots in it, which know
`get_seq_length()` and, for what they forget, `crop(-n)`."""

CHECK_PIECES = ((0, 5), (5, 6), (6, 7), (7, 11), (11, 14))
SAME_OPERATIONS = 1e-3
"""Largest relative difference of logits that come from the same operations; the order of a sum is all that may vary."""


class SplitError(Exception):
    """The model's layers cannot be run range by range; says how that showed."""


class HFCache:
    """Keys and values of a range of layers, kept by transformers; room for `capacity` tokens."""

    def __init__(self, capacity: int, content: Any, slots: list[Any]) -> None:
        self.capacity = capacity
        self.content = content
        self._slots = slots

    @property
    def length(self) -> int:
        return int(self._slots[0].get_seq_length())

    def mark(self) -> int:
        """A place to roll back to."""
        return self.length

    def rollback(self, mark: int) -> None:
        """Forgets every token from `mark` on; a no-op where fewer are there."""
        surplus = self.length - mark
        if surplus > 0:
            for slot in self._slots:
                slot.crop(-surplus)

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        """Of the tokens from `mark` on keeps the first few: there are no trees here, so none has moved."""
        if list(chosen) != list(range(len(chosen))):
            raise NotImplementedError("transformers' caches keep no branch of a tree")
        self.rollback(mark + len(chosen))


class _Part:
    """A module of which only `layers` are at work. The others ahead of them hand on the rows given to `run`."""

    def __init__(self, module: nn.Module, path: str, layers: range, tuple_size: int) -> None:
        self._layers = layers
        self._tuple_size = tuple_size
        self._rows_1SM = torch.empty(0)
        self._wanted: frozenset[int] = frozenset()
        self._states: dict[int, Tensor] = {}
        originals = cast(nn.ModuleList, module.get_submodule(path))
        listed = [self._entry(index, originals[index]) for index in range(max(layers.stop, 1))]
        self._module = _with_submodule(module, path.split("."), nn.ModuleList(listed))

    def run(
        self, embeds_1SE: Tensor, rows_1SM: Tensor, hidden_indices: Collection[int], **more: Any
    ) -> tuple[Any, dict[int, Tensor]]:
        """The module's own output, and the hidden states asked for, each `[S, M]`."""
        self._rows_1SM, self._wanted = rows_1SM, frozenset(hidden_indices)
        try:
            return self._module(inputs_embeds=embeds_1SE, **more), self._states
        finally:
            self._rows_1SM, self._states = torch.empty(0), {}

    def _entry(self, index: int, layer: nn.Module) -> nn.Module:
        """A layer with the same attributes and another `forward`, as models read attributes of their layers."""
        entry = copy.copy(layer)
        entry.forward = partial(self._compute, index, layer.forward) if index in self._layers else self._hand_on
        return entry

    def _compute(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if index + 1 in self._wanted:
            self._states[index + 1] = (found[0] if self._tuple_size else found)[0]
        return found

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002 - whatever the layer would be given
        if self._tuple_size:
            return (self._rows_1SM, *[None] * (self._tuple_size - 1))
        return self._rows_1SM


@dataclass(frozen=True)
class HFDecoder:
    """The layers `layers` of `model`, whose list of layers is at `path` in its base.

    `tuple_size` is what a layer returns: 0 for a tensor, else that many things, the hidden states first.
    """

    config: Sizes
    layers: range
    model: Any
    path: str
    tuple_size: int
    new_slots: NewSlots
    dtype: torch.dtype
    device: torch.device
    _parts: dict[range, _Part] = field(default_factory=dict, repr=False)

    @property
    def kernels(self) -> str:
        return "transformers"

    @property
    def takes_trees(self) -> bool:
        return False

    def embed(self, ids_S: Tensor) -> Tensor:
        """The tokens' embeddings: `[S, E]`. What else the model does ahead of its first layer is done in `forward`."""
        assert self.layers.start == 0
        return cast(Tensor, self.model.get_input_embeddings()(ids_S[None])[0])

    def forward(
        self,
        hidden_SM: Tensor,
        start: int,
        cache: HFCache,
        layers: range | None = None,
        hidden_indices: Collection[int] = (),
        tree: TreeRows | None = None,
        cancelled: Callable[[], bool] | None = None,  # noqa: ARG002 - a pass is all of transformers' own
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Rows at positions `start`, `start` + 1, ... through `layers` (all by default); no `tree`.

        Returns the last layer's output `[S, M]` and the hidden states asked for in `hidden_indices`, by index; index 0
        is taken as given when the range begins at layer 0. The new rows are valid in `cache` afterwards.
        """
        if tree is not None:
            raise NotImplementedError("transformers' layers take no trees")
        layers = self.layers if layers is None else layers
        end = start + hidden_SM.shape[0]
        if start != cache.length or end > cache.capacity:
            raise IndexError(f"positions {start} to {end} do not fit a cache of {cache.length}/{cache.capacity} tokens")
        rows_1SM = hidden_SM[None]
        embeds_1SE = rows_1SM if layers.start == 0 else self._no_embeds(len(hidden_SM))
        part = self._part(layers)
        _, states = part.run(
            embeds_1SE, rows_1SM, {*hidden_indices, layers.stop}, past_key_values=cache.content, use_cache=True
        )
        last_SM = states[layers.stop] if layers.stop in hidden_indices else states.pop(layers.stop)
        return last_SM, {0: hidden_SM, **states} if layers.start == 0 and 0 in hidden_indices else states

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """Next-token logits `[S, V]` of the last layer's output, by all that the model does behind it."""
        assert self.layers.stop == self.config.num_layers
        embeds_1SE = self._no_embeds(len(hidden_SM))
        output, _ = self._part(range(0)).run(embeds_1SE, hidden_SM[None], (), use_cache=False)
        return cast(Tensor, output.logits[0])

    def ids(self, token_ids: Collection[int]) -> Tensor:
        """Token ids as a tensor where the embedding lives: `[S]`."""
        return torch.tensor(list(token_ids), dtype=torch.long, device=self.device)

    def new_cache(self, capacity: int, layers: range | None = None) -> HFCache:
        """An empty cache for `layers` (all by default) with room for `capacity` tokens."""
        return HFCache(capacity, *self.new_slots(self.layers if layers is None else layers))

    def bytes_per_token(self, layers: range, head: bool) -> int:
        """Bytes of weights that one token's forward through `layers` reads; with `head`, what follows them too."""
        listed = self.model.base_model.get_submodule(self.path)
        per_token = getattr(self.model.config.get_text_config(decoder=True), "num_experts_per_tok", None)
        total = sum(_bytes_read(listed[index], per_token) for index in layers)
        return total + (_bytes_outside(self.model, listed) if head else 0)

    def _part(self, layers: range) -> _Part:
        """The base with `layers` at work; for no layers at all the model, head included."""
        if layers not in self._parts:
            base, prefix = self.model.base_model, self.model.base_model_prefix
            module, path = (base, self.path) if layers or base is self.model else (self.model, f"{prefix}.{self.path}")
            self._parts[layers] = _Part(module, path, layers, self.tuple_size)
        return self._parts[layers]

    def _no_embeds(self, num_rows: int) -> Tensor:
        """Embeddings `[1, S, E]` for a model to look at the shape of; what it makes of them goes nowhere."""
        width = self.model.get_input_embeddings().weight.shape[-1]
        return torch.zeros(1, num_rows, width, dtype=self.dtype, device=self.device)


def split_model(
    model: Any,
    config: Sizes,
    new_slots: NewSlots,
    dtype: torch.dtype,
    device: torch.device,
    layers: range | None = None,
) -> HFDecoder:
    """A decoder of the model's layers; if `layers` are given, of just these, and the model loses the others' weights.

    Raises:
        SplitError: the model has no list of layers, or does not give its own logits through it.
    """
    everything = range(config.num_layers)
    ids = [(7 + 31 * i) % config.vocab_size for i in range(min(CHECK_PIECES[-1][1], config.max_positions))]
    try:
        path = _path_to_layers(model, config.num_layers)
        with torch.no_grad():
            expected_SV, tuple_size = _own_logits(model, path, torch.tensor([ids], device=device))
            decoder = HFDecoder(config, everything, model, path, tuple_size, new_slots, dtype, device)
            whole_SV = _read(decoder, ids, [everything])
            split_SV = _read(decoder, ids, [range(layer, layer + 1) for layer in everything])
    except (SplitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code, called in a way that it may not be made for
        raise SplitError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    _require_alike(whole_SV, split_SV, expected_SV)
    if layers is None:
        return decoder
    _drop_all_but(model, path, layers)
    return replace(decoder, layers=layers, _parts={})


def _path_to_layers(model: Any, num_layers: int) -> str:
    """Where in the model's base its list of layers is."""
    found = [
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and not any(part.isdigit() for part in name.split("."))  # a list of experts, say, inside a layer
    ]
    if len(found) != 1:
        raise SplitError(f"it has {len(found)} lists of {num_layers} layers")
    return str(found[0])


def _own_logits(model: Any, path: str, ids_1S: Tensor) -> tuple[Tensor, int]:
    """What the model gives by itself, `[S, V]`, and how many things a layer of it returns, 0 for just a tensor."""
    returned: list[Any] = []
    layer = model.base_model.get_submodule(path)[0]
    hook = layer.register_forward_hook(lambda _module, _args, output: returned.append(output))
    try:
        logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0]
    finally:
        hook.remove()
    if len(returned) != 1:
        raise SplitError("it does not call its layers once each")
    if bool(logits_SV.isnan().any()):
        raise SplitError(f"its logits are not numbers in {logits_SV.dtype}")
    return logits_SV, len(returned[0]) if isinstance(returned[0], tuple) else 0


def _read(decoder: HFDecoder, ids: Sequence[int], ranges: Sequence[range]) -> Tensor:
    """Logits `[S, V]` of `ids`, read in pieces; behind each piece something else was read and forgotten before."""
    caches = [decoder.new_cache(2 * len(ids), layers) for layers in ranges]

    def through(some: Sequence[int]) -> Tensor:
        hidden_SM = decoder.embed(decoder.ids(some))
        for layers, cache in zip(ranges, caches, strict=True):
            hidden_SM, _ = decoder.forward(hidden_SM, cache.length, cache, layers)
        return hidden_SM

    rows = []
    for start, stop in CHECK_PIECES:
        if piece := ids[start:stop]:
            if start:
                through(ids[start - 1 : start - 1 + min(2, len(ids) - start)])
                for cache in caches:
                    cache.rollback(start)
            rows.append(through(piece))
    return decoder.logits(torch.cat(rows))


def _require_alike(whole_SV: Tensor, split_SV: Tensor, expected_SV: Tensor) -> None:
    """Raises `SplitError` for logits that are not the model's own.

    Layer by layer the operations are the same as with all layers at once, whatever the precision. Compared with one
    forward of all tokens they are not, and in low precision a single row may then differ by as much as an expert's
    worth; most rows may not.
    """
    layerwise_S = _relative_difference(split_SV, whole_SV)
    if not bool((layerwise_S <= SAME_OPERATIONS).all()):
        raise SplitError(f"layer by layer its logits are off by {float(layerwise_S.max()):.1%}")
    piecewise_S = _relative_difference(whole_SV, expected_SV)
    worst = piecewise_S.max() if expected_SV.dtype == torch.float32 else piecewise_S.median()
    if not bool(worst <= torch.finfo(expected_SV.dtype).eps ** 0.5):
        raise SplitError(f"token by token its logits are off by {float(worst):.1%}")


def _relative_difference(found_SV: Tensor, expected_SV: Tensor) -> Tensor:
    """Of each row: `[S]`."""
    difference_S = (found_SV.float() - expected_SV.float()).norm(dim=-1)
    return cast(Tensor, difference_S / expected_SV.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny))


def _with_submodule(module: nn.Module, names: Sequence[str], new: nn.Module) -> nn.Module:
    """A copy of `module` that shares all with it but the submodule called `names`."""
    first, *rest = names
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    copied._modules[first] = _with_submodule(module.get_submodule(first), rest, new) if rest else new
    return copied


def _drop_all_but(model: Any, path: str, layers: range) -> None:
    """Frees the weights of the other layers, and those of embedding and head where `layers` do not need them."""
    listed = model.base_model.get_submodule(path)
    for index in range(len(listed)):
        if index not in layers:
            listed[index] = _without_memory(listed[index])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if layers.start > 0:
        model.set_input_embeddings(_without_memory(embedding))
    if layers.stop < len(listed) and head is not None:
        model.set_output_embeddings(_without_memory(head))


def _without_memory(module: nn.Module) -> nn.Module:
    """The module's shapes and attributes without its numbers."""
    return copy.deepcopy(module).to("meta")


def _bytes_read(layer: nn.Module, experts_per_token: int | None) -> int:
    """A layer's bytes, but of its experts only the share that a token is routed to."""
    total = _nbytes(layer)
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] == "experts" and experts_per_token is not None:
            count = len(module) if isinstance(module, nn.ModuleList) else next(module.parameters()).shape[0]
            total -= round(_nbytes(module) * max(0.0, 1 - experts_per_token / count))
    return total


def _bytes_outside(model: Any, listed: nn.Module) -> int:
    """Bytes of what follows the layers: all that is neither theirs nor an embedding in which a row is looked up."""
    head = model.get_output_embeddings()
    spared = {id(weight) for weight in listed.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight):
            spared.add(id(module.weight))
    return sum(weight.nbytes for weight in model.parameters() if id(weight) not in spared)


def _nbytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
