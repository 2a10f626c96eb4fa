"""EAGLE and Medusa with untrained heads and dialled acceptance: what drafting and verifying cost on a GPU.

Must not know what other parts measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.gpu_models import SHAPES
from benchmarks.gpu_parts import (
    FORCED,
    Found,
    Settings,
    Turn,
    attempt,
    graphed_side,
    guarded_turns,
    over,
    room,
    timing,
    wait,
)
from benchmarks.sides import Row
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.speculate import Drafter, Features, Speculation
from spdbench.decoding.synthetic import SyntheticDrafts, parse_drafter, synthetic_drafts
from spdbench.decoding.tree import DraftTree, Path, chain_paths, named_tree
from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, TreeBuilder, chain_builder
from spdbench.models.cuda.captured_decoder import CapturedDecoder
from spdbench.models.decoder import Decoder
from spdbench.models.interface import TargetDecoder
from spdbench.types import GenerationRequest, Step
from spdbench_backends.eagle.build import build_eagle, random_eagle
from spdbench_backends.eagle.drafter import EagleDrafter
from spdbench_backends.eagle.recorded import RecordedEagle, RecordedEagleDrafter
from spdbench_backends.medusa.build import build_medusa, random_medusa
from spdbench_backends.medusa.drafter import MedusaDrafter
from spdbench_backends.medusa.recorded import RecordedMedusa, RecordedMedusaDrafter

NewDrafter = Callable[[], Drafter]

MOST_LEVELS = 5
VANILLA = "vanilla", "graphs", 0.0


class Forced:
    """A drafter whose drafts' verdicts are forced."""

    def __init__(self, drafter: Drafter, drafts: SyntheticDrafts) -> None:
        self.hidden_indices, self.max_nodes = drafter.hidden_indices, drafter.max_nodes
        self._drafter, self._drafts = drafter, drafts
        self._index = 0

    def start(self, prompt_ids: Sequence[int], features: Features, root: int) -> None:
        self._drafter.start(prompt_ids, features, root)

    def propose(self, max_levels: int, sampler: Sampler) -> DraftTree:
        draft = self._drafter.propose(max_levels, sampler)
        return replace(draft, forced_verdicts=self._drafts.forced_verdicts(self._index + 1, draft.tree.num_levels))

    def accept(self, token_ids: Sequence[int], features: Features) -> None:
        self._index += len(token_ids)
        self._drafter.accept(token_ids, features)


@dataclass(frozen=True)
class Setting:
    """One tree: a drafter that launches its steps one by one, the same one recorded, and the most nodes."""

    plain: NewDrafter
    recorded: Callable[[], NewDrafter]
    num_nodes: int


def eagle(name: str, settings: Settings) -> Found:
    """EAGLE-3's head: a chain, and a dynamic tree."""
    decoder, capacity = settings.decoder(SHAPES[name]), room(longer(settings.request(SHAPES[name])))
    file = random_eagle(decoder, 0)
    weights = build_eagle(file, decoder, aux_convention="auto", rope_theta=None, norm_output="auto")

    def setting(builder: TreeBuilder) -> Setting:
        def recorded() -> NewDrafter:
            module = RecordedEagle(weights, decoder, builder, capacity)
            return lambda: RecordedEagleDrafter(weights, decoder, builder, module)

        plain = partial(EagleDrafter, weights, decoder, builder, capacity)
        return Setting(plain, recorded, builder.max_nodes)

    trees = {
        "chain of 4": setting(chain_builder(4, decoder.device)),
        "24 nodes, 5 levels": setting(DynamicTreeBuilder(MOST_LEVELS, 8, 24)),
    }
    return compare(name, "eagle", decoder, settings, trees, weights.aux)


def medusa(name: str, settings: Settings) -> Found:
    """Four heads: a chain, and the published tree of 63 drafts."""
    decoder = settings.decoder(SHAPES[name])
    weights = build_medusa(random_medusa(decoder, 4, 0), decoder)

    def setting(paths: Sequence[Path]) -> Setting:
        builder = StaticTreeBuilder(paths, decoder.device)

        def recorded() -> NewDrafter:
            heads = RecordedMedusa(weights, decoder, builder)
            return lambda: RecordedMedusaDrafter(weights, decoder, builder, heads)

        plain = partial(MedusaDrafter, weights, decoder, builder)
        return Setting(plain, recorded, builder.max_nodes)

    trees = {"chain of 4": setting(chain_paths(4)), "63 drafts": setting(named_tree("mc_sim_7b_63"))}
    return compare(name, "medusa", decoder, settings, trees, ())


def compare(
    name: str,
    method: str,
    decoder: Decoder,
    settings: Settings,
    trees: Mapping[str, Setting],
    hidden_indices: Sequence[int],
) -> Found:
    """Every tree without graphs, with the target's forwards recorded, and with the drafts' steps recorded as well,
    against vanilla with graphs."""
    request, notes = longer(settings.request(SHAPES[name])), []
    sides: dict[tuple[str, str, float], Callable[[], Turn]] = {
        VANILLA: graphed_side(decoder, settings.request(SHAPES[name]))
    }
    for tree, setting in trees.items():
        ways: dict[str, tuple[TargetDecoder, NewDrafter]] = {"eager": (decoder, setting.plain)}
        made, why = attempt(partial(CapturedDecoder, decoder, (1, setting.num_nodes), room(request), hidden_indices))
        if made is None:
            notes.append(f"{method}, {tree}, target: {why}")
        else:
            ways["target"] = made, setting.plain
            drafter, why = attempt(setting.recorded)
            notes += [f"{method}, {tree}, drafts: {why}"] if drafter is None else []
            ways |= {} if drafter is None else {"target and drafts": (made, drafter)}
        for forced in FORCED:
            drafts = synthetic_drafts(parse_drafter(f"forced:{forced}"), 0, decoder, request)
            for way, (target, new) in ways.items():
                sides[tree, way, forced] = partial(turn, target, new, drafts, request, settings.tokens)
    turns, dropped = guarded_turns(sides, settings.rounds, needed=[VANILLA])
    rows: list[Row] = [
        {
            "shape": name,
            "method": method if forced else "vanilla",
            "tree": tree if forced else "",
            "recorded": way,
            "P": forced or "",
            **timing(found),
            "over_vanilla": over(turns[VANILLA], found),
            "tokens_per_round": tokens_per_round(found[-1]) if forced else 1.0,
        }
        for (tree, way, forced), found in turns.items()
    ]
    return Found(rows, [], [*notes, *dropped])


def tokens_per_round(found: Turn) -> float:
    return round(sum(len(step.token_ids) for step in found.steps) / len(found.steps), 3)


def longer(request: GenerationRequest) -> GenerationRequest:
    """A request for more than is counted: so many rounds have room for a whole tree that none is cut."""
    return replace(request, max_new_tokens=request.max_new_tokens + 2 * (MOST_LEVELS + 1))


def turn(
    target: TargetDecoder, new: NewDrafter, drafts: SyntheticDrafts, request: GenerationRequest, tokens: int
) -> Turn:
    """Rounds of whole trees until there are `tokens`: neither the first one, in which EAGLE reads the prompt, nor those
    near the limit, whose trees are cut and were not recorded."""
    steps = Speculation(target, Forced(new(), drafts), request).steps()
    for _ in range(2):
        next(steps)
    began = time.perf_counter()
    found: list[Step] = []
    while (count := sum(len(step.token_ids) for step in found)) < tokens:
        found.append(next(steps))
    wait(target.device)
    return Turn((time.perf_counter() - began) / count, tuple(found))
