"""The benchmarks' workload: four prompts of different kinds, and vanilla decoding as the side to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from spdbench.backend import Backend
from spdbench.decoding.autoregressive import decode
from spdbench.models.target import Target
from spdbench.prompts.chat import ChatFormat
from spdbench.types import GenerationRequest, Sampling

MODEL = "smollm2"
PROMPTS = {
    "prose": "Explain in a few sentences how a lighthouse keeper spends a stormy night.",
    "maths": (
        "A baker fills 14 trays with 12 rolls each. She sells 96 rolls before noon and two thirds of the rest in the "
        "afternoon, and bakes 3 more trays in the evening. How many rolls are left at the end of the day? Show how."
    ),
    "code": """Give `is_square` and `is_cube` type hints in the same way, and repeat the whole file:

def is_even(number: int) -> bool:
    quotient, remainder = divmod(number, 2)
    return remainder == 0

def is_square(number):
    root = round(number ** (1 / 2))
    return root ** 2 == number

def is_cube(number):
    root = round(number ** (1 / 3))
    return root ** 3 == number
""",
    "translation": (
        "Translate into English: Der Zug nach Hamburg hat heute zwanzig Minuten Verspätung, weil ein Baum auf den "
        "Gleisen liegt. Reisende mit Anschluss in Hannover nehmen bitte den Bus vor dem Bahnhof."
    ),
}


@dataclass(frozen=True)
class Decoded:
    """One turn of a side: the new ids, and the seconds from the prompt's ids to the last and to the first new id."""

    seconds: float
    ids: tuple[int, ...]
    first_seconds: float = 0.0


def prompt_ids(target: Target) -> dict[str, tuple[int, ...]]:
    chat = ChatFormat(target.tokenizer)
    return {name: chat.encode([{"role": "user", "content": text}]) for name, text in PROMPTS.items()}


def vanilla_side(target: Target, prompt: tuple[int, ...], tokens: int) -> Callable[[], Decoded]:
    """Greedy decoding of exactly `tokens` tokens, past the end of the answer if necessary."""
    request = GenerationRequest(prompt, (), tokens, Sampling(), 0, frozenset())

    def side() -> Decoded:
        start = time.perf_counter()
        new = decode(target.decoder, request)
        first = next(new)
        first_seconds = time.perf_counter() - start
        ids = (first, *new)
        return Decoded(time.perf_counter() - start, ids, first_seconds)

    return side


def run_steps(backend: Backend, request: GenerationRequest) -> tuple[float, list[int], int]:
    """Seconds from the first step to the last, all ids, and the number of steps."""
    backend.prepare(request)
    steps = backend.generate(request)
    ids, count = list(next(steps).token_ids), 1
    began = time.perf_counter()
    for step in steps:
        ids += step.token_ids
        count += 1
    return time.perf_counter() - began, ids, count


def common_prefix(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int:
    """How many ids agree before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
