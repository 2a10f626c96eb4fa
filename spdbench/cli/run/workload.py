"""What `run` and `audit` share: a suite with its decoding settings, and the requests that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdbench.backend import is_text_only
from spdbench.cli.completion import complete_suites
from spdbench.cli.options import (
    COUNT,
    PATH,
    WHOLE,
    FiniteRange,
    ModelOptions,
    argument,
    option,
)
from spdbench.cli.parameters import MODEL
from spdbench.console import say
from spdbench.errors import InputError
from spdbench.prompts.chat import ChatFormat, ConversationRefusedError, PlainText
from spdbench.prompts.suite import Suite, limit_prompts
from spdbench.types import Sampling

if TYPE_CHECKING:
    from spdbench.cli.setup import BackendSpec
    from spdbench.measure.request_turn import Workload
    from spdbench.models.target import Target

MIN_TEMPERATURE = 1e-3
UNLIMITED_CONTEXT = 2**31
"""For a model that only its server has: the server reports when a request does not fit."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(ModelOptions):
    """A suite, and what the command line says in place of its own settings."""

    suite: str = argument("SUITE", shell_complete=complete_suites)
    limit: int | None = option("--limit", COUNT, "N", "Only N conversations, round-robin over categories.")
    max_new_tokens: int | None = option("--max-new-tokens", COUNT, "N", "Limit of each answer. [default: the suite's]")
    temperature: float | None = option("--temperature", FiniteRange(min=0), "T", "0 is greedy. [default: the suite's]")
    top_p: float | None = option(
        "--top-p", FiniteRange(min=0, max=1, min_open=True), "P", "Nucleus. [default: the suite's]"
    )
    top_k: int | None = option("--top-k", WHOLE, "K", "0: all tokens. [default: the suite's]")
    seed: int | None = option("--seed", WHOLE, "S", "[default: the suite's, else 0]")
    data: Path | None = option("--data", PATH, "DIR", "Where the suite's files lie.")
    model: str | None = option(
        "-m --model", MODEL, "MODEL", "Hub id, local folder or GGUF file. [default: the suite's, else smollm2]"
    )


def choose_target(suite: Suite, options: SuiteOptions, device: str, specs: Sequence[BackendSpec]) -> Target | None:
    """The model that backends share; None where no model is named and all backends leave it to their servers."""
    from spdbench.cli.setup import load_model

    if (options.model or suite.model) is None and all(is_text_only(spec.cls) for spec in specs):
        return None
    return load_model(options, device, suite.model)


def make_workload(
    suite: Suite,
    options: SuiteOptions,
    target: Target | None,
    chat: ChatFormat | PlainText,
    specs: Sequence[BackendSpec],
    *,
    repeats: int = 1,
    warmup: int = 0,
    remeasure: int = 0,
    keep_spans: bool = False,
    keep_drafts: bool = False,
) -> Workload:
    """The requests of the suite, as the options change them.

    Raises:
        InputError: a setting or a prompt that cannot be used.
    """
    from spdbench.measure.request_turn import Workload, prompt_sha256

    settings = _decoding(suite, options)
    workload = Workload(
        prompts=limit_prompts(suite.prompts, options.limit),
        max_new_tokens=settings["max_new_tokens"],
        sampling=Sampling(settings["temperature"], settings["top_p"], settings["top_k"]),
        seed=settings["seed"],
        eos_ids=frozenset() if target is None else target.eos_ids,
        repeats=repeats,
        warmup=warmup,
        context_limit=UNLIMITED_CONTEXT if target is None else target.config.max_positions,
        remeasure=remeasure,
        keep_spans=keep_spans,
        keep_drafts=keep_drafts,
    )
    prompts = _check(specs, workload, chat, omit_too_long=suite.omit_too_long)
    first = {name: prompt_sha256(ids) for name, ids in prompts.items()}
    kept = tuple(prompt for prompt in workload.prompts if prompt.id in prompts)
    return replace(workload, prompts=kept, first_prompts=first)


def _decoding(suite: Suite, options: SuiteOptions) -> dict[str, Any]:
    """The suite's decoding settings, and those of the command line in their place."""
    settings = suite.decoding.model_dump()
    settings |= {key: given for key in settings if (given := getattr(options, key)) is not None}
    if 0 < (temperature := settings["temperature"]) < MIN_TEMPERATURE:
        raise InputError(
            f"--temperature {temperature}: too small to divide by; 0 is greedy, else at least {MIN_TEMPERATURE}"
        )
    return settings


def _check(
    specs: Sequence[BackendSpec], workload: Workload, chat: ChatFormat | PlainText, *, omit_too_long: bool
) -> dict[str, tuple[int, ...]]:
    """The first prompt of each conversation by its id, empty where the template refuses it; without those for which
    the model has no room, if the suite says so. Raises `InputError` for what is known to be wrong before anything is
    loaded or written."""
    from spdbench.cli.setup import report_joined
    from spdbench.decoding.drafter_choice import parse_drafter
    from spdbench.decoding.synthetic import require_known_answer

    drafted = [spec for spec in specs if spec.cls.kind != "autoregressive" and not is_text_only(spec.cls)]
    for text in dict.fromkeys(spec.drafter for spec in drafted):
        choice = parse_drafter(text)
        require_known_answer(choice, workload.sampling)
        if choice.note:
            say(f"NOTE: --drafter {text}: {choice.note}")
    obstacles: list[str] = []
    omitted: list[str] = []
    prompts: dict[str, tuple[int, ...]] = {}
    for prompt in workload.prompts:
        prompts[prompt.id] = ()
        try:
            ids = chat.encode(prompt.first_messages)
        except ConversationRefusedError as error:
            obstacles.append(f"prompt {prompt.id}: {error}")
        except InputError as error:
            raise InputError(f"prompt {prompt.id}: {error}") from None
        else:
            prompts[prompt.id] = ids
            if len(ids) >= (limit := workload.context_limit):
                obstacle = f"prompt {prompt.id}: {len(ids)} tokens leave no room in the model's context of {limit}"
                (omitted if omit_too_long else obstacles).append(obstacle)
                if omit_too_long:
                    del prompts[prompt.id]
    if len(obstacles) + len(omitted) == len(workload.prompts):
        raise InputError([*obstacles, *omitted][0])
    if omitted:
        say(f"NOTE: {len(omitted):,} of {len(workload.prompts):,} prompts are omitted. The first: {omitted[0]}")
    if isinstance(chat, ChatFormat):
        report_joined(chat, [prompt.context for prompt in workload.prompts])
    if obstacles:
        say(
            f"NOTE: {len(obstacles):,} of {len(workload.prompts):,} prompts cannot be given to the model and count as "
            f"failed. The first: {obstacles[0]}"
        )
    return prompts
