"""What `benchmarks.gpu` measures, part by part: the machine, vanilla, transformers' `generate`, SPD's streams.

A part takes the settings and returns rows and goals. Must not know of processes, files or what other parts found.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from benchmarks.gpu_models import SHAPES, Shape, random_decoder, stages_of
from benchmarks.gpu_running import tail
from benchmarks.sides import Goal, Key, Row, ratio, take_turns, times
from spdbench.decoding.autoregressive import decode
from spdbench.decoding.captured import CapturedDecoding
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.synthetic import parse_drafter, synthetic_drafts
from spdbench.decoding.verify import Draft
from spdbench.measure.environment import environment
from spdbench.models.decoder import Decoder
from spdbench.models.target import DTYPES
from spdbench.pipeline.schedule import Cycle
from spdbench.pipeline.streams import StreamsPipeline
from spdbench.types import GenerationRequest, Sampling, Step
from spdbench_backends.spd.drafter import PipelineDrafter, SyntheticPipelineDrafter
from spdbench_backends.spd.engine import PipelinedDecoding

COPIED_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}
COPIES = 8
LARGEST_TREE = 64
FORCED = (0.7, 0.8, 0.9)
STAGES = (2, 4, 8)
COMPILED = ", compiled"
HEAD_LAYERS = 4
"""What the target's head is taken for in layers where stages are cut for their latency: one large product."""


@dataclass(frozen=True)
class Settings:
    """What all parts are told."""

    device: str
    dtype: str
    shapes: tuple[str, ...]
    prompt_tokens: int
    tokens: int
    rounds: int

    @property
    def where(self) -> torch.device:
        return torch.device(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.where.type == "cuda"

    def request(self, shape: Shape) -> GenerationRequest:
        ids = tuple((7919 * index + 13) % shape.vocab_size for index in range(self.prompt_tokens))
        return GenerationRequest(ids, (), self.tokens, Sampling(), 0, frozenset())

    def decoder(self, shape: Shape) -> Decoder:
        return random_decoder(shape, DTYPES[self.dtype], self.where)


REAL = Settings("cuda:0", "bfloat16", ("0.6B", "1.7B", "4B", "8B"), prompt_tokens=64, tokens=128, rounds=5)
REHEARSAL = Settings("cpu", "float32", ("tiny",), prompt_tokens=8, tokens=16, rounds=1)


@dataclass(frozen=True)
class Found:
    """A part's outcome: rows of one table, and goals."""

    rows: list[Row]
    goals: list[Goal]
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        goals = [{**asdict(goal), "met": goal.met, "text": str(goal)} for goal in self.goals]
        return {"rows": self.rows, "goals": goals, "notes": list(self.notes)}


@dataclass(frozen=True)
class Turn:
    """A turn of a side: seconds a token after the first, and for a method its steps after prefill."""

    seconds: float
    steps: tuple[Step, ...] = ()


def room(request: GenerationRequest) -> int:
    """Tokens that graphs are recorded for: prompt, answer, and the largest tree behind them."""
    return len(request.prompt_ids) + request.max_new_tokens + LARGEST_TREE


def machine(settings: Settings) -> Found:
    """The device, and how fast it copies: what all shares of the bandwidth refer to."""
    found = environment(settings.device)
    versions = found["versions"]
    row = {
        "device": ", ".join(found["gpus"]) or found["cpu"],
        "driver": found["driver"] or "none",
        "cuda": found["cuda"] or "none",
        "python": versions["python"],
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "copy_gb_per_s": round(copy_bandwidth(settings.where) / 1e9, 1),
        "read_gb_per_s": round(found["read_bandwidth_bytes_per_s"] / 1e9, 1),
    }
    return Found([row], [])


@torch.inference_mode()
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, the median of a few, which are far larger than any cache."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(7):
        wait(device)
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        wait(device)
        rates.append(2 * source.nbytes * COPIES / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def vanilla(name: str, settings: Settings) -> Found:
    """Plain decoding without graphs and with them."""
    shape = SHAPES[name]
    decoder, request = settings.decoder(shape), settings.request(shape)
    sides = {"graphs": graphed_side(decoder, request), "eager": lambda: timed_tokens(decode(decoder, request))}
    copy, num_bytes = copy_bandwidth(settings.where), decoder.bytes_per_token(decoder.layers, head=True)
    turns, notes = guarded_turns(sides, settings.rounds)
    rows: list[Row] = [
        {
            "shape": name,
            "side": side,
            **timing(found),
            "over_eager": over(turns.get("eager"), found),
            "gb_per_token": round(num_bytes / 1e9, 3),
            "share_of_copy_bandwidth": round(num_bytes / statistics.median(seconds(found)) / copy, 4),
        }
        for side, found in turns.items()
    ]
    return Found(rows, roofline(name, rows, ""), notes)


def roofline(name: str, rows: Sequence[Row], how: str) -> list[Goal]:
    best = max(row["share_of_copy_bandwidth"] for row in rows if not row.get("P"))
    return [Goal(f"share of the copy bandwidth, vanilla {name}{how}", best, at_least=0.7)] if name == "4B" else []


def over(base: Sequence[Turn] | None, found: Sequence[Turn]) -> str:
    """How many times as fast as `base`; empty where that one failed."""
    return times(ratio(seconds(base), seconds(found))) if base else ""


def generate(name: str, settings: Settings) -> Found:
    """Vanilla with graphs against transformers' `generate` of the same shape, each with random weights of its own."""
    shape = SHAPES[name]
    request = settings.request(shape)
    ours, theirs = "vanilla with graphs", "transformers"
    sides = {ours: graphed_side(settings.decoder(shape), request, whole=True)}
    made, why = attempt(partial(transformers_side, shape, request, settings))
    if made is not None:
        sides[theirs] = made
    turns, notes = guarded_turns(sides, settings.rounds)
    notes += [f"{theirs}: {why}"] if made is None else []
    rows: list[Row] = [{"shape": name, "side": side, **timing(found)} for side, found in turns.items()]
    if turns.keys() != {ours, theirs}:
        return Found(rows, [], notes)
    rows[0]["over_transformers"] = over(turns[theirs], turns[ours])
    faster = ratio(seconds(turns[theirs]), seconds(turns[ours])).median
    goal = Goal(f"times transformers' generate, {name}", faster, at_least=3.0)
    return Found(rows, [goal] if settings.on_gpu else [], notes)


VANILLA = "vanilla", "", 0.0
Sides = dict[tuple[str, str, float], Callable[[], Turn]]
"""By cut, kind of drafts and acceptance."""


def streams(name: str, settings: Settings) -> Found:
    """SPD's stages side by side on one device, with dialled acceptance, against vanilla with graphs."""
    shape = SHAPES[name]
    decoder, request = settings.decoder(shape), settings.request(shape)
    cuts = {f"n={count}": stages_of(shape, count) for count in STAGES}
    cuts["n=4, light end"] = stages_of(shape, 4, head_layers=HEAD_LAYERS)
    makes: dict[str, Callable[[], Sides]] = {
        cut: partial(dialled_sides, decoder, cut, stages, request) for cut, stages in cuts.items()
    }
    makes["n=4 with a head"] = partial(headed_sides, decoder, cuts["n=4"], request)
    return against_vanilla(name, settings, decoder, cuts, makes)


def compiled(name: str, settings: Settings) -> Found:
    """Vanilla and four stages, both fused by torch.compile before they are captured, against vanilla with graphs."""
    shape = SHAPES[name]
    decoder, request = settings.decoder(shape), settings.request(shape)
    cut, vanilla = "n=4" + COMPILED, ("vanilla" + COMPILED, "", 0.0)
    cuts = {cut: stages_of(shape, 4)}
    makes: dict[str, Callable[[], Sides]] = {}
    if settings.on_gpu:
        makes[vanilla[0]] = lambda: {vanilla: graphed_side(decoder, request, compiled=True)}
        makes[cut] = partial(dialled_sides, decoder, cut, cuts[cut], request, compiled=True)
    found = against_vanilla(name, settings, decoder, cuts, makes)
    if not settings.on_gpu:
        return Found(found.rows, [], [*found.notes, "not rehearsed, it makes code for a GPU"])
    return Found(found.rows, [*found.goals, *roofline(name, found.rows, COMPILED)], found.notes)


def against_vanilla(
    name: str,
    settings: Settings,
    decoder: Decoder,
    cuts: Mapping[str, tuple[range, ...]],
    makes: Mapping[str, Callable[[], Sides]],
) -> Found:
    """Rows of all sides that can be made and run. `cuts` has the stages by the sides' first word."""
    sides, notes = {VANILLA: graphed_side(decoder, settings.request(SHAPES[name]))}, []
    for what, make in makes.items():
        made, why = attempt(make)
        notes += [f"{what}: {why}"] if made is None else []
        sides |= made or {}
    copy = copy_bandwidth(settings.where)
    turns, dropped = guarded_turns(sides, settings.rounds, needed=[VANILLA])
    rows = []
    for (cut, drafts, forced), found in turns.items():
        stages = cuts.get(cut, (decoder.layers,))
        row = {"shape": name, "side": cut, "drafts": drafts, "P": forced or "", **timing(found)}
        row |= {"over_vanilla": over(turns[VANILLA], found), "layers": "/".join(str(len(s)) for s in stages)}
        row |= cycles(found, settings.tokens) if forced else {}
        row["share_of_copy_bandwidth"] = round(bytes_read(decoder, found[-1], settings.tokens) / copy, 4)
        rows.append(row)
    return Found(rows, fours_goal(name, turns), [*notes, *dropped])


def fours_goal(name: str, turns: Mapping[tuple[str, str, float], Sequence[Turn]]) -> list[Goal]:
    """The fastest pipeline of four stages over the fastest vanilla of the same part; drafts are free."""
    vanillas = [seconds(found) for (_, _, forced), found in turns.items() if not forced]
    fours = {
        cut: seconds(found)
        for (cut, drafts, forced), found in turns.items()
        if cut.startswith("n=4") and drafts == "free" and forced == max(FORCED)
    }
    if name != "0.6B" or not fours:
        return []
    best = min(fours, key=lambda cut: statistics.median(fours[cut]))
    faster = ratio(min(vanillas, key=statistics.median), fours[best]).median
    return [Goal(f"SPD streams over vanilla, {name}, {best}, P={max(FORCED)}", faster, at_least=1.25)]


def dialled_sides(
    decoder: Decoder, cut: str, stages: tuple[range, ...], request: GenerationRequest, *, compiled: bool = False
) -> Sides:
    """One pipeline with drafts that cost nothing."""
    pipeline = StreamsPipeline(decoder, stages, (), room(request), compiled=compiled)
    return {
        (cut, "free", forced): pipeline_side(pipeline, stages, request, partial(synthetic, decoder, request, forced))
        for forced in FORCED
    }


def headed_sides(decoder: Decoder, stages: tuple[range, ...], request: GenerationRequest) -> Sides:
    """The draft module, untrained, at work beside the stages; its verdicts are dialled all the same."""
    from spdbench_backends.spd.formats import build_head, random_head
    from spdbench_backends.spd.recorded import RecordedDraftModule, RecordedHeadDrafter

    head = build_head(random_head(decoder, stages, 0), decoder, stages)
    module = RecordedDraftModule(head, room(request))
    pipeline = StreamsPipeline(decoder, stages, head.plan.anchors, room(request), module)

    class Forced(RecordedHeadDrafter):
        """A head whose drafts' verdicts are forced."""

        def __init__(self, forced: float) -> None:
            super().__init__(head, module, pipeline.drafted)
            self._dial = synthetic(decoder, request, forced)
            self._dial.start({}, len(request.prompt_ids), 0)

        def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
            forced = self._dial.draft(cycle, sampler).forced_verdict
            return replace(super().draft(cycle, sampler), forced_verdict=forced)

    return {
        ("n=4", "head", forced): pipeline_side(pipeline, stages, request, partial(Forced, forced)) for forced in FORCED
    }


def synthetic(decoder: Decoder, request: GenerationRequest, forced: float) -> SyntheticPipelineDrafter:
    return SyntheticPipelineDrafter(synthetic_drafts(parse_drafter(f"forced:{forced}"), 0, decoder, request))


def graphed_side(
    decoder: Decoder, request: GenerationRequest, *, compiled: bool = False, whole: bool = False
) -> Callable[[], Turn]:
    """`whole`: prefill counts."""
    decoding = CapturedDecoding(decoder, room(request), compiled=compiled)
    return lambda: timed_tokens(decoding.decode(request), whole=whole)


def pipeline_side(
    pipeline: StreamsPipeline,
    stages: tuple[range, ...],
    request: GenerationRequest,
    new_drafter: Callable[[], PipelineDrafter],
) -> Callable[[], Turn]:
    return lambda: timed_steps(PipelinedDecoding(pipeline, stages, new_drafter(), request).steps())


def transformers_side(shape: Shape, request: GenerationRequest, settings: Settings) -> Callable[[], Turn]:
    from transformers import AutoModelForCausalLM, Qwen3Config

    from spdbench.models.hf import library

    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with library.quiet(), torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.dtype]).eval()
    inputs = torch.tensor([request.prompt_ids], device=settings.device)
    mask = torch.ones_like(inputs)

    @torch.inference_mode()
    def side() -> Turn:
        with library.quiet():
            wait(settings.where)
            began = time.perf_counter()
            ids = model.generate(
                inputs, attention_mask=mask, max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0
            )
            count = len(ids[0].tolist()) - len(request.prompt_ids)
        assert count == request.max_new_tokens
        return Turn((time.perf_counter() - began) / count)

    return side


def timed_tokens(tokens: Iterator[int], *, whole: bool = False) -> Turn:
    began = time.perf_counter()
    next(tokens)
    if not whole:
        began = time.perf_counter()
    count = sum(1 for _ in tokens)
    return Turn((time.perf_counter() - began) / (count + int(whole)))


def timed_steps(steps: Iterator[Step]) -> Turn:
    next(steps)
    began = time.perf_counter()
    found = tuple(steps)
    return Turn((time.perf_counter() - began) / sum(len(step.token_ids) for step in found), found)


def seconds(turns: Sequence[Turn]) -> list[float]:
    return [turn.seconds for turn in turns]


def timing(turns: Sequence[Turn]) -> Row:
    found = seconds(turns)
    middle = statistics.median(found)
    return {
        "ms_per_token": round(middle * 1e3, 4),
        "fastest": round(min(found) * 1e3, 4),
        "slowest": round(max(found) * 1e3, 4),
        "tokens_per_s": round(1 / middle, 1),
    }


def cycles(turns: Sequence[Turn], tokens: int) -> Row:
    """Decode tokens a cycle, and what a cycle takes, full and filling ones together."""
    count = len(turns[-1].steps)
    per_cycle = statistics.median(seconds(turns)) * (tokens - 1) / count
    return {"tokens_per_cycle": round((tokens - 1) / count, 4), "ms_per_cycle": round(per_cycle * 1e3, 4)}


def bytes_read(decoder: Decoder, turn: Turn, tokens: int) -> float:
    """Of the target's weights, a second: layers as often as steps ran them, the head once a token."""
    layers = decoder.bytes_per_token(decoder.layers, head=False)
    head = decoder.bytes_per_token(decoder.layers, head=True) - layers
    forwards = sum(step.forwards for step in turn.steps) if turn.steps else tokens - 1
    return (forwards * layers + (tokens - 1) * head) / (turn.seconds * (tokens - 1))


def attempt(make: Callable[[], Any]) -> tuple[Any | None, str]:
    """What was made, or why it could not be: one side's failure must not cost a part's other sides."""
    try:
        return make(), ""
    except Exception as error:  # whatever a compiler or a driver may raise; the note stands below the table
        return None, f"failed\n{tail(error)}"


def guarded_turns(
    sides: Mapping[Key, Callable[[], Turn]], rounds: int, needed: Collection[Key] = ()
) -> tuple[dict[Key, list[Turn]], list[str]]:
    """As `take_turns`, without the sides that failed in any turn, of which the notes tell.

    Raises:
        RuntimeError: one that is `needed` failed, or all did.
    """
    whys: dict[Key, str] = {}

    def guarded(key: Key, side: Callable[[], Turn]) -> Turn:
        if key not in whys:
            found, why = attempt(side)
            if found is not None:
                return cast(Turn, found)
            whys[key] = f"{', '.join(map(str, key)) if isinstance(key, tuple) else key}: dropped, it {why}"
        return Turn(math.nan)

    turns = take_turns({key: partial(guarded, key, side) for key, side in sides.items()}, rounds)
    if whys.keys() >= sides.keys() or not whys.keys().isdisjoint(needed):
        raise RuntimeError("\n".join(whys.values()))
    return {key: found for key, found in turns.items() if key not in whys}, list(whys.values())
