"""`hf`: transformers' own `generate`, plain, with an assistant model, or with prompt lookup. What most people use.

Loads transformers' model in addition to the target's own layers. Its steps are the target's forwards, observed from
outside: what a forward was fed is the draft, and the ids that it gave show the verdict. The first forward drafts
together with the prompt, so it may give several tokens; like all of prefill, it does not count for acceptance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from spdbench.backend import BackendContext, BackendInfo, BackendOptions, DrafterInfo
from spdbench.errors import InputError
from spdbench.types import BackendKind, GenerationRequest, Span, Step
from spdbench_backends.drafting import observed_step

if TYPE_CHECKING:
    from spdbench.models.hf.generation import Generation


class HF:
    """transformers' generate: plain, with an assistant model, or with prompt lookup."""

    class Options(BackendOptions):
        assistant: str | None = Field(None, description="the model that drafts: folder, GGUF file or hub id")
        assistant_tokens: int | None = Field(
            None, ge=1, le=64, description="tokens drafted a round; default: transformers decides"
        )
        prompt_lookup: int = Field(0, ge=0, le=64, description="tokens that are looked up in the context; 0: none")
        max_ngram: int = Field(2, ge=1, le=64, description="longest run of last tokens that is looked up")

    kind: ClassVar[BackendKind] = "draft_verify"
    lossless = True

    def __init__(self, options: BackendOptions, context: BackendContext) -> None:
        self._options = cast(HF.Options, options)
        self._context = context
        self._generation: Generation | None = None
        self._assistant: Any = None
        self._info: DrafterInfo | None = None

    def load(self) -> None:
        from spdbench.models.hf.generation import Generation

        options, label, target = self._options, self._context.label, self._context.target
        if options.assistant is not None and options.prompt_lookup:
            raise InputError(
                f"-o {label}.prompt_lookup={options.prompt_lookup}: excludes {label}.assistant; choose one"
            )
        if options.assistant_tokens is not None and options.assistant is None:
            raise InputError(f"-o {label}.assistant_tokens={options.assistant_tokens}: needs {label}.assistant=MODEL")
        if "max_ngram" in options.model_fields_set and not options.prompt_lookup:
            raise InputError(f"-o {label}.max_ngram={options.max_ngram}: needs {label}.prompt_lookup=TOKENS")
        if options.assistant is not None:
            self._load_assistant(options.assistant)
        elif options.prompt_lookup:
            self._info = DrafterInfo("prompt lookup", method="prompt_lookup", synthetic=False)
        self._generation = Generation(target.load_for_generation())

    def _load_assistant(self, name: str) -> None:
        from spdbench.models.hf import library
        from spdbench_backends.draft_model import load_small

        small = load_small(self._context, "assistant", name)
        self._assistant = small.load_for_generation()
        self._assistant.generation_config = library.assistant_settings(self._options.assistant_tokens)
        self._info = DrafterInfo(small.files.id, method="assistant_model", synthetic=False, sha256=small.files.sha256)

    def describe(self) -> BackendInfo:
        from spdbench.models.hf import library

        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=(self._loaded().bytes_per_token(),),
            stage_layers=(self._context.target.config.num_layers,),
            drafter=self._info,
            chosen={"engine": f"transformers {library.version()}"},
        )

    def prepare(self, request: GenerationRequest) -> None:
        pass

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        from spdbench.models.hf import library

        options = self._options
        drafting = {}
        if options.prompt_lookup:
            drafting = {"prompt_lookup_num_tokens": options.prompt_lookup, "max_matching_ngram_size": options.max_ngram}
        settings = library.generation_settings(request, **drafting)
        unread = len(request.prompt_ids)
        for fed, token_ids in self._loaded().rounds(request, settings, self._assistant):
            yield observed_step(token_ids, fed[unread:], forwards=len(fed))
            unread = 1

    def spans(self) -> Sequence[Span]:
        return ()

    def close(self) -> None:
        if self._generation is not None:
            self._generation.close()
        self._generation = self._assistant = None

    def _loaded(self) -> Generation:
        if self._generation is None:
            raise RuntimeError("hf is not loaded")
        return self._generation
