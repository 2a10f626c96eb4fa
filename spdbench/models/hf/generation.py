"""transformers' `generate`, observed from outside: the input of each forward pass of the target, and the ids it gave.

`generate` passes its tokens to a streamer from within its own loop, so it runs in another thread; always the same one,
so that compute threads stay warm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from inspect import signature
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdbench.models.hf import library
from spdbench.models.layer_ops import NOT_NUMBERS
from spdbench.types import GenerationRequest


class Round(NamedTuple):
    """One forward pass of the target: the ids that it was `fed`, and the `token_ids` that it gave: `NOT_NUMBERS` alone
    if logits are NaN."""

    fed: tuple[int, ...]
    token_ids: tuple[int, ...]


class AbandonedError(Exception):
    """The rest of an answer is no longer needed."""


class Generation:
    """A model of transformers and the thread that runs it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._fed: deque[Tensor] = deque()
        model.register_forward_pre_hook(self._record_input, with_kwargs=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="generate")

    def rounds(self, request: GenerationRequest, settings: Any, assistant: Any = None) -> Iterator[Round]:
        """Every round of an answer, as it comes. If the iterator is closed early, `generate` ends after its current
        round."""
        rounds: SimpleQueue[Round | None] = SimpleQueue()
        streamer = _Streamer(rounds, self._fed, request.sampling.greedy)
        done = self._pool.submit(self._generate, request, settings, assistant, streamer)
        done.add_done_callback(lambda _: rounds.put(None))
        try:
            while (found := rounds.get()) is not None:
                yield found
            done.result()
        finally:
            streamer.abandoned = True
            done.exception()  # waits for its end

    def next_logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Mapping[int, float]:
        """The model's logits after `answer_ids` by id: it reads the prompt, then one token a forward, as `generate`
        does without drafts."""
        return self._pool.submit(self._next_logits, prompt_ids, answer_ids).result()

    def _next_logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Mapping[int, float]:
        model, cache, logits_V = self._model, None, torch.empty(0)
        # As `generate` does: a head that computes more rows may sum in another order.
        keep = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        with torch.inference_mode(), library.quiet():
            for ids in (prompt_ids, *((token,) for token in answer_ids)):
                ids_1S = torch.tensor([list(ids)], device=model.device)
                output = model(input_ids=ids_1S, past_key_values=cache, use_cache=True, **keep)
                cache, logits_V = output.past_key_values, output.logits[0, -1]
        return dict(enumerate(logits_V.float().tolist()))

    def close(self) -> None:
        self._pool.shutdown()

    def bytes_per_token(self) -> int:
        """Bytes of weights that one token's forward pass reads: all except an embedding that is not the head as
        well."""
        model = self._model
        weights = {id(weight): weight for weight in model.parameters()}
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if embedding is not head:
            weights.pop(id(embedding), None)
        return sum(weight.numel() * weight.element_size() for weight in weights.values())

    def _generate(self, request: GenerationRequest, settings: Any, assistant: Any, streamer: _Streamer) -> None:
        self._fed.clear()
        ids = torch.tensor([request.prompt_ids], device=self._model.device)
        if not request.sampling.greedy:
            torch.manual_seed(request.seed)
        drafting = {} if assistant is None else {"assistant_model": assistant}
        watch = self._model.register_forward_hook(streamer.see_logits)
        try:
            with torch.inference_mode(), library.quiet(), suppress(AbandonedError):
                self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer, **drafting
                )
        finally:
            watch.remove()

    def _record_input(self, _model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._fed.append(named["input_ids"] if "input_ids" in named else arguments[0])


class _Streamer:
    """Receives what `generate` streams: the prompt first, then the ids of each round; and notices logits that are NaN,
    which `generate` does not when it is `greedy`."""

    def __init__(self, rounds: SimpleQueue[Round | None], fed: deque[Tensor], greedy: bool) -> None:
        self.abandoned = False
        self._rounds = rounds
        self._fed = fed
        self._greedy = greedy
        self._logits = torch.empty(0)
        self._is_prompt = True

    def put(self, ids: Tensor) -> None:
        if self.abandoned:
            raise AbandonedError
        if self._is_prompt:
            self._is_prompt = False
            return
        token_ids = tuple(ids.flatten().tolist())
        # The argmax counts NaN as the greatest, so the logits of the ids that were chosen show it. A forward has a row
        # for each of them, and perhaps more.
        if self._greedy and bool(self._logits[:, list(token_ids)].isnan().any()):
            token_ids = (NOT_NUMBERS,)
        self._put(token_ids)

    def _put(self, token_ids: tuple[int, ...]) -> None:
        self._rounds.put(Round(tuple(self._fed.popleft().flatten().tolist()), token_ids))

    def see_logits(self, _model: Any, _arguments: tuple[Any, ...], output: Any) -> None:
        """Called after each forward. A draw from NaN would raise, or on a GPU break all that follows, so it is kept
        from happening."""
        self._logits = output.logits[0]
        if not self._greedy and bool(self._logits.amax().isnan()):
            self._put((NOT_NUMBERS,))
            raise AbandonedError

    def end(self) -> None:
        pass


def with_vocabulary(model: Any, size: int) -> Any:
    """`model` with embedding and head of `size` rows, which `generate` demands of an assistant: padding is cut off, or
    rows of zeros are added."""
    before = model.get_input_embeddings().weight.shape[0]
    if size != before:
        with library.quiet(), torch.no_grad():
            model.resize_token_embeddings(size, mean_resizing=False)
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[before:] = 0
    return model
