"""Recorded work asks for nothing that a capture forbids: no number read by the host, no tensor made of its numbers, and
no result whose size hangs on what tensors hold. Watched on a CPU, operator by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spdbench.decoding.captured import CapturedDecoding
from spdbench.decoding.tree import named_tree
from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, TreeBuilder, chain_builder
from spdbench.models.cuda.captured_decoder import CapturedDecoder
from spdbench.models.cuda.captured_function import CudaGraphs, Work
from spdbench.models.decoder import Decoder
from spdbench.models.partition import split_by_counts
from spdbench.pipeline.streams import StreamsPipeline
from spdbench_backends.eagle.build import build_eagle, random_eagle
from spdbench_backends.eagle.captured import CapturedRounds
from spdbench_backends.medusa.build import build_medusa, random_medusa
from spdbench_backends.medusa.drafter import capture_draft
from spdbench_backends.spd.captured import CapturedDraftModule
from spdbench_backends.spd.formats import build_head, random_head
from tests import tiny

FORBIDDEN = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave", "lift_fresh", "scalar_tensor", "_pin_memory",
}  # fmt: skip


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder: Path = tiny.make_model(tmp_path_factory.mktemp("capturable") / "qwen3", "qwen3")
    return tiny.load(folder).own_decoder


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """What recorded work does once it has been warmed up."""
    watch = Watch()

    def capture(_: CudaGraphs, work: Work) -> Work:
        work()
        with watch:
            work()
        return work

    monkeypatch.setattr(CudaGraphs, "capture", capture)
    return watch


def eagle(builder: TreeBuilder) -> Callable[[Decoder], object]:
    def make(target: Decoder) -> object:
        file = random_eagle(target, 0)
        weights = build_eagle(file, target, aux_convention="auto", rope_theta=None, norm_output="auto")
        columns = target.config.hidden_size * max(1, len(weights.aux))
        return CapturedRounds(weights, columns, builder, 60)

    return make


def medusa(target: Decoder) -> object:
    tree = StaticTreeBuilder(named_tree("mc_sim_7b_63"), target.device)
    return capture_draft(build_medusa(random_medusa(target, 4, 0), target), target, tree)


def streams(target: Decoder) -> object:
    stages = split_by_counts(6, (2, 2, 2))
    head = build_head(random_head(target, stages, 0), target, stages)
    return StreamsPipeline(target, stages, head.plan.anchors, 60, CapturedDraftModule(head, 60))


RECORDED: dict[str, Callable[[Decoder], object]] = {
    "one token": lambda target: CapturedDecoding(target, 60),
    "rows of a tree": lambda target: CapturedDecoder(target, (1, 8), 60, (0, 3)),
    "streams": streams,
    "eagle, chain": eagle(chain_builder(4, torch.device("cpu"))),
    "eagle, static": eagle(StaticTreeBuilder(named_tree("eagle_1"), torch.device("cpu"))),
    "eagle, dynamic": eagle(DynamicTreeBuilder(4, 5, 17)),
    "medusa": medusa,
}


@pytest.mark.parametrize("make", RECORDED.values(), ids=RECORDED)
def test_nothing_in_it_waits_for_the_host(target: Decoder, watch: Watch, make: Callable[[Decoder], object]) -> None:
    with torch.inference_mode():
        make(target)
    assert sum(watch.seen.values()) > 0
    assert not FORBIDDEN & watch.seen.keys()


def test_the_watch_sees_what_is_forbidden(watch: Watch) -> None:
    numbers = torch.arange(3)

    def work() -> None:
        assert int(numbers[1]) == len(torch.tensor([1]))
        numbers.nonzero()

    CudaGraphs(torch.device("cpu")).capture(work)
    assert {"_local_scalar_dense", "lift_fresh", "nonzero"} <= watch.seen.keys()
