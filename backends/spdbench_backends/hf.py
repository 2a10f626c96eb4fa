"""`hf`: transformers' own `generate`, plain, with an assistant model, or with prompt lookup. What most people use.

Loads transformers' model in addition to the target's own layers. Its steps are the target's forwards, observed from
outside: what a forward was fed is the draft, and the ids that it gave show the verdict. The first forward drafts
together with the prompt, so it may give several tokens; like all of prefill, it does not count for acceptance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from spdbench.backend import BackendInfo, DrafterInfo
from spdbench.types import BackendKind, GenerationRequest, Step
from spdbench_backends.local import LookupOptions, ObservedEngine, observed_step

if TYPE_CHECKING:
    from spdbench.models.hf.generation import Generation


class HF(ObservedEngine):
    """transformers' generate: plain, with an assistant model, or with prompt lookup."""

    class Options(LookupOptions):
        assistant: str | None = Field(None, description="the model that drafts: folder, GGUF file or hub id")
        assistant_tokens: int | None = Field(
            None, ge=1, le=64, description="tokens drafted a round; default: transformers decides"
        )

    kind: ClassVar[BackendKind] = "draft_verify"

    _options: Options
    _generation: Generation | None = None
    _assistant: Any = None

    def load(self) -> None:
        from spdbench.models.hf.generation import Generation

        options, label = self._options, self._context.label
        if options.assistant is not None and options.prompt_lookup:
            raise self._option_error("prompt_lookup", f"excludes {label}.assistant; choose one")
        if options.assistant_tokens is not None and options.assistant is None:
            raise self._option_error("assistant_tokens", f"needs {label}.assistant=MODEL")
        self._set_lookup()
        if options.assistant is not None:
            self._load_assistant(options.assistant)
        self._generation = Generation(self._context.target.load_for_generation())

    def _load_assistant(self, name: str) -> None:
        from spdbench.models.hf import library
        from spdbench.models.hf.generation import with_vocabulary
        from spdbench_backends.draft_model import load_small

        small = load_small(self._context, "assistant", name)
        self._assistant = with_vocabulary(small.load_for_generation(), self._context.target.config.vocab_size)
        self._assistant.generation_config = library.assistant_settings(self._options.assistant_tokens)
        self._info = DrafterInfo(small.files.id, method="assistant_model", synthetic=False, sha256=small.files.sha256)

    def describe(self) -> BackendInfo:
        from spdbench.models.hf import library

        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=(self._loaded(self._generation).bytes_per_token(),),
            stage_layers=(self._context.target.config.num_layers,),
            drafter=self._info,
            chosen={"engine": f"transformers {library.version()}"},
        )

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        from spdbench.decoding.sampling import require_number
        from spdbench.models.hf import library

        options = self._options
        drafting = {}
        if options.prompt_lookup:
            drafting = {"prompt_lookup_num_tokens": options.prompt_lookup, "max_matching_ngram_size": options.max_ngram}
        settings = library.generation_settings(request, **drafting)
        unread = len(request.prompt_ids)
        for fed, token_ids in self._loaded(self._generation).rounds(request, settings, self._assistant):
            token_ids = tuple(map(require_number, token_ids))
            yield observed_step(token_ids, fed[unread:], len(fed), keep_drafts=request.keep_drafts)
            unread = 1

    def next_logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Mapping[int, float]:
        """transformers' own logits, see `spdbench.backend.engine_logits`."""
        return self._loaded(self._generation).next_logits(prompt_ids, answer_ids)

    def close(self) -> None:
        if self._generation is not None:
            self._generation.close()
        super().close()
