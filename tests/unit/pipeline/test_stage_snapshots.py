"""How far a stage process of a model with recurrent layers works ahead of verdicts, and that it keeps as many states as
that takes: the stage itself, with the test at its pipes."""

from __future__ import annotations

import faulthandler
import multiprocessing
import select
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from spdbench.models.decoder import Decoder
from spdbench.models.kv_cache import HybridCache
from spdbench.models.partition import split_by_counts
from spdbench.models.target import Target
from spdbench.pipeline.processes.messages import NODE_BYTES, Header, Kind, from_bytes, pack_nodes, to_bytes, unpack
from spdbench.pipeline.processes.stage_faults import WAITS
from spdbench.pipeline.processes.transport import LinkClosedError, StagePipes
from spdbench.pipeline.processes.worker import Stage, StageSpec
from spdbench.pipeline.schedule import Node
from tests import tiny

CUT = (1, 2, 1, 2)
"""Each stage has a recurrent layer: layers 2 and 5 are those with attention."""
PROMPT = 1
"""The number that the prompt is sent under; that of new token i is i + 2."""


@pytest.fixture(scope="module", params=tiny.HYBRIDS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return tiny.load(tiny.make_model(tmp_path_factory.mktemp("hybrid"), request.param, seed=3))


class Driven:
    """Stage `index`, and what the stages before it and the controller would send it."""

    def __init__(self, target: Target, cut: tuple[int, ...], index: int) -> None:
        self.decoder: Decoder = target.own_decoder
        self.layers = split_by_counts(6, cut)[index]
        spec = StageSpec(index, len(cut), self.layers, target.source, "cpu", 1, None, (), "pipe", 60.0)
        self.out, outbox = multiprocessing.Pipe(duplex=False)
        self.reported, reports = multiprocessing.Pipe(duplex=False)
        control, self.control = multiprocessing.Pipe(duplex=False)
        self.spec, unused = spec, cast(Connection, None)  # messages come by `handle`
        self.stage = Stage(spec, StagePipes(unused, None if spec.is_last else outbox, reports, control, unused))
        self._send(Header(Kind.PROMPT, PROMPT, PROMPT, num_rows=len(tiny.PROMPT), value=60), tiny.PROMPT, ())

    @torch.inference_mode()
    def run(self, node: Node, ids: tuple[int, ...], root: int) -> Tensor:
        """Sends a node, whose tokens from the prompt's end on are `ids`; the stage's output for it, `[1, M]`."""
        self._send(Header(Kind.BATCH, node.id, root, num_rows=1), (*tiny.PROMPT, *ids), (node,))
        header, payload = self.answer()
        assert header.batch == node.id
        return from_bytes(payload[NODE_BYTES:], torch.float32, 1, -1)

    def answer(self) -> tuple[Header, bytes]:
        """The newest message: to the next stage, or of the last one to the controller."""
        connection = self.reported if self.spec.is_last else self.out
        assert connection.poll(0), "the stage has computed nothing"
        while connection.poll(0):
            message = connection.recv_bytes()
        return unpack(message)

    @torch.inference_mode()
    def fresh(self, ids: tuple[int, ...]) -> Tensor:
        """What `run` should return, computed from nothing."""
        rows_SM = self._forward((*tiny.PROMPT, *ids), range(self.layers.stop))[-1:]
        return self.decoder.logits(rows_SM) if self.spec.is_last else rows_SM

    def _forward(self, ids: tuple[int, ...], layers: range) -> Tensor:
        decoder = self.decoder
        rows_SM = decoder.embed(decoder.ids(ids))
        return decoder.forward(rows_SM, 0, decoder.new_cache(len(ids), layers), layers)[0] if layers else rows_SM

    @torch.inference_mode()
    def _send(self, header: Header, ids: tuple[int, ...], nodes: tuple[Node, ...]) -> None:
        rows_SM = self._forward(ids, range(self.layers.start))[-header.num_rows :]
        payload = b"" if nodes else np.array(ids, np.int64).tobytes()
        if not self.spec.is_first:
            payload = to_bytes(rows_SM)
        self.stage.handle(header, pack_nodes(nodes) + payload)

    @property
    def cache(self) -> HybridCache:
        assert self.stage._cache is not None
        return cast(HybridCache, self.stage._cache._cache)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(90 + 7 * index for index in range(count))


def node(index: int) -> Node:
    """New token `index` of a chain."""
    return Node(PROMPT + 1 + index, PROMPT + index, tokens(index + 1)[-1], len(tiny.PROMPT) + index)


def work_ahead(driven: Driven, num_ahead: int) -> None:
    """The root, new token 0, and as many drafts behind it."""
    driven.run(node(0), tokens(1), PROMPT)
    for index in range(1, num_ahead + 1):
        found = driven.run(node(index), tokens(index + 1), node(0).id)
        torch.testing.assert_close(found, driven.fresh(tokens(index + 1)), rtol=1e-3, atol=1e-4)


def reject(driven: Driven, num_ahead: int) -> tuple[Tensor, Tensor]:
    """The first draft was wrong: what the stage computes for the target's own token, and what it should."""
    own = Node(node(num_ahead).id + 1, node(0).id, 200, node(1).position)
    driven.control.send_bytes(own.id.to_bytes(8, "little"))
    return driven.run(own, (*tokens(1), 200), own.id), driven.fresh((*tokens(1), 200))


@pytest.mark.parametrize("index", range(len(CUT)))
def test_a_stage_goes_back_as_far_as_it_may_work_ahead(target: Target, index: int) -> None:
    """Stage s of n by n - s tokens, with as many snapshots."""
    driven, most = Driven(target, CUT, index), len(CUT) - index
    assert driven.cache._ring - 1 == most
    work_ahead(driven, most)
    found, expected = reject(driven, most)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("index", range(len(CUT)))
def test_one_snapshot_fewer_is_too_few(target: Target, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    new_cache = Decoder.new_cache
    monkeypatch.setattr(
        Decoder, "new_cache", lambda self, capacity, layers, num=0: new_cache(self, capacity, layers, max(0, num - 1))
    )
    driven, most = Driven(target, CUT, index), len(CUT) - index
    work_ahead(driven, most)
    with pytest.raises(IndexError, match="holds recurrent states back to"):
        reject(driven, most)


class Waits:
    """In place of what a stage waits with for roots: `then` is what happens while it waits."""

    def __init__(self, real: select.poll, then: Callable[[], object]) -> None:
        self._real = real
        self._then = then
        self.count = 0

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        if timeout is None:
            self.count += 1
            self._then()
        return self._real.poll(timeout)


@pytest.mark.parametrize("index", range(len(CUT)))
def test_further_ahead_a_stage_waits_for_the_verdict(target: Target, index: int) -> None:
    driven, most = Driven(target, CUT, index), len(CUT) - index
    work_ahead(driven, most)
    length = driven.cache.length

    def accept() -> None:
        assert driven.cache.length == length
        assert not (driven.reported if driven.spec.is_last else driven.out).poll(0)
        driven.control.send_bytes(node(1).id.to_bytes(8, "little"))

    waits = Waits(driven.stage._control, accept)
    driven.stage._control = cast(select.poll, waits)
    found = driven.run(node(most + 1), tokens(most + 2), node(0).id)
    torch.testing.assert_close(found, driven.fresh(tokens(most + 2)), rtol=1e-3, atol=1e-4)
    assert waits.count == 1


def test_a_token_that_is_dropped_while_it_waits_is_not_computed(target: Target) -> None:
    driven = Driven(target, CUT, 2)
    work_ahead(driven, 2)
    waits = Waits(driven.stage._control, lambda: driven.control.send_bytes((99).to_bytes(8, "little")))
    driven.stage._control = cast(select.poll, waits)
    with pytest.raises(AssertionError, match="has computed nothing"):
        driven.run(node(3), tokens(4), node(0).id)
    assert waits.count == 1


def test_a_stage_that_waits_for_a_verdict_is_not_taken_for_the_one_that_hangs(target: Target, tmp_path: Path) -> None:
    driven, stack = Driven(target, CUT, 2), tmp_path / "stack"
    work_ahead(driven, 2)

    def accept() -> None:
        with stack.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=False)
        driven.control.send_bytes(node(1).id.to_bytes(8, "little"))

    driven.stage._control = cast(select.poll, Waits(driven.stage._control, accept))
    driven.run(node(3), tokens(4), node(0).id)
    assert WAITS.search(stack.read_text())


def test_a_stage_without_recurrent_layers_waits_for_nothing(target: Target) -> None:
    driven = Driven(target, (2, 1, 2, 1), 1)
    work_ahead(driven, 10)


def test_a_controller_that_is_gone_ends_the_wait(target: Target) -> None:
    driven = Driven(target, CUT, 2)
    work_ahead(driven, 2)
    driven.stage._control = cast(select.poll, Waits(driven.stage._control, driven.control.close))
    with pytest.raises(LinkClosedError):
        driven.run(node(3), tokens(4), node(0).id)
