"""`draft_model`: speculative sampling. A smaller model of the same vocabulary drafts a chain, the target verifies it.

Greedy drafts are picked; with a temperature they are drawn, so that verification compares both models' distributions.
Sources: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from spdbench.backend import BackendContext, DrafterInfo
from spdbench.errors import InputError
from spdbench.types import GenerationRequest
from spdbench_backends.drafting import DraftVerify
from spdbench_backends.local import GraphOptions

if TYPE_CHECKING:
    from torch import Tensor

    from spdbench.decoding.drafter_choice import DrafterChoice
    from spdbench.decoding.sampling import Sampler
    from spdbench.decoding.speculate import Drafter, Features
    from spdbench.decoding.tree import DraftTree
    from spdbench.models.decoder import Decoder
    from spdbench.models.interface import TargetDecoder
    from spdbench.models.target import Target


MAX_DRAFTED = 64
MAX_ADDED_TOKENS = 128
"""How many tokens may be added to a vocabulary: special ones of a fine-tuned model."""


class DraftModel(DraftVerify):
    """Speculative sampling with a smaller model as the drafter."""

    largest_depth = MAX_DRAFTED

    class Options(GraphOptions):
        model: str | None = Field(
            None, description="the smaller model: folder, GGUF file or hub id; `--drafter PATH` says the same"
        )
        num_tokens: int = Field(4, ge=1, le=MAX_DRAFTED, description="tokens drafted a round")

    _options: Options
    _weights: TargetDecoder | None = None

    def check(self) -> None:
        from spdbench.decoding.drafter_choice import parse_drafter

        choice = parse_drafter(self._context.drafter)
        if choice.kind == "auto":
            self._require_name(self._options.model)

    def _load_drafter(self, choice: DrafterChoice) -> None:
        from spdbench.decoding.tree_builder import chain_builder
        from spdbench.models.cuda.captured_decoder import CapturedDecoder, is_capturable, usual_capacity

        given, num_tokens = "num_tokens" in self._options.model_fields_set, self._options.num_tokens
        depth = num_tokens if given else choice.depth(num_tokens, MAX_DRAFTED)
        self._builder = chain_builder(depth, self._decoder.device)
        if choice.kind == "random":
            self._weights = random_decoder(self._context.target.own_decoder, self._context.seed)
            self._info = DrafterInfo("random", method="draft_model", synthetic=False, trained_tokens=0)
        elif not choice.is_synthetic:
            self._weights = self._load_small(self._options.model or (choice.text if choice.kind == "path" else None))
        captured, small = self._capture_target(self._builder.max_nodes, ()), self._weights
        if captured is not None and small is not None and is_capturable(small):
            self._weights = CapturedDecoder(small, (1, 2), usual_capacity(small), ())

    def _options_for_depth(self, num_levels: int) -> Mapping[str, object]:
        return {"num_tokens": num_levels}

    def _require_name(self, name: str | None) -> str:
        if name is None:
            label = self._context.label
            raise InputError(f"-b {label}: needs a smaller model; give -o {label}.model=FOLDER_OR_HUB_ID")
        return name

    def _load_small(self, name: str | None) -> TargetDecoder:
        small = load_small(self._context, "model", self._require_name(name))
        self._info = DrafterInfo(small.files.id, method="draft_model", synthetic=False, sha256=small.files.sha256)
        return small.decoder

    def _weights_drafter(self, request: GenerationRequest) -> Drafter:
        small, num_tokens = self._loaded(self._weights), self._options.num_tokens
        capacity = len(request.prompt_ids) + request.max_new_tokens + num_tokens
        return ModelDrafter(small, self._decoder.config.vocab_size, num_tokens, capacity)


class ModelDrafter:
    """A smaller model's drafts for one request, with a cache of its own."""

    hidden_indices: tuple[int, ...] = ()

    def __init__(self, decoder: TargetDecoder, vocab_size: int, num_tokens: int, capacity: int) -> None:
        self._vocab_size = vocab_size
        self.max_nodes = num_tokens + 1
        self._decoder = decoder
        self._num_tokens = num_tokens
        self._cache = decoder.new_cache(capacity, num_snapshots=num_tokens)
        self._ids: list[int] = []

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:  # noqa: ARG002
        self._ids = [*prompt_ids, root]

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
        from spdbench.decoding.tree import DraftTree, chain
        from spdbench.decoding.verify import Draft

        # Beyond the positions that the model was made for it drafts nothing: learned ones do not exist there.
        room = self._decoder.config.max_positions - len(self._ids) + 1
        levels = max(0, min(self._num_tokens, max_levels, room))
        ids, drawn = self._ids[-1:], []
        feed = self._ids[self._cache.length :]
        for _ in range(levels):
            draft = Draft.from_logits(self._next(feed), sampler)
            ids.append(draft.token_id)
            if draft.probabilities_V is not None:
                drawn.append(draft.probabilities_V)
            feed = ids[-1:]
        ids_N = self._decoder.ids(ids)
        return DraftTree(chain(levels, ids_N.device), ids_N, tuple(drawn) if drawn else None)

    def accept(self, token_ids: Sequence[int], features: Features) -> None:  # noqa: ARG002
        """Accepted drafts keep their rows in the cache; the target's own token is fed in the next round."""
        self._ids += token_ids
        self._cache.rollback(len(self._ids) - 1)

    def _next(self, ids: Sequence[int]) -> Tensor:
        """Logits `[V]` over the target's vocabulary, which may be padded to another size than the model's own.

        Ids of padding that only one of them has are never drafted, and are read as id 0 if the target gives one.
        """
        import torch

        decoder, cache = self._decoder, self._cache
        own_size = decoder.config.vocab_size
        known = [token if token < own_size else 0 for token in ids] if own_size < self._vocab_size else ids
        hidden_SM, _ = decoder.forward(decoder.embed(decoder.ids(known)), cache.length, cache)
        logits_V = decoder.logits(hidden_SM if len(ids) == 1 else hidden_SM[-1:])[0]
        if own_size == self._vocab_size:
            return logits_V
        room = max(0, self._vocab_size - own_size)
        return torch.nn.functional.pad(logits_V[: self._vocab_size], (0, room), value=-torch.inf)


def random_decoder(target: Decoder, seed: int) -> Decoder:
    """An untrained model of one layer: matrices drawn from N(0, 0.02²) between the target's embedding and head."""
    from spdbench.models.checkpoints.layer_tensors import ExpectedTensors, dense_layer, geometry_of
    from spdbench_backends.drafter_files.tensors import random_tensors

    config, expected = target.config, ExpectedTensors()
    expected.add_layer("", geometry_of(config), config.hidden_size, config.intermediate_size)
    drawn = random_tensors(expected.required, seed)
    tensors = {name: tensor.to(target.device, target.dtype) for name, tensor in drawn.items()}
    return replace(target, layers=range(1), weights={0: dense_layer(tensors.get, "")})


def load_small(context: BackendContext, option: str, name: str) -> Target:
    """The model `name`, which the backend's option `option` names, as a drafter for the context's target.

    Raises:
        InputError: no such model, or its tokens are not the target's.
    """
    from spdbench.models.target import load_target

    target = context.target
    small = load_target(name, target.dtype_name, str(target.device))
    if not _same_vocabulary(small, target):
        raise InputError(
            f"-o {context.label}.{option}={name}: its vocabulary ({small.config.vocab_size} tokens) is not the "
            f"target's ({target.config.vocab_size}), so its drafts would mean other words"
        )
    return small


def _same_vocabulary(small: Target, target: Target) -> bool:
    """True if every id that both tokenizers know is the same token of both; embeddings may be padded differently.

    Without a tokenizer the sizes have to be the same.
    """
    try:
        ours, theirs = (
            {token: text for text, token in model.tokenizer.get_vocab().items()} for model in (small, target)
        )
    except InputError:
        return small.config.vocab_size == target.config.vocab_size
    common = ours.keys() & theirs.keys()
    # An addition of a few special tokens leaves a vocabulary the same; a beginning of another one does not make it so.
    added = max(len(ours), len(theirs)) - len(common)
    return added <= MAX_ADDED_TOKENS and all(ours[token] == theirs[token] for token in common)
