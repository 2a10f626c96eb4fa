"""The model `spdbench` of lm-eval: a backend that reports ids generates text, its target scores given text.

Importing it needs lm-eval. Requests are answered one at a time, since backends are made for batch size 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from spdbench.backend import Backend, closing_steps, is_text_only
from spdbench.cli.options import DTYPES, ModelOptions
from spdbench.cli.setup import BackendSpec, find_backends, find_devices, load_model
from spdbench.decoding.distribution import loglikelihood
from spdbench.decoding.drafter_choice import parse_drafter
from spdbench.decoding.synthetic import require_known_answer
from spdbench.errors import InputError, did_you_mean
from spdbench.models.target import Target
from spdbench.processors import usable_cores
from spdbench.prompts.chat import ChatFormat
from spdbench.types import GenerationRequest, Message, Sampling, request_seed

DEFAULT_NEW_TOKENS = 256
MODEL_ARGS = ("backend", "model", "drafter", "dtype", "devices", "threads", "seed")
GENERATION_ARGS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"})
NEUTRAL_ARGS: Mapping[str, float] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "best_of", "n", "guidance_scale"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p"), 1),
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty", "diversity_penalty", "penalty_alpha"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("min_tokens", "epsilon_cutoff", "eta_cutoff"), 0),
}
"""Options that are not supported, by the one value that is taken, since it changes nothing."""
WITHOUT_EFFECT = frozenset({"use_cache", "early_stopping", "length_penalty"})
"""Options that change no answer of a search with one beam."""
LM_EVAL_DEVICE = "cuda:0"
"""The device that lm-eval passes where its user gave none."""


def with_ids(specs: list[BackendSpec]) -> list[BackendSpec]:
    """`specs`, if lm-eval can have all of them as models.

    Raises:
        InputError: one is a server, which knows text only.
    """
    for spec in specs:
        if is_text_only(spec.cls):
            raise InputError(
                f"-b {spec.label}: {spec.name} knows text only; lm-eval has a model of its own for servers "
                "(--model local-completions)"
            )
    return specs


class SpdbenchLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A loaded backend and its target. Close it, or all of them by `close_all`."""

    opened: ClassVar[list[SpdbenchLM]] = []

    def __init__(
        self,
        spec: BackendSpec,
        target: Target,
        devices: tuple[str, ...],
        threads: int,
        seed: int,
        chat: ChatFormat | None = None,
    ) -> None:
        super().__init__()
        self.target, self.spec, self.devices = target, spec, devices
        self.tokenizer = target.tokenizer
        self.chat = chat or ChatFormat(target.tokenizer)
        self._seed = seed
        self.backend: Backend = spec.make(target, devices, threads, seed)
        self.opened.append(self)
        self.backend.load()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> SpdbenchLM:
        """From `--model_args`, as lm-eval has parsed them.

        Raises:
            InputError: an unknown or useless argument.
        """
        given = {key: str(value) for key, value in arg_dict.items() if value is not None}
        device = (additional_config or {}).get("device")
        if device not in (None, LM_EVAL_DEVICE):
            given.setdefault("devices", str(device))
        name = given.get("backend", "vanilla")
        chosen = _chosen(given, name)
        [spec] = with_ids(find_backends({name: name}, chosen))
        devices = find_devices(chosen)
        target = load_model(chosen, devices[0])
        return cls(spec, target, devices, chosen.threads, _whole(given, "seed", 0))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> SpdbenchLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def close_all(cls) -> None:
        while cls.opened:
            cls.opened.pop().backend.close()

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        return min(self.target.eos_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        """The id before texts that have no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.target.config.max_positions

    @property
    def tokenizer_name(self) -> str:
        return self.target.files.id.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; by default after a BOS token, if this tokenizer adds one and the text has none."""
        return list(self.chat.encode_answer(string) if add_special_tokens is False else self.chat.encode_text(string))

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Raises `InputError` if the model has no chat template, or it refuses."""
        return self.chat.text(chat_history, answered=not add_generation_prompt)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The backend's answers, each up to the first of its stop strings."""
        answers = []
        for number, request in enumerate(tqdm(requests, desc=self.spec.label, disable=disable_tqdm)):
            context, settings = request.args
            answers.append(self._answer(context, settings, number))
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows where they are longer than the model's context."""
        totals = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(found for found, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one. Keeps a long context's end."""
        found = []
        for texts, context, continuation in tqdm(requests, desc="continuations", disable=disable_tqdm):
            if len(continuation) > self.max_length:
                raise InputError(
                    f"lm-eval: a continuation of {len(continuation)} tokens is too long for the model's context of "
                    f"{self.max_length}; leave the task out, or use a model with a longer context"
                )
            room = self.max_length + 1 - len(continuation)
            found.append(loglikelihood(self.target.decoder, context[-room:], continuation))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def _answer(self, context: str, settings: Mapping[str, Any], number: int) -> str:
        request = self._request(context, settings, number)
        self.backend.prepare(request)
        ids: list[int] = []
        with closing_steps(self.backend.generate(request)) as steps:
            for step in steps:
                for token in step.token_ids[: request.max_new_tokens - len(ids)]:
                    if token in request.eos_ids:
                        return self._up_to_stop(ids, request.stop)[0]
                    ids.append(token)
                text, stopped = self._up_to_stop(ids, request.stop)
                if stopped or len(ids) == request.max_new_tokens:
                    return text
        return self._up_to_stop(ids, request.stop)[0]

    def _up_to_stop(self, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
        """The text of `ids` up to the first stop string in it, and whether there is one."""
        text = self.chat.decode(ids)
        places = [place for word in stop if (place := text.find(word)) >= 0]
        return text[: min(places, default=None)], bool(places)

    def _request(self, context: str, settings: Mapping[str, Any], number: int) -> GenerationRequest:
        named = {key: value for key, value in settings.items() if value is not None}
        given = dict(normalize_gen_kwargs(named, DEFAULT_NEW_TOKENS))
        for key in sorted(given.keys() - GENERATION_ARGS - WITHOUT_EFFECT):
            _require_neutral(key, given[key])
        limit = int(given["max_gen_toks"])
        if not 0 < limit < self.max_length:
            raise InputError(
                f"lm-eval: max_gen_toks={limit} leaves no room in the model's context of {self.max_length}; set it "
                "with --gen_kwargs max_gen_toks=N"
            )
        sampling = Sampling(
            float(given.get("temperature", 0.0)), float(given.get("top_p", 1.0)), max(0, int(given.get("top_k", 0)))
        )
        if self.backend.kind != "autoregressive":
            require_known_answer(parse_drafter(self.spec.drafter), sampling)
        return GenerationRequest(
            prompt_ids=tuple(self.tok_encode(context)[-(self.max_length - limit) :]) or (self.prefix_token_id,),
            messages=({"role": "user", "content": context},),
            max_new_tokens=limit,
            sampling=sampling,
            seed=request_seed(self._seed, number, context),
            eos_ids=self.target.eos_ids,
            stop=tuple(word for word in given["until"] if word),
        )


def _require_neutral(key: str, value: object) -> None:
    """Raises `InputError` for a generation option that is not supported, unless its value changes nothing."""
    neutral = NEUTRAL_ARGS.get(key)
    if neutral is None:
        raise InputError(f"lm-eval: generation option '{key}' is not known{did_you_mean(key, GENERATION_ARGS)}")
    if value != neutral:
        raise InputError(
            f"lm-eval: generation option {key}={value!r} is not supported. Allowed: {neutral}, which changes nothing; "
            f"set it with --gen_kwargs {key}={neutral}"
        )


def _chosen(given: Mapping[str, str], name: str) -> ModelOptions:
    """MODEL-OPTIONS out of `--model_args`: what is not one of `MODEL_ARGS` is an option `BACKEND.KEY`."""
    options = []
    for key, value in given.items():
        if key.startswith(f"{name}."):
            options.append(f"{key}={value}")
        elif key == "trust_remote_code":
            if value == "True":
                raise InputError("--trust_remote_code: code that comes with a model is never run; leave it out")
        elif key not in MODEL_ARGS:
            raise InputError(
                f"--model_args {key}={value}: unknown key{did_you_mean(key, [*MODEL_ARGS, f'{name}.KEY'])}"
            )
    dtype = given.get("dtype", DTYPES[0])
    if dtype not in DTYPES:
        raise InputError(f"--model_args dtype={dtype}: not supported. Allowed: {', '.join(DTYPES)}.")
    drafter, devices = given.get("drafter"), given.get("devices")
    return ModelOptions(
        model=given.get("model"),
        drafters=(drafter,) if drafter else (),
        options=tuple(options),
        dtype=dtype,
        devices=tuple(devices.split("+")) if devices else None,
        threads=_whole(given, "threads", usable_cores()),
        chat_template=None,
        template_args=(),
    )


def _whole(given: Mapping[str, str], key: str, default: int) -> int:
    text = given.get(key, str(default))
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"--model_args {key}={text}: must be a whole number")
    return int(text)
