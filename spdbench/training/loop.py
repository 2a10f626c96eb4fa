"""The loop that trains any recipe: steps, held-out acceptance, checkpoints, and an end in time with the best weights.

Everything that decides a step (weights, optimiser, generators, place in the data, time used) is in `State` or in the
rest of the checkpoint, so that a run that was killed resumes to the same numbers. An interruption may come at any
moment: the checkpoint then holds the last whole step, or is the one before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from spdbench.errors import InputError, SpdbenchError
from spdbench.training import checkpoint
from spdbench.training.checkpoint import State
from spdbench.training.features import Features
from spdbench.training.log import NAME as LOG
from spdbench.training.log import RESTART, TrainingLog
from spdbench.training.recipe import Batch, Counts, Recipe
from spdbench.training.schedule import Data, Plan, batches_of, epoch_batches, rate_factor

CLIP = 1.0
DECAY = 0.0
BETAS = (0.9, 0.95)
FIT_TOKENS = 8192
"""Tokens, with padding, that a recipe's `fit` gets at most."""
HOLD_OUT_SHARE, FIT_SHARE = 0.2, 0.3
"""Shares of a budget by which the held-out conversations, and then the first fit, have to be finished."""
MARGIN_S, MARGIN_SHARE = 2.0, 0.02
"""Seconds and share of a budget that are kept for writing files, besides another step and the last evaluation."""


class Report(Protocol):
    """Shows a run's progress."""

    def step(self, step: int, loss: float, acceptance: float, progress: float, left_s: float) -> None:
        """`acceptance` is that of the first position, of the best weights so far."""

    def evaluated(self, step: int, rates: Sequence[float], best: bool) -> None: ...


class Training:
    """One run of a recipe, from its first step or from its checkpoint to the best weights."""

    def __init__(
        self,
        recipe: Recipe,
        features: Features,
        data: Data,
        plan: Plan,
        folder: Path,
        identity: Mapping[str, Any],
        report: Report | None = None,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
        from_scratch: bool = True,
    ) -> None:
        self._recipe, self._features, self._data, self._plan = recipe, features, data, plan
        self._folder, self._identity = folder, identity
        self._report, self._from_scratch = report, from_scratch
        self._clock = clock
        self._began = self._origin = clock() if started is None else started
        self._last_save = self._began
        self._params = [p for p in recipe.module.parameters() if p.requires_grad]
        self._device = self._params[0].device
        self._optimizer = torch.optim.AdamW(self._params, lr=plan.rate, betas=BETAS, weight_decay=DECAY, fused=True)
        self.state = State()
        self._settled: checkpoint.Generators | None = None
        """The generators when weights, `state` and log last agreed; None while one of them is ahead of the others."""

    def run(self, *, resume: bool) -> State:
        """Trains to the end; the module then holds the best weights by held-out acceptance.

        An interruption leaves a checkpoint of the last whole step and is raised again. If it comes in the middle of an
        update, the checkpoint before stays.
        """
        module = self._recipe.module
        restored = checkpoint.restore(self._folder, self._identity, module, self._optimizer) if resume else None
        state = self.state = restored or State()
        if not set(state.held_out) <= set(self._data.held_out):
            raise InputError(f"--resume: {self._folder / checkpoint.NAME}: held_out names other sequences. {RESTART}")
        self._origin = self._began - state.elapsed_s
        log = self._log = TrainingLog(self._folder / LOG, state.log_size)
        try:
            if restored is None:
                log.write(dict(self._identity))
                self._hold_out()
                if self._from_scratch:
                    self._recipe.fit(self._first_batches())
                self._evaluate()
            else:
                self._features.prepare(state.held_out)
            self._last_save = self._clock()
            self._take_steps()
        except KeyboardInterrupt:
            if self.state.step:
                self._save()
            raise
        finally:
            log.close()
        module.load_state_dict(state.best_weights)
        return state

    def _hold_out(self) -> None:
        """Chooses the conversations that acceptance is measured on, and prepares them.

        Of a budget they take a share at most, over all evaluations where the target has to run for each of them; those
        beyond that are not used.
        """
        held_out, state, plan = self._data.held_out, self.state, self._plan
        if plan.budget_s is None:
            self._features.prepare(held_out)
            state.held_out = list(held_out)
            return
        times_more, began = 0 if self._features.kept else plan.num_evaluations, self._clock()
        for index in held_out:
            self._features.batch([index])
            state.held_out.append(index)
            if self._used(HOLD_OUT_SHARE, times_more * (self._clock() - began)):
                return

    def _used(self, share: float, to_come_s: float = 0.0) -> bool:
        """True if over `share` of the budget, where there is one, is spent, or will be with `to_come_s` more."""
        budget_s = self._plan.budget_s
        return budget_s is not None and self._clock() - self._origin + to_come_s > share * budget_s

    def _first_batches(self) -> Iterator[Batch]:
        plan, data = self._plan, self._data
        tokens = 0
        for indices in epoch_batches(data.learned, data.lengths, plan.batch_tokens, plan.seed, 0):
            batch = self._features.batch(indices)
            yield batch
            tokens += batch.ids_BS.numel()
            if tokens >= FIT_TOKENS or self._used(FIT_SHARE):
                return

    def _take_steps(self) -> None:
        state, plan, data = self.state, self._plan, self._data
        batches: list[list[int]] = []
        self._settle()
        while True:
            if not batches:
                batches = epoch_batches(data.learned, data.lengths, plan.batch_tokens, plan.seed, state.epoch)
            progress = self._progress(len(batches))
            due = progress >= 1 or (state.step and progress * plan.num_evaluations >= state.evaluations)
            if due and state.evaluated != state.step:
                self._evaluate(progress)
            if progress >= 1:
                return
            self._step(batches, progress)
            if not state.batch:
                batches = []
            if self._clock() - self._last_save >= plan.seconds_between_saves:
                self._save()

    def _progress(self, num_batches: int) -> float:
        state = self.state
        state.elapsed_s = self._clock() - self._origin
        done = state.epoch + state.batch / num_batches
        margin_s = MARGIN_S + MARGIN_SHARE * (self._plan.budget_s or 0.0)
        reserve_s = margin_s + 1.5 * state.evaluation_s + state.step_s
        return self._plan.progress(done, state.elapsed_s, reserve_s)

    def _step(self, batches: Sequence[Sequence[int]], progress: float) -> None:
        """One update from up to `accumulate` batches."""
        state, plan, began = self.state, self._plan, self._clock()
        rate = plan.rate * rate_factor(state.step, plan.warmup_steps, progress)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        chosen = batches[state.batch : state.batch + plan.accumulate]
        losses, tokens = 0.0, 0
        figures: Mapping[str, float] = {}
        for indices in chosen:
            batch = self._features.batch(indices)
            with fast_gemm(self._device):
                loss, figures = self._recipe.loss(batch)
            (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
            losses += loss.item() / len(chosen)
            tokens += int(batch.valid_BS.sum())
        if not math.isfinite(losses):
            raise SpdbenchError(f"step {state.step + 1}: the loss is {losses}; try a lower --lr")
        norm = torch.nn.utils.clip_grad_norm_(self._params, CLIP)
        self._settled = None  # from here to `_settle`, an interruption must not save
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        state.step, state.batch = state.step + 1, state.batch + len(chosen)
        state.trained_tokens += tokens
        self._log.write(
            {
                "step": state.step,
                "epoch": state.epoch,
                "loss": losses,
                **figures,
                "lr": rate,
                "grad_norm": float(norm),
                "tokens": tokens,
                "progress": progress,
                "elapsed_s": round(self._clock() - self._origin, 3),
            }
        )
        if state.batch >= len(batches):
            state.epoch, state.batch = state.epoch + 1, 0
        # The slowest recent step, slowly forgotten: on a busy machine some steps take far longer than others.
        state.step_s = max(self._clock() - began, 0.9 * state.step_s)
        self._settle()
        if self._report is not None:
            left_s = state.elapsed_s * (1 / progress - 1) if progress else math.nan
            first = state.best_rates[0] if state.best_rates else 0.0
            self._report.step(state.step, losses, first, progress, left_s)

    def _evaluate(self, progress: float = 0.0) -> None:
        """Measures held-out acceptance; keeps the best weights so far."""
        state, module, began = self.state, self._recipe.module, self._clock()
        batches = batches_of(state.held_out, self._data.lengths, self._plan.batch_tokens)
        counts = measure_acceptance(self._recipe, self._features, batches, self._device)
        score = expected_length(counts.rates)
        best = score > state.best_score
        self._settled = None
        if best:
            state.best_score, state.best_rates, state.best_tokens = score, counts.rates, state.trained_tokens
            state.best_weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        took_s = self._clock() - began
        state.evaluation_s = max(took_s, 0.9 * state.evaluation_s)
        state.evaluated, state.evaluations = state.step, int(progress * self._plan.num_evaluations) + 1
        self._log.write(
            {
                "step": state.step,
                "acceptance": list(counts.rates),
                "judged": list(counts.judged),
                "best": best,
                "seconds": round(took_s, 3),
                "elapsed_s": round(self._clock() - self._origin, 3),
            }
        )
        self._settle()
        if self._report is not None:
            self._report.evaluated(state.step, counts.rates, best)

    def _settle(self) -> None:
        """Marks that weights, `state` and log agree: an interruption from here on saves them as they are."""
        self.state.log_size = self._log.size
        self._settled = checkpoint.generators(self._device)

    def _save(self) -> None:
        """Writes a checkpoint of what was settled last; none in the middle of an update."""
        if self._settled is None:
            return
        self.state.elapsed_s = self._clock() - self._origin
        self._log.sync()
        module = self._recipe.module
        checkpoint.save(self._folder, self._identity, self.state, module, self._optimizer, self._settled)
        self._last_save = self._clock()


def measure_acceptance(
    recipe: Recipe, features: Features, batches: Iterable[Sequence[int]], device: torch.device
) -> Counts:
    """Acceptance on some sequences. Leaves torch's generators as they were.

    An interruption restores the module's buffers, in which a recipe may keep counts of its own.
    """
    module, counts = recipe.module, Counts()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), fast_gemm(device):
            for indices in batches:
                counts += recipe.acceptance(features.batch(indices))
    except KeyboardInterrupt:
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
        raise
    return counts


def fast_gemm(device: torch.device) -> AbstractContextManager[Any]:
    """A context with matrix multiplications in bfloat16, if the device computes them faster than in float32."""
    if device.type == "cuda":
        supported = bool(torch.cuda.is_bf16_supported())
    else:
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16) if supported else nullcontext()


def expected_length(rates: Sequence[float]) -> float:
    """Drafts accepted in a row; `rates` are acceptances by position, given that all before were accepted."""
    total, chance = 0.0, 1.0
    for rate in rates:
        chance *= rate
        total += chance
    return total
