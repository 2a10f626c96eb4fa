"""`llamacpp`: llama.cpp through llama-cpp-python, plain or with prompt lookup: what many people run on a CPU.

It reads a GGUF file's weights as they are, so its outputs are those of another precision and are not compared with
vanilla's. Its loop is observed from outside: each call of `eval` is a step, and the tokens that it is given after the
first are the draft. Prompts are the same ids, and nothing is kept of the previous request.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from spdbench.backend import BackendInfo
from spdbench.errors import InputError, install_command
from spdbench.models.checkpoints.folders import typed_path
from spdbench.types import BackendKind, GenerationRequest, Sampling, Step
from spdbench_backends.local import LookupOptions, ObservedEngine, observed_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_DEFAULT_CONTEXT = 8192
SEED_BITS = 32


class LlamaCpp(ObservedEngine):
    """llama.cpp on a GGUF file: plain, or with prompt lookup."""

    class Options(LookupOptions):
        model: str | None = Field(None, description="the GGUF file; default: the one that -m names")
        context: int | None = Field(
            None, ge=8, description=f"tokens of context; default: the model's, {MAX_DEFAULT_CONTEXT} at most"
        )

    kind: ClassVar[BackendKind] = "draft_verify"

    _options: Options
    _model: Any = None

    def check(self) -> None:
        _package(self._context.label)
        self._find_file()

    def load(self) -> None:
        options, target = self._options, self._context.target
        self._set_lookup()
        package = _package(self._context.label)
        self._file = self._find_file()
        num_context = options.context or min(target.config.max_positions, MAX_DEFAULT_CONTEXT)
        try:
            self._model = package.Llama(
                str(self._file),
                n_ctx=num_context,
                n_threads=self._context.threads,
                n_threads_batch=self._context.threads,
                n_gpu_layers=-1 if target.device.type == "cuda" else 0,
                draft_model=_lookup(options) if options.prompt_lookup else None,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise self._option_error("model", f"llama.cpp cannot load it ({error})", self._file.name) from None
        if self._model.n_vocab() != target.config.vocab_size:
            raise self._option_error(
                "model",
                f"its vocabulary ({self._model.n_vocab()} tokens) is not that of -m ({target.config.vocab_size}), so "
                "the same ids would mean other words",
                self._file.name,
            )
        self._version = str(package.__version__)
        self._watch()

    def _find_file(self) -> Path:
        given, label, files = self._options.model, self._context.label, self._context.target.files
        found = typed_path(given) if given is not None else files.gguf
        if found is None:
            raise InputError(
                f"-b {label}: -m is not a GGUF file; give the same model as one: -o {label}.model=FILE.gguf"
            )
        if found.suffix != ".gguf" or not found.is_file():
            raise self._option_error("model", "no such GGUF file", given)
        return found

    def _watch(self) -> None:
        """Records the tokens of every call of `eval`."""
        original: Callable[[Sequence[int]], None] = self._model.eval
        self._fed: list[list[int]] = []

        def recording(tokens: Sequence[int]) -> None:
            self._fed.append(list(tokens))  # a copy, because the loop reuses the list
            original(tokens)

        self._model.eval = recording

    def describe(self) -> BackendInfo:
        return BackendInfo(
            devices=self._context.devices[:1],
            lane_bytes=(self._file.stat().st_size,),
            stage_layers=(self._context.target.config.num_layers,),
            drafter=self._info,
            chosen={"engine": f"llama-cpp-python {self._version}"},
            other_model=f"{self._file.name} in llama.cpp",
        )

    def prepare(self, request: GenerationRequest) -> None:
        needed, room = len(request.prompt_ids) + request.max_new_tokens, self._loaded(self._model).n_ctx()
        if needed > room:
            label = self._context.label
            raise InputError(
                f"-b {label}: {needed} tokens do not fit into its context; give -o {label}.context={needed}"
            )

    def generate(self, request: GenerationRequest) -> Iterator[Step]:
        model = self._loaded(self._model)
        model.reset()  # otherwise it reuses its cache of a common prefix
        model.set_seed(request.seed % 2**SEED_BITS)
        self._fed.clear()
        tokens = model.generate(list(request.prompt_ids), **_sampling(request.sampling))
        unread = len(request.prompt_ids)
        try:
            ended = False
            while not ended:
                found = [int(next(tokens))]
                fed = self._fed.pop()
                drafts = fed[unread:]
                unread = 1
                # The loop yields further tokens of the same forward as long as the draft was accepted.
                while (
                    found[-1] not in request.eos_ids
                    and len(found) <= len(drafts)
                    and found[-1] == drafts[len(found) - 1]
                ):
                    found.append(int(next(tokens)))
                ended = found[-1] in request.eos_ids
                yield observed_step(found, drafts, len(fed), keep_drafts=request.keep_drafts)
        finally:
            tokens.close()

    def next_logits(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Mapping[int, float]:
        """llama.cpp's own logits, see `spdbench.backend.engine_logits`; read as its loop reads without drafts."""
        import numpy as np

        model = self._loaded(self._model)
        model.reset()
        for ids in (prompt_ids, *((token,) for token in answer_ids)):
            model.eval(list(ids))
        # `scores` are filled with `logits_all` only, which costs time and memory in every measured forward.
        last = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),))
        return dict(enumerate(last.tolist()))

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        super().close()


def _package(label: str) -> Any:
    try:
        return importlib.import_module("llama_cpp")
    except ImportError:
        raise InputError(f"-b {label}: needs llama-cpp-python: {install_command('spdbench[llamacpp]')}") from None


def _lookup(options: LlamaCpp.Options) -> Any:
    drafting = importlib.import_module("llama_cpp.llama_speculative")
    return drafting.LlamaPromptLookupDecoding(max_ngram_size=options.max_ngram, num_pred_tokens=options.prompt_lookup)


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """llama.cpp's arguments for the same distribution.

    llama.cpp divides by the temperature after top-k and top-p; here the logits are divided first, as in
    `decoding.sampling`.
    """
    off = {"min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0}
    if sampling.greedy:
        return {"temp": 0.0, **off}

    def cool(_ids: NDArray[Any], logits: NDArray[Any]) -> NDArray[Any]:
        return logits / sampling.temperature

    return {"temp": 1.0, "top_k": sampling.top_k, "top_p": sampling.top_p, "logits_processor": [cool], **off}
