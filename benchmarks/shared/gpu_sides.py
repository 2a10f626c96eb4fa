"""What `benchmarks.gpu` measures: backends with their options, over random models, with forced verdicts."""

from __future__ import annotations

import statistics
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from spdbench.backend import Backend, BackendContext, parse_options
from spdbench.decoding.drafter_choice import parse_drafter
from spdbench.decoding.synthetic import synthetic_drafts
from spdbench.measure.environment import read_bandwidth_bytes_per_s
from spdbench.models.checkpoints.config import ModelConfig
from spdbench.models.checkpoints.find_model import ModelFiles
from spdbench.models.load_decoder import HEAD, load_decoder
from spdbench.models.rotary import plain_frequencies
from spdbench.models.target import DTYPES
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.eagle.backend import Eagle
from spdbench_backends.medusa.backend import Medusa
from spdbench_backends.spd.backend import SPD
from spdbench_backends.vanilla import Vanilla

BACKENDS: dict[str, Any] = {"vanilla": Vanilla, "spd": SPD, "eagle": Eagle, "medusa": Medusa}
TAIL = 1500
"""Characters of a traceback that are kept."""

POSITIONS = 512
SKIPPED_STEPS = 2
"""Prefill, and the step after it, in which EAGLE's head reads the prompt."""

SPARE_TOKENS = 32
"""Tokens of a request that are not counted: so many that no counted round has its tree cut at the limit."""


@dataclass(frozen=True)
class Settings:
    """What a call measures, and how long."""

    device: str
    dtype: str
    shapes: tuple[str, ...]
    prompt_tokens: int
    tokens: int
    rounds: int
    acceptances: tuple[float, ...]

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def parts(self) -> list[str]:
        """In the order of running: the methods that matter most come first, small models before large ones."""
        first, rest = list(BACKENDS)[:3], list(BACKENDS)[3:]
        return [f"{method}-{shape}" for some in (first, rest) for shape in self.shapes for method in some]


REAL = Settings("cuda:0", "bfloat16", ("0.6B", "4B", "8B"), 64, 128, rounds=5, acceptances=(0.7, 0.9))
REHEARSAL = Settings("cpu", "float32", ("tiny",), 8, 12, rounds=1, acceptances=(0.9,))


SHAPES = {
    "0.6B": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "1.7B": (28, 2048, 6144, 16, 8, 128, 151936, True),
    "4B": (36, 2560, 9728, 32, 8, 128, 151936, True),
    "8B": (36, 4096, 12288, 32, 8, 128, 151936, False),
    "tiny": (4, 64, 96, 4, 2, 16, 300, True),
}
"""Qwen3's: layers, width, feed-forward width, heads, kv heads, head size, vocabulary, and whether the head is tied."""


def config_of(shape: str) -> ModelConfig:
    layers, width, ffn, heads, kv_heads, head_dim, vocab_size, tied = SHAPES[shape]
    return ModelConfig(
        family="qwen3",
        num_layers=layers,
        hidden_size=width,
        vocab_size=vocab_size,
        max_positions=POSITIONS,
        eos_ids=frozenset(),
        intermediate_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-6,
        tied=tied,
        qk_norm=True,
        windows=(None,) * layers,
        experts=None,
        rotary_dim=head_dim,
    )


class RandomCheckpoint:
    """A checkpoint whose tensors are drawn on the device when they are read: timing needs sizes, not answers."""

    directory = Path("random")
    files: Sequence[Path] = ()

    def __init__(self, dtype: torch.dtype, device: torch.device, *, tied: bool) -> None:
        self._dtype, self._device, self._tied = dtype, device, tied

    def __contains__(self, name: str) -> bool:
        return not name.endswith(".bias") and not (self._tied and name == HEAD)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The same numbers at every reading; ones for a norm."""
        drawn = torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return drawn if len(shape) == 1 else drawn.normal_(0.0, 0.02, generator=generator)

    def close(self) -> None:
        pass


class RandomTarget:
    """What backends use of a `Target`, over a random model."""

    unsupported_reason = None

    def __init__(self, shape: str, settings: Settings) -> None:
        dtype, device = DTYPES[settings.dtype], torch.device(settings.device)
        self.files = ModelFiles(f"random {shape}", Path(), "")
        self.config = config_of(shape)
        frequencies = plain_frequencies(1e6, self.config.head_dim), 1.0
        checkpoint: Any = RandomCheckpoint(dtype, device, tied=self.config.tied)
        with torch.inference_mode():
            self.decoder = self.own_decoder = self.ends = load_decoder(
                checkpoint, self.config, frequencies, dtype, device
            )


@dataclass(frozen=True)
class Side:
    """A backend with its options. `setting` and `graphs` are its names in the table."""

    method: str
    setting: str
    graphs: str
    options: Mapping[str, str]


BASE = Side("vanilla", "", "on", {"graphs": "on"})


def sides_of(method: str, settings: Settings) -> list[Side]:
    """The sides of a part. torch.compile, which makes code for a GPU, is not rehearsed."""
    if method == "vanilla":
        return [Side("vanilla", "", how, {"graphs": how}) for how in ("off", *["compiled"] * settings.on_gpu)]
    if method == "spd":
        executors = {"on": "streams", "off": "inline"}
        return [
            Side("spd", f"n={count}", how, {"executor": executor, "stages": count})
            for count in ("2", "4")
            for how, executor in executors.items()
        ]
    trees = {
        "eagle": {
            "chain of 4": {"tree": "chain", "depth": "4"},
            "24 nodes, 5 levels": {"tree": "dynamic", "depth": "5", "top_k": "8", "total_tokens": "24"},
        },
        "medusa": {"chain of 4": {"tree": "chain", "heads": "4"}, "63 drafts": {"tree": "mc_sim_7b_63", "heads": "4"}},
    }[method]
    return [
        Side(method, name, how, {**options, "graphs": how}) for name, options in trees.items() for how in ("on", "off")
    ]


class ForcedDrafter:
    """A drafter at work, the verdicts on whose drafts are forced."""

    def __init__(self, drafter: Any, drafts: Any, prompt_length: int) -> None:
        self._drafter, self._drafts, self._prompt_length = drafter, drafts, prompt_length
        self._index = 0  # of the root among the new tokens, where drafts come in trees

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def propose(self, *given: Any) -> Any:
        """A tree of an EAGLE or Medusa drafter."""
        draft = self._drafter.propose(*given)
        verdicts = self._drafts.forced_verdicts(self._index + 1, draft.tree.num_levels)
        return replace(draft, forced_verdicts=verdicts)

    def accept(self, token_ids: Sequence[int], features: Any) -> None:
        self._index += len(token_ids)
        self._drafter.accept(token_ids, features)

    def successors(self, *given: Any) -> Any:
        """Drafts of an SPD drafter."""
        return [
            found._replace(draft=replace(found.draft, forced_verdict=self._is_right(found.parent)))
            for found in self._drafter.successors(*given)
        ]

    def _is_right(self, parent: Any) -> bool:
        return bool(self._drafts.favourable(parent.position + 1 - self._prompt_length))


@dataclass(frozen=True)
class Sample:
    """One turn of a side: its counted steps, and what they took together."""

    seconds: float
    steps: tuple[Step, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(step.token_ids) for step in self.steps)


class LoadedSide:
    """A side that can be measured at any acceptance."""

    def __init__(self, side: Side, target: RandomTarget, settings: Settings) -> None:
        kind = BACKENDS[side.method]
        context = BackendContext(side.method, cast(Any, target), "random", (settings.device,), 1, seed=0)
        self.side = side
        self._settings, self._target = settings, target
        self._backend: Backend = kind(parse_options(side.method, kind.Options, side.options), context)
        self._backend.load()
        self._new_drafter: Callable[[GenerationRequest], Any] = getattr(self._backend, "_new_drafter", lambda _: None)

    def measure(self, acceptance: float | None) -> Sample:
        """One request, up to the counted number of tokens."""
        settings, vocab_size = self._settings, self._target.config.vocab_size
        prompt = tuple((7919 * index + 13) % vocab_size for index in range(settings.prompt_tokens))
        request = GenerationRequest(prompt, (), settings.tokens + SPARE_TOKENS, Sampling(), 0, frozenset())
        if acceptance is not None:
            choice = parse_drafter(f"forced:{acceptance}")
            drafts = synthetic_drafts(choice, 0, self._target.decoder, request)
            forced = ForcedDrafter(self._new_drafter(request), drafts, len(prompt))
            self._backend._new_drafter = lambda _: forced  # type: ignore[attr-defined]
        found: list[Step] = []
        with closing(cast(Any, self._backend.generate(request))) as steps:
            for _ in range(SKIPPED_STEPS):
                next(steps)
            began = time.perf_counter()
            num_tokens = 0
            while num_tokens < settings.tokens:
                found.append(next(steps))
                num_tokens += len(found[-1].token_ids)
            if settings.on_gpu:
                torch.cuda.synchronize()
            return Sample(time.perf_counter() - began, tuple(found))

    def row(self, case: Case, base: Sequence[Sample], bandwidth: float) -> dict[str, Any]:
        """One line of the table; `bandwidth` in bytes a second."""
        ms, base_ms = ([each.seconds / each.num_tokens * 1e3 for each in some] for some in (case.samples, base))
        last, decoder = case.samples[-1], self._target.decoder
        layers, whole = (decoder.bytes_per_token(decoder.layers, head=head) for head in (False, True))
        num_bytes: float = whole * len(last.steps)
        if self._backend.kind == "pipeline":  # its stages may have been idle; the head runs once a token
            num_bytes = layers * sum(step.forwards for step in last.steps) + (whole - layers) * last.num_tokens
        return {
            "method": self.side.method,
            "setting": self.side.setting,
            "graphs": self.side.graphs,
            "P": case.acceptance or "",
            "ms_per_token": round(statistics.median(ms), 4),
            "least": round(min(ms), 4),
            "most": round(max(ms), 4),
            "over_vanilla_with_graphs": round(statistics.median(b / a for a, b in zip(ms, base_ms, strict=False)), 3),
            "tokens_per_round": round(last.num_tokens / len(last.steps), 3),
            "share_of_bandwidth": round(num_bytes / last.seconds / bandwidth, 4),
        }


@dataclass(frozen=True)
class Case:
    """A side at one acceptance, and its samples so far."""

    side: LoadedSide
    acceptance: float | None
    samples: list[Sample] = field(default_factory=list)


def run_part(name: str, settings: Settings) -> dict[str, Any]:
    """The part's rows, and a note for each side that failed; it keeps the samples that it has.

    Raises:
        RuntimeError: vanilla with graphs failed, to which all others are compared.
    """
    method, _, shape = name.partition("-")
    bandwidth, target = read_bandwidth_bytes_per_s(settings.device), RandomTarget(shape, settings)
    cases: list[Case] = []
    notes: list[str] = []
    for side in (BASE, *sides_of(method, settings)):
        acceptances = (None,) if side.method == "vanilla" else settings.acceptances
        with dropping(side, notes):
            loaded = LoadedSide(side, target, settings)
            cases += [Case(loaded, acceptance) for acceptance in acceptances]
    running = list(cases)
    for turn in range(1 + settings.rounds):
        for case in list(running):
            with dropping(case.side.side, notes, lambda case=case: running.remove(case)):  # type: ignore[misc]
                sample = case.side.measure(case.acceptance)
                if turn:  # the first one warms up
                    case.samples.append(sample)
    measured = [case for case in cases if case.samples]
    if not measured or measured[0].side.side is not BASE:
        raise RuntimeError("\n".join(notes))
    base = measured[0].samples
    shown = measured if method == "vanilla" else measured[1:]
    return {"rows": [{"shape": shape, **case.side.row(case, base, bandwidth)} for case in shown], "notes": notes}


@contextmanager
def dropping(side: Side, notes: list[str], drop: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Turns an exception into a note: whatever a driver or a compiler raises, one side must not cost the others."""
    try:
        yield
    except Exception:
        drop()
        what = " ".join(filter(None, (side.method, side.setting, f"graphs={side.graphs}")))
        notes.append(f"{what}: dropped\n{traceback.format_exc()[-TAIL:].rstrip()}")
