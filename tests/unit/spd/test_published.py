"""Every published kind of head against a plain transcription of its definition, draft by draft."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spdbench.backend import BackendContext, find_backend, parse_options
from spdbench.decoding.autoregressive import decode
from spdbench.decoding.sampling import Sampler
from spdbench.decoding.verify import Draft
from spdbench.errors import InputError
from spdbench.models.partition import split_by_counts
from spdbench.models.target import Target
from spdbench.pipeline.schedule import Cycle, Node
from spdbench_backends.spd.drafter import HeadDrafter
from spdbench_backends.spd.formats import build_head, read_head
from spdbench_backends.spd.head import DraftModule, LastAnchor
from spdbench_backends.spd.plan import GroupPlan, Row, default_groups
from tests import tiny
from tests.unit.spd.inline import generate
from tests.unit.spd.transcription import Transcription, write_head

pytestmark = pytest.mark.usefixtures("own_cache")


@dataclass(frozen=True)
class Case:
    """A model family, and what its head's file says."""

    family: str
    version: int
    counts: tuple[int, ...]
    config: dict[str, Any]


CASES = {
    "v11 qwen3": Case("qwen3", 11, (2, 2, 2), {"trained_with_use_deepest": True}),
    "v11 hybrid, deepest": Case("qwen3_5_text", 11, (2, 2, 2), {"trained_with_use_deepest": True}),
    "v11 hybrid, nominal": Case("qwen3_5_text", 11, (2, 2, 2), {"model_type": "qwen3_5"}),
    "v11 hybrid mixture": Case(
        "qwen3_5_moe_text",
        11,
        (3, 3),
        {"num_stages": 2, "aggr_feature_bound": [0, 3, 6], "spec_intermediate_size_fallback": 40, "ffn": 40},
    ),
    "v12 qwen3": Case(
        "qwen3", 12, (1, 2, 3), {"stage_layers": [1, 2, 3], "aggr_feature_bound": [0, 1, 3, 6], "num_layers": 6}
    ),
    "v12 hybrid, deepest": Case(
        "qwen3_5_text",
        12,
        (1, 3, 2),
        {"stage_layers": "1;3;2", "aggr_feature_bound": [0, 1, 4, 6], "trained_with_use_deepest": True},
    ),
    "v10 llama": Case("llama", 10, (2, 2, 2), {}),
    "v10 hybrid": Case("qwen3_5_text", 10, (1,) * 6, {"num_stages": 6}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = dict.fromkeys(case.family for case in CASES.values())
    return {family: tiny.make_model(root / family, family, seed=3) for family in families}


class Transcribed(HeadDrafter):
    """Drafts like its parent, and each time by the transcription as well. Half of its drafts are made right, so that
    pipelines fill, complete and flush."""

    def __init__(self, file: Path, folder: Path, target: Target, counts: tuple[int, ...], answer: list[int]) -> None:
        stages = split_by_counts(6, counts)
        super().__init__(build_head(read_head(file), target.own_decoder, stages))
        self.features: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self.plain = Transcription(file, folder, self.features)
        self.answer, self.prompt_length, self.num_checked = answer, 0, 0
        self.completed: int | None = None
        self.last_logits = torch.empty(0)

    def start(self, states: Mapping[int, Tensor], prompt_length: int, capacity: int) -> None:
        self.prompt_length = prompt_length
        for position in range(prompt_length):
            self.features[position].update({index: state[position].clone() for index, state in states.items()})
        super().start(states, prompt_length, capacity)
        self.plain.start(prompt_length)

    def observe(self, node: Node, states: Mapping[int, Tensor]) -> None:
        self.features[node.position].update({index: state[0].clone() for index, state in states.items()})
        super().observe(node, states)

    def rollback(self, length: int) -> None:
        for position in [p for p in self.features if p >= length]:
            del self.features[position]
        self.completed = None
        self.plain.rejected(length)
        super().rollback(length)

    def draft(self, cycle: Cycle, sampler: Sampler) -> Draft:
        newest = cycle.newest
        assert newest is not None
        self.plain.evicted = self.completed
        self.completed = None if cycle.completing is None else cycle.completing.position
        expected = self.plain.logits(newest.position)
        draft = super().draft(cycle, sampler)
        torch.testing.assert_close(self.last_logits.double(), expected, rtol=1e-3, atol=1e-3)
        assert draft.token_id == self.plain.head["draft_token_ids"][int(expected.argmax())]
        self.num_checked += 1
        index = newest.position + 1 - self.prompt_length
        return Draft(self.answer[index]) if index < len(self.answer) and index % 4 else draft

    def _draft(self, logits_U: Tensor, sampler: Sampler) -> Draft:
        self.last_logits = logits_U.clone()
        return super()._draft(logits_U, sampler)


@pytest.mark.parametrize("name", CASES)
def test_every_draft_is_that_of_the_transcription(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    case = CASES[name]
    folder = folders[case.family]
    file = write_head(tmp_path / "head.pt", folder, case.version, **case.config)
    target, request = tiny.load(folder), tiny.greedy(tiny.PROMPT, 30)
    answer = list(decode(target.decoder, request))
    drafter = Transcribed(file, folder, target, case.counts, answer)
    steps = list(generate(target.own_decoder, split_by_counts(6, case.counts), drafter, request))
    assert [token for step in steps for token in step.token_ids] == answer
    assert drafter.num_checked > 25
    accepted, judged = sum(step.accepted for step in steps), sum(step.judged for step in steps)
    assert 10 < accepted < judged


@pytest.mark.parametrize("name", CASES)
def test_heads_run_as_a_user_runs_them(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """The stages are those of the head, whose config says how many layers they have where they are uneven."""
    case = CASES[name]
    target = tiny.load(folders[case.family])
    file = write_head(tmp_path / "head.pt", folders[case.family], case.version, **case.config)
    spd = find_backend("spd")
    context = BackendContext("spd", target, str(file), ("cpu",), 1, seed=0)
    backend = spd(parse_options("spd", spd.Options, {"executor": "inline"}), context)
    backend.load()
    request = tiny.greedy(tiny.PROMPT, 20)
    backend.prepare(request)
    assert [t for step in backend.generate(request) for t in step.token_ids] == list(decode(target.decoder, request))
    assert backend.describe().stage_layers == case.counts


def logits(module: DraftModule, states: Mapping[int, Tensor], last: Mapping[int, Tensor]) -> Tensor:
    module.start(4, states, 6)
    module.observe(4, last)
    return module.logits([Row(4, 3), Row(5, 0)])


def test_the_last_layers_output_may_be_read_after_the_final_norm(folders: dict[str, Path], tmp_path: Path) -> None:
    decoder = tiny.load(folders["qwen3_5_text"]).own_decoder
    file = read_head(write_head(tmp_path / "head.pt", folders["qwen3_5_text"], 11))
    stages = split_by_counts(6, [2, 2, 2])
    torch.manual_seed(0)
    states = {index: torch.randn(6, 32) for index in (0, 2, 5, 6)}
    last = {6: torch.randn(1, 32)}
    normed = {**states, 6: decoder.normed(states[6]).clone()}, {6: decoder.normed(last[6]).clone()}
    plain = build_head(file, decoder, stages)
    expected: dict[LastAnchor, Tensor] = {
        "plain": logits(plain.new_module(10), states, last),
        "normed_prompt": logits(plain.new_module(10), normed[0], last),
        "normed": logits(plain.new_module(10), *normed),
    }
    for how, wanted in expected.items():
        found = logits(build_head(file, decoder, stages, how).new_module(10), states, last)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert len({tuple(each.tolist()) for each in expected.values()}) == 3
    unread = read_head(write_head(tmp_path / "b.pt", folders["qwen3_5_text"], 11, aggr_feature_bound=[0, 2, 5]))
    with pytest.raises(InputError, match=r"does not read the last layer's output: its anchors are \[0, 2, 5\]"):
        build_head(unread, decoder, stages, "normed")


@pytest.mark.parametrize(
    ("version", "change", "why"),
    [
        (11, {"model_type": "qwen3"}, "config.model_type is qwen3, but here it is qwen3_5"),
        (11, {"model_type": "qwen3_5_moe_text"}, "config.model_type is qwen3_5_moe, but here it is qwen3_5"),
        (11, {"hidden_size": 64}, "config.hidden_size is 64, but here it is 32"),
        (11, {"vocab_size": 1000}, "config.vocab_size is 1000, but here it is 262"),
        (11, {"num_layers": 32}, "config.num_layers is 32, but here it is 6"),
        (11, {"aggr_feature_bound": [0, 8, 24, 32]}, "anchor 32 lies beyond the model's 6 layers"),
        (11, {"num_stages": 2, "aggr_feature_bound": [0, 6]}, "num_stages is 2, but here it is 3; use -o spd.stages=2"),
        (12, {"stage_layers": [1, 2, 2]}, "stage_layers=1,2,2: adds up to 5 layers, but the model has 6"),
        (12, {}, "config.stage_layers is missing, which a head of version 12 has to list"),
        (10, {"shallow_hidden_layer_indices": [[0, 6], [0, 2]]}, "2 groups do not fit 3 stages"),
        (
            10,
            {"shallow_hidden_layer_indices": [[0, 4], [0, 5], [0, 2]]},
            r"group \[0, 5\] .* passed 2 stages .* 0 to 4",
        ),
        (9, {}, "config.version 9 is not known. Allowed: 11, 12, 10"),
    ],
)
def test_a_head_for_something_else_says_what_differs(
    folders: dict[str, Path], tmp_path: Path, version: int, change: dict[str, Any], why: str
) -> None:
    decoder = tiny.load(folders["qwen3_5_text"]).own_decoder
    file = write_head(tmp_path / "head.pt", folders["qwen3_5_text"], version, **change)
    with pytest.raises(InputError, match=why):
        build_head(read_head(file), decoder, split_by_counts(6, [2, 2, 2]))


def test_a_head_without_gates_does_not_fit_a_model_with_them(folders: dict[str, Path], tmp_path: Path) -> None:
    content = torch.load(write_head(tmp_path / "head.pt", folders["qwen3_5_text"], 11), weights_only=True)
    name = "spec_layers.0.self_attn.q_proj.weight"
    content["state_dict"][name] = content["state_dict"][name][:32].clone()
    torch.save(content, tmp_path / "head.pt")
    with pytest.raises(InputError, match=r"q_proj.weight has shape \[32, 32\], expected \[64, 32\]"):
        build_head(
            read_head(tmp_path / "head.pt"), tiny.load(folders["qwen3_5_text"]).own_decoder, split_by_counts(6, [2] * 3)
        )


def test_the_usual_groups() -> None:
    assert default_groups(32, 4) == ((0, 8), (0, 8, 16), (0, 8, 16, 24), (0, 10, 20, 30))
    GroupPlan(default_groups(32, 4), split_by_counts(32, [8] * 4))
