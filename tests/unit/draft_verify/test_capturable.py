"""Captured functions ask for nothing that a capture forbids: no value read by the host, no tensor made of host numbers,
no shape that depends on values. Watched on a CPU, operator by operator, and run on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spdbench.decoding.autoregressive import CapturedDecoding
from spdbench.decoding.tree import named_tree
from spdbench.decoding.tree_builder import DynamicTreeBuilder, StaticTreeBuilder, TreeBuilder, chain_builder
from spdbench.models.cuda.captured_decoder import CapturedDecoder
from spdbench.models.cuda.captured_function import CapturedFunction, CudaGraphs, Work
from spdbench.models.decoder import Decoder
from spdbench.models.load_decoder import load_decoder
from spdbench.models.partition import split_by_counts
from spdbench.models.rotary import plain_frequencies
from spdbench.pipeline.streams import StreamsPipeline
from spdbench_backends.eagle.build import build_eagle, random_eagle
from spdbench_backends.eagle.captured import CapturedRounds
from spdbench_backends.medusa.drafter import build_medusa, capture_draft, random_medusa
from spdbench_backends.spd.formats import build_head, random_head
from spdbench_backends.spd.head import CapturedDraftModule
from tests import tiny

META = torch.device("meta")
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
    """What captured functions do once they are warmed up."""
    watch = Watch()

    def capture(_: CudaGraphs, work: Work) -> Work:
        work()
        with watch:
            work()
        return work

    monkeypatch.setattr(CudaGraphs, "capture", capture)
    return watch


def eagle(new_builder: Callable[[torch.device], TreeBuilder]) -> Callable[[Decoder], object]:
    def make(target: Decoder) -> object:
        file = random_eagle(target, 0)
        weights = build_eagle(file, target, aux_convention="auto", rope_theta=None, norm_output="auto")
        columns = target.config.hidden_size * max(1, len(weights.aux))
        return CapturedRounds(weights, columns, new_builder(target.device), 60)

    return make


def medusa(target: Decoder) -> object:
    tree = StaticTreeBuilder(named_tree("mc_sim_7b_63"), target.device)
    return capture_draft(build_medusa(random_medusa(target, 4, 0), target), target, tree)


def streams(target: Decoder) -> object:
    stages = split_by_counts(6, (2, 2, 2))
    head = build_head(random_head(target, stages, 0), target, stages)
    return StreamsPipeline(target, stages, head.plan.anchors, 60, CapturedDraftModule(head, 60))


CAPTURED: dict[str, Callable[[Decoder], object]] = {
    "one token": lambda target: CapturedDecoding(target, 60),
    "rows of a tree": lambda target: CapturedDecoder(target, (1, 8), 60, (0, 3)),
    "streams": streams,
    "eagle, chain": eagle(lambda device: chain_builder(4, device)),
    "eagle, static": eagle(lambda device: StaticTreeBuilder(named_tree("eagle_1"), device)),
    "eagle, dynamic": eagle(lambda _: DynamicTreeBuilder(4, 5, 17)),
    "medusa": medusa,
}


@pytest.mark.parametrize("make", CAPTURED.values(), ids=CAPTURED)
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


class MetaCheckpoint:
    """A checkpoint whose tensors have shapes but no values."""

    directory = Path("meta")

    def __contains__(self, name: str) -> bool:
        return not name.endswith(".bias")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:  # noqa: ARG002
        return torch.empty(shape, device=META)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("make", CAPTURED.values(), ids=CAPTURED)
@torch.inference_mode()
def test_it_needs_no_value_and_makes_no_tensor_on_the_host(target: Decoder, make: Callable[[Decoder], object]) -> None:
    """On the meta device, as on a GPU, layers are torch's, not compiled for a CPU; and reading a value, or mixing in a
    tensor of the host, is an error there."""
    frequencies = plain_frequencies(1e4, target.config.head_dim), 1.0
    checkpoint: Any = MetaCheckpoint()
    make(load_decoder(checkpoint, target.config, frequencies, torch.float32, META))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda given: given + torch.arange(3),
        lambda given: given + given[1].item(),
        lambda given: given[given > 1],
        lambda given: given.new_zeros(given.tolist()),
        lambda given: torch.cat((given, torch.zeros(1))),
        lambda given: given.repeat_interleave(given),
    ],
    ids=["arange", "item", "boolean mask", "tolist", "cat", "shape by value"],
)
def test_such_mistakes_are_errors_on_the_meta_device(mistake: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = torch.arange(3, device=META)
    with pytest.raises((RuntimeError, NotImplementedError)):
        CapturedFunction(CudaGraphs(META), lambda _, given: (mistake(given),), (given,))
