"""The loop on a tiny model: it learns, resumes exactly after a kill, and ends in time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spdbench.errors import InputError, SpdbenchError
from spdbench.models.decoder import Decoder
from spdbench.training import checkpoint
from spdbench.training.checkpoint import State
from spdbench.training.features import Features
from spdbench.training.log import TrainingLog
from spdbench.training.loop import Training
from spdbench.training.recipe import Batch, Counts, Teacher
from spdbench.training.schedule import Data, Plan
from spdbench.training.tokens import TokenSequence
from spdbench_backends.spd.train import SPDRecipe, SPDTrainOptions

pytestmark = pytest.mark.usefixtures("own_cache")

PLAN = Plan(3, None, rate=3e-3, seed=0, batch_tokens=64, warmup_steps=3, seconds_between_saves=0.0)


@pytest.fixture(scope="module")
def teacher(decoder: Decoder) -> Teacher:
    return Teacher(decoder)


@pytest.fixture(scope="module")
def sequences(decoder: Decoder) -> list[TokenSequence]:
    """Texts of the model's own, the first four tokens of each given."""
    found = []
    for first in range(16):
        ids = [first + 30, first + 31, first + 32, first + 33]
        cache = decoder.new_cache(64)
        unread = ids[:]
        for _ in range(8 + first % 5):
            hidden, _ = decoder.forward(decoder.embed(decoder.ids(unread)), cache.length, cache)
            unread = [int(decoder.logits(hidden[-1:]).argmax())]
            ids += unread
        found.append(TokenSequence(tuple(ids), tuple(place >= 4 for place in range(len(ids)))))
    return found


class Run:
    """Trainings on the same data in one folder."""

    def __init__(self, teacher: Teacher, sequences: list[TokenSequence], folder: Path) -> None:
        self.teacher, self.sequences, self.folder = teacher, sequences, folder
        folder.mkdir(exist_ok=True)

    def recipe(self) -> SPDRecipe:
        torch.manual_seed(5)
        return SPDRecipe(SPDTrainOptions(), self.teacher, None, 3)

    def __call__(
        self,
        recipe: SPDRecipe,
        plan: Plan = PLAN,
        *,
        resume: bool = False,
        held_out: int = 2,
        kept: bool = True,
        **more: Any,
    ) -> State:
        features = Features(self.teacher.decoder, self.sequences, recipe.hidden_indices)
        if kept:
            features.keep_on_disk(self.folder)
        lengths = [len(sequence.ids) for sequence in self.sequences]
        data = Data(lengths, range(held_out, 16), range(held_out))
        training = Training(recipe, features, data, plan, self.folder, {"seed": plan.seed}, **more)
        return training.run(resume=resume)

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "train.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if not key.endswith(("_s", "seconds"))} for line in lines]


@pytest.fixture
def run(teacher: Teacher, sequences: list[TokenSequence], tmp_path: Path) -> Run:
    return Run(teacher, sequences, tmp_path / "run")


@pytest.fixture
def whole(teacher: Teacher, sequences: list[TokenSequence], tmp_path: Path) -> Run:
    """A run that is never interrupted."""
    return Run(teacher, sequences, tmp_path / "whole")


class KilledError(BaseException):
    """Stands for a kill: nothing is saved when it is raised."""


class Mortal(SPDRecipe):
    """Dies at its `steps`-th loss."""

    left = 7

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        self.left -= 1
        if not self.left:
            raise KilledError
        return super().loss(batch)


def assert_resumes_exactly(run: Run, whole: Run) -> None:
    """Resumes `run`: the same log and the same weights as those of one that was never stopped."""
    expected = whole.recipe()
    whole(expected)
    torch.manual_seed(99)  # what a new process draws first must not matter
    resumed = run.recipe()
    run(resumed, resume=True)
    assert run.log == whole.log
    for name, weight in expected.module.state_dict().items():
        assert torch.equal(weight, resumed.module.state_dict()[name]), name


def test_loss_falls_and_the_log_records_it(run: Run) -> None:
    state = run(run.recipe(), replace(PLAN, epochs=20, budget_s=None))
    losses = [line["loss"] for line in run.log if "loss" in line]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert state.step == len(losses)
    assert state.best_score == max(line["acceptance"][0] for line in run.log if "acceptance" in line)
    assert run.log[0] == {"seed": 0}


@pytest.mark.parametrize(("from_scratch", "fits"), [(True, 1), (False, 0)])
def test_weights_that_are_given_are_not_fitted_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, from_scratch: bool, fits: int
) -> None:
    fitted: list[SPDRecipe] = []
    monkeypatch.setattr(SPDRecipe, "fit", lambda self, _batches: fitted.append(self))
    run(run.recipe(), from_scratch=from_scratch)
    assert len(fitted) == fits


def test_a_killed_run_resumes_to_the_same_curve_and_weights(run: Run, whole: Run, teacher: Teacher) -> None:
    torch.manual_seed(5)
    with pytest.raises(KilledError):
        run(Mortal(SPDTrainOptions(), teacher, None, 3), replace(PLAN, seconds_between_saves=1e-9))
    assert_resumes_exactly(run, whole)


class Stopped(SPDRecipe):
    """Is interrupted at its seventh loss, when it has drawn what it wanted of torch's generator."""

    left = 7

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        found = super().loss(batch)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return found


def test_a_run_interrupted_within_a_step_keeps_the_whole_step_before(run: Run, whole: Run, teacher: Teacher) -> None:
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        run(Stopped(SPDTrainOptions(), teacher, None, 3), replace(PLAN, seconds_between_saves=1e9))
    assert torch.load(run.folder / checkpoint.NAME)["state"]["step"] == 6
    assert_resumes_exactly(run, whole)


def test_a_run_interrupted_within_an_update_keeps_the_checkpoint_before(
    run: Run, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[torch.optim.Optimizer] = []

    def stopped(self: torch.optim.AdamW, set_to_none: bool = True) -> None:
        steps.append(self)
        if len(steps) == 5:
            raise KeyboardInterrupt
        torch.optim.Optimizer.zero_grad(self, set_to_none)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "zero_grad", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(run.recipe())
    assert torch.load(run.folder / checkpoint.NAME)["state"]["step"] == 4
    assert_resumes_exactly(run, whole)


def test_a_line_that_an_interruption_cut_is_rewritten(run: Run, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = TrainingLog.write

    def cut(self: TrainingLog, line: Mapping[str, Any]) -> None:
        if line.get("step") == 5:
            self._file.write(b'{"step"')
            raise KeyboardInterrupt
        write(self, line)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLog, "write", cut)
        with pytest.raises(KeyboardInterrupt):
            run(run.recipe())
    assert_resumes_exactly(run, whole)


def test_an_interrupted_evaluation_leaves_no_counts_in_the_module(run: Run, teacher: Teacher) -> None:
    class Counting(SPDRecipe):
        def acceptance(self, batch: Batch) -> Counts:
            counted = self.module.get_buffer("counted")
            counted += 1
            if int(counted) == 4:
                raise KeyboardInterrupt
            return super().acceptance(batch)

    recipe = Counting(SPDTrainOptions(), teacher, None, 3)
    recipe.module.register_buffer("counted", torch.zeros(()))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, replace(PLAN, seconds_between_saves=1e9))
    assert int(torch.load(run.folder / checkpoint.NAME)["module"]["counted"]) == 3


def test_a_missing_or_truncated_log_is_reported(run: Run, teacher: Teacher) -> None:
    with pytest.raises(KilledError):
        run(Mortal(SPDTrainOptions(), teacher, None, 3))
    log = run.folder / "train.jsonl"
    log.write_bytes(log.read_bytes()[:50])
    with pytest.raises(InputError, match=r"train\.jsonl is gone or cut.*Run without --resume"):
        run(run.recipe(), resume=True)
    log.unlink()
    with pytest.raises(InputError, match=r"train\.jsonl is gone or cut.*Run without --resume"):
        run(run.recipe(), resume=True)


@pytest.mark.parametrize("part", ["state", "module"])
def test_a_checkpoint_of_another_version_is_reported(run: Run, teacher: Teacher, part: str) -> None:
    with pytest.raises(KilledError):
        run(Mortal(SPDTrainOptions(), teacher, None, 3))
    path = run.folder / checkpoint.NAME
    content = torch.load(path)
    content[part]["of_tomorrow"] = torch.zeros(1)
    torch.save(content, path)
    with pytest.raises(InputError, match=r"another version of spdbench\. Run without --resume"):
        run(run.recipe(), resume=True)


def test_other_settings_are_no_continuation(run: Run) -> None:
    run(run.recipe())
    with pytest.raises(InputError, match="seed 0, now 1"):
        run(run.recipe(), replace(PLAN, seed=1), resume=True)
    (run.folder / checkpoint.NAME).write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        run(run.recipe(), resume=True)


class Clock:
    """Every reading advances half a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def test_a_budget_ends_in_time_with_the_rate_decayed(run: Run) -> None:
    clock = Clock()
    run(run.recipe(), replace(PLAN, epochs=None, budget_s=60.0, seconds_between_saves=15.0), clock=clock, started=-10.0)
    rates = [line["lr"] for line in run.log if "lr" in line]
    assert 45 < clock.now + 10 <= 60  # 10 seconds had passed before
    assert rates[-1] < 0.1 * max(rates)


def test_a_resumed_budget_counts_what_was_used(run: Run, teacher: Teacher) -> None:
    plan = replace(PLAN, epochs=None, budget_s=60.0)
    torch.manual_seed(5)
    with pytest.raises(KilledError):
        run(Mortal(SPDTrainOptions(), teacher, None, 3), plan, clock=Clock(), started=0.0)
    used = torch.load(run.folder / checkpoint.NAME)["state"]["elapsed_s"]
    clock = Clock()
    run(run.recipe(), plan, resume=True, clock=clock, started=0.0)
    assert used > 5
    assert clock.now + used <= 60


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_held_out_fits_a_share_of_the_budget(run: Run, kept: bool) -> None:
    plan = replace(PLAN, epochs=None, budget_s=60.0)
    state = run(run.recipe(), plan, held_out=8, kept=kept, clock=Clock(), started=0.0)
    if kept:
        assert state.held_out == list(range(8))
    else:  # the target runs again for each of eleven evaluations
        assert 1 <= len(state.held_out) < 4


def test_the_same_weights_are_not_evaluated_twice(run: Run) -> None:
    run(run.recipe(), replace(PLAN, epochs=None, budget_s=1.0), clock=Clock(), started=0.0)
    assert [line["step"] for line in run.log if "acceptance" in line] == [0]


def test_a_loss_that_is_not_finite_ends_the_run(run: Run) -> None:
    class Broken(SPDRecipe):
        def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
            loss, figures = super().loss(batch)
            return loss * float("nan"), figures

    with pytest.raises(SpdbenchError, match="try a lower --lr"):
        run(Broken(SPDTrainOptions(), run.teacher, None, 3))


def test_accumulated_forwards_are_one_step(run: Run) -> None:
    run(run.recipe(), replace(PLAN, epochs=1, budget_s=None))
    single = [line["tokens"] for line in run.log if "loss" in line]
    run(run.recipe(), replace(PLAN, epochs=1, budget_s=None, accumulate=2))
    double = [line["tokens"] for line in run.log if "loss" in line]
    assert sum(single) == sum(double)
    assert len(double) == (len(single) + 1) // 2


def test_features_are_the_same_from_disk_and_recomputed(
    teacher: Teacher, sequences: list[TokenSequence], tmp_path: Path
) -> None:
    kept, anew = (Features(teacher.decoder, sequences, (0, 2, 6)) for _ in range(2))
    kept.keep_on_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing is left behind
    assert kept.num_bytes == sum(len(sequence.ids) for sequence in sequences) * 2 * 32 * 2
    for _ in range(2):
        first, second = kept.batch([3, 0]), anew.batch([3, 0])
        assert first.states.keys() == {0, 2, 6}
        for index, state in first.states.items():
            assert torch.equal(state, second.states[index])
        assert torch.equal(first.argmax_BS, second.argmax_BS)
    answered = first.answers_BS[1]
    assert answered.tolist() == [3 <= place < 11 for place in range(len(answered))]
    assert torch.equal(first.argmax_BS[1][answered], first.ids_BS[1][1:][answered[:-1]])  # the model's own words
