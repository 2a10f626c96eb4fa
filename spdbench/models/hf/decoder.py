"""The target's forward pass by layer range, computed by a model of transformers: for architectures that our own layers
do not support.

The model's own code runs unchanged; only its list of layers is replaced by one in which the layers before a range pass
on the rows that the range begins with. So what the model does before its first layer and after its last stays its own,
and no architecture is known here. A model is used only after a check: layer by layer, in pieces and after rollbacks it
has to give the logits that it gives by itself.

Shapes: S rows, M model width, E embedding width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spdbench.errors import brief
from spdbench.models.attention_context import TreeRows
from spdbench.models.checkpoints.config import Sizes
from spdbench.models.hf.layer_range import LayerRange

NewSlots = Callable[[range], tuple[Any, list[Any]]]
"""An empty cache for a model of which only a range of layers runs, and these layers' entries in it, which have
`get_seq_length()` and `crop(-n)`."""

CHECK_PIECES = ((0, 5), (5, 6), (6, 7), (7, 11), (11, 14))
SAME_OPERATIONS = 1e-3
"""Largest relative difference of logits that come from the same operations, where only the order of a sum may vary."""


class SplitError(Exception):
    """The model's layers cannot be run range by range; the message says what showed it."""


class HFCache:
    """Keys and values of a range of layers in transformers' cache; room for `capacity` tokens."""

    def __init__(self, capacity: int, content: Any, slots: list[Any]) -> None:
        self.capacity = capacity
        self.content = content
        self._slots = slots

    @property
    def length(self) -> int:
        return int(self._slots[0].get_seq_length())

    def rollback(self, mark: int) -> None:
        """Forgets every token from `mark` on; does nothing where fewer are valid."""
        surplus = self.length - mark
        if surplus > 0:
            for slot in self._slots:
                slot.crop(-surplus)

    def keep(self, mark: int, chosen: Sequence[int]) -> None:
        """Keeps of the tokens from `mark` on the first few: without trees, none has to be moved."""
        if list(chosen) != list(range(len(chosen))):
            raise NotImplementedError("transformers' caches keep no branch of a tree")
        self.rollback(mark + len(chosen))


@dataclass(frozen=True, eq=False)
class HFDecoder:
    """The layers `layers` of `model`, whose list of layers is at `path` in its base.

    `tuple_size` is how many values a layer returns, the hidden states first; 0 for a plain tensor.
    """

    config: Sizes
    layers: range
    model: Any
    path: str
    tuple_size: int
    new_slots: NewSlots
    dtype: torch.dtype
    device: torch.device
    _ranges: dict[range, LayerRange] = field(default_factory=dict, repr=False)

    @property
    def kernels(self) -> str:
        return "transformers"

    @property
    def takes_trees(self) -> bool:
        return False

    def embed(self, ids_S: Tensor) -> Tensor:
        """The tokens' embeddings: `[S, E]`. What else the model does before its first layer is done in `forward`."""
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
        cancelled: Callable[[], bool] | None = None,  # noqa: ARG002 - transformers runs the whole pass
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
        layer_range = self._layer_range(layers)
        _, states = layer_range.run(
            embeds_1SE, rows_1SM, {*hidden_indices, layers.stop}, past_key_values=cache.content, use_cache=True
        )
        last_SM = states[layers.stop] if layers.stop in hidden_indices else states.pop(layers.stop)
        return last_SM, {0: hidden_SM, **states} if layers.start == 0 and 0 in hidden_indices else states

    def logits(self, hidden_SM: Tensor) -> Tensor:
        """Next-token logits `[S, V]` of the last layer's output, by all that the model does after its layers."""
        assert self.layers.stop == self.config.num_layers
        embeds_1SE = self._no_embeds(len(hidden_SM))
        output, _ = self._layer_range(range(0)).run(embeds_1SE, hidden_SM[None], (), use_cache=False)
        return cast(Tensor, output.logits[0])

    def ids(self, token_ids: Collection[int]) -> Tensor:
        """Token ids as a tensor on the embedding's device: `[S]`."""
        return torch.tensor(list(token_ids), dtype=torch.long, device=self.device)

    def new_cache(self, capacity: int, layers: range | None = None, num_snapshots: int = 0) -> HFCache:  # noqa: ARG002
        """An empty cache for `layers` (all by default) with room for `capacity` tokens."""
        return HFCache(capacity, *self.new_slots(self.layers if layers is None else layers))

    def snapshot_bytes(self, layers: range) -> int:  # noqa: ARG002 - models with recurrent layers are refused
        return 0

    def bytes_per_token(self, layers: range, head: bool) -> int:
        """Bytes of weights that one token's forward through `layers` reads; with `head`, what follows them too."""
        listed = self.model.base_model.get_submodule(self.path)
        per_token = getattr(self.model.config.get_text_config(decoder=True), "num_experts_per_tok", None)
        total = sum(_bytes_read(listed[index], per_token) for index in layers)
        return total + (_bytes_outside(self.model, listed) if head else 0)

    def _layer_range(self, layers: range) -> LayerRange:
        """The model's base with `layers` computing; for an empty range the whole model, head included."""
        if layers not in self._ranges:
            base, prefix = self.model.base_model, self.model.base_model_prefix
            module, path = (base, self.path) if layers or base is self.model else (self.model, f"{prefix}.{self.path}")
            self._ranges[layers] = LayerRange(module, path, layers, self.tuple_size)
        return self._ranges[layers]

    def _no_embeds(self, num_rows: int) -> Tensor:
        """Embeddings `[1, S, E]` from which a model takes the shape; what it computes of them is replaced."""
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
    """A decoder of the model's layers; if `layers` are given, of just these, and the other layers' weights are freed.

    Raises:
        SplitError: the model has no list of layers, or does not give its own logits when its layers run one by one.
    """
    everything = range(config.num_layers)
    ids = [(7 + 31 * i) % config.vocab_size for i in range(min(CHECK_PIECES[-1][1], config.max_positions))]
    try:
        path = _path_to_layers(model, config.num_layers)
        with torch.no_grad():
            expected_SV, tuple_size = _own_logits(model, path, torch.tensor([ids], device=device))
            decoder = HFDecoder(config, everything, model, path, tuple_size, new_slots, dtype, device)
            whole_SV = _read_in_pieces(decoder, ids, [everything])
            split_SV = _read_in_pieces(decoder, ids, [range(layer, layer + 1) for layer in everything])
    except (SplitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code, called in a way that it may not support
        raise SplitError(brief(error)) from error
    _require_alike(whole_SV, split_SV, expected_SV)
    if layers is None:
        return decoder
    _drop_all_but(model, path, layers)
    return replace(decoder, layers=layers, _ranges={})


def _path_to_layers(model: Any, num_layers: int) -> str:
    """The name of the list of layers in the model's base."""
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
    """The logits that the model gives by itself, `[S, V]`, and how many values a layer returns, 0 for a plain
    tensor."""
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


def _read_in_pieces(decoder: HFDecoder, ids: Sequence[int], ranges: Sequence[range]) -> Tensor:
    """Logits `[S, V]` of `ids`, read in pieces; before each piece other tokens are read and rolled back."""
    caches = [decoder.new_cache(2 * len(ids), layers) for layers in ranges]

    def forward(piece: Sequence[int]) -> Tensor:
        hidden_SM = decoder.embed(decoder.ids(piece))
        for layers, cache in zip(ranges, caches, strict=True):
            hidden_SM, _ = decoder.forward(hidden_SM, cache.length, cache, layers)
        return hidden_SM

    rows = []
    for start, stop in CHECK_PIECES:
        if piece := ids[start:stop]:
            if start:
                forward(ids[start - 1 : start - 1 + min(2, len(ids) - start)])
                for cache in caches:
                    cache.rollback(start)
            rows.append(forward(piece))
    return decoder.logits(torch.cat(rows))


def _require_alike(whole_SV: Tensor, split_SV: Tensor, expected_SV: Tensor) -> None:
    """Raises `SplitError` for logits that are not the model's own.

    Layer by layer the operations are the same as with all layers at once, in any precision. A forward pass of all
    tokens sums in another order, and in low precision a single row may then differ by as much as one expert's output;
    most rows may not, so there the median row is compared."""
    layerwise_S = _relative_difference(split_SV, whole_SV)
    if not bool((layerwise_S <= SAME_OPERATIONS).all()):
        raise SplitError(f"layer by layer its logits are off by {float(layerwise_S.max()):.1%}")
    piecewise_S = _relative_difference(whole_SV, expected_SV)
    worst = piecewise_S.max() if expected_SV.dtype == torch.float32 else piecewise_S.median()
    if not bool(worst <= torch.finfo(expected_SV.dtype).eps ** 0.5):
        raise SplitError(f"token by token its logits are off by {float(worst):.1%}")


def _relative_difference(found_SV: Tensor, expected_SV: Tensor) -> Tensor:
    """Of each row's norm: `[S]`."""
    difference_S = (found_SV.float() - expected_SV.float()).norm(dim=-1)
    return cast(Tensor, difference_S / expected_SV.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny))


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
    """A copy of the module without its numbers, on torch's meta device."""
    return copy.deepcopy(module).to("meta")


def _bytes_read(layer: nn.Module, experts_per_token: int | None) -> int:
    """A layer's bytes, with only the share of its experts that a token is routed to."""
    total = _nbytes(layer)
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] == "experts" and experts_per_token is not None:
            count = len(module) if isinstance(module, nn.ModuleList) else next(module.parameters()).shape[0]
            total -= round(_nbytes(module) * max(0.0, 1 - experts_per_token / count))
    return total


def _bytes_outside(model: Any, listed: nn.Module) -> int:
    """Bytes of what follows the layers: all that is neither theirs nor an embedding of which one row is read."""
    head = model.get_output_embeddings()
    excluded = {id(weight) for weight in listed.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight):
            excluded.add(id(module.weight))
    return sum(weight.nbytes for weight in model.parameters() if id(weight) not in excluded)


def _nbytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())
