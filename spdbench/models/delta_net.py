"""A recurrent layer: a gated delta net, which remembers the tokens so far in one matrix for each head.

Its convolution reads a token's projections and those of the few tokens before; then each head's matrix forgets a share
of itself, and what it returns for the token's key is moved towards the token's value:

    state = e^g state                               g <= 0, the token's own
    state = state + key (beta (value - key state))
    output = query state

Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv 2412.06464; Qwen3.5's variant
as its model in transformers.

`delta_net` is the reference, for every device and any number of rows; `layer_ops.CpuOps` computes a few rows with a
compiled kernel. Norms, gate and projections around it are those of other layers.

Shapes: S rows, M model width, C channels of queries, keys and values together, W rows of the convolution's window, H
value heads, D key head size, E value head size; B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spdbench.models.checkpoints.config import RecurrentSizes
from spdbench.models.kv_cache import HybridCache
from spdbench.models.torch_utils import array

BLOCK_ROWS = 64
"""More rows are computed in blocks of so many, in which all tokens are worked on at once."""
NORM_EPS = 1e-6
"""Of the norms of queries and keys, which the model's config does not name."""


@dataclass(frozen=True, eq=False)
class DeltaNet:
    """What such a layer has between its input and output projections: the convolution's weight, `[W + 1, C]`; by head
    the logarithm of how fast the state fades, negated, and the bias of its time step, `[H]` each; the weight of the
    gated norm `[E]`, whose epsilon is `norm_eps`. All are in float32."""

    sizes: RecurrentSizes
    conv_WC: Tensor
    decay_H: Tensor
    time_bias_H: Tensor
    norm_E: Tensor
    norm_eps: float

    @property
    def nbytes(self) -> int:
        return self.conv_WC.nbytes + self.decay_H.nbytes + self.time_bias_H.nbytes + self.norm_E.nbytes

    @cached_property
    def arrays(self) -> tuple[Any, ...]:
        """The weights as numpy arrays, in the order of the fields."""
        return tuple(array(part) for part in (self.conv_WC, self.decay_H, self.time_bias_H, self.norm_E))


@dataclass(frozen=True)
class _Rows:
    """Queries and keys `[S, H, D]`, normalised; values `[S, H, E]`; logarithms of the decay, and strengths of the
    update, `[S, H]`. In float32."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    log_decays: Tensor
    strengths: Tensor


def delta_net(net: DeltaNet, projected: Tensor, cache: HybridCache, layer: int) -> Tensor:
    """From the input projections of S rows, side by side `[S, C + H E + 2 H]` (queries, keys and values; gates;
    strengths; time steps), to what the output projection reads: `[S, H E]`. The states after the rows are written to
    `cache`, which the caller advances after the last layer."""
    sizes, num_rows = net.sizes, len(projected)
    parts = [sizes.channels, sizes.values, sizes.num_value_heads, sizes.num_value_heads]
    mixed_SC, gates, strengths_SH, steps_SH = torch.split(projected, parts, dim=-1)
    windows_RWC, matrices_RHDE = cache.states(layer)
    in_blocks = num_rows > BLOCK_ROWS and num_rows > len(windows_RWC)
    cache.claim(num_rows, every_state=not in_blocks)
    seen_TC = torch.cat((windows_RWC[cache.slot(0)], mixed_SC))
    for row in range(num_rows - 1 if in_blocks else max(0, num_rows - len(windows_RWC)), num_rows):
        windows_RWC[cache.slot(row + 1)].copy_(seen_TC[row + 1 : row + 1 + sizes.window])
    rows = _split(net, _convolved(net, seen_TC).to(projected.dtype), strengths_SH, steps_SH)
    outputs_SHE = (_scan_blocks if in_blocks else _scan)(rows, matrices_RHDE, cache)
    return _gated(net, outputs_SHE.to(projected.dtype), gates)


def _convolved(net: DeltaNet, seen_TC: Tensor) -> Tensor:
    """Each channel's weighted sum over a row and the W before it, in float32: `[S, C]`."""
    num_rows = len(seen_TC) - net.sizes.window
    out_SC = torch.zeros(num_rows, net.sizes.channels, device=seen_TC.device)
    for offset, weight_C in enumerate(net.conv_WC):
        out_SC.addcmul_(seen_TC[offset : offset + num_rows].float(), weight_C)
    return out_SC


def _split(net: DeltaNet, convolved_SC: Tensor, strengths_SH: Tensor, steps_SH: Tensor) -> _Rows:
    sizes = net.sizes
    width = sizes.num_key_heads * sizes.key_dim
    queries, keys, values = torch.split(functional.silu(convolved_SC), [width, width, sizes.values], dim=-1)
    share = sizes.num_value_heads // sizes.num_key_heads
    return _Rows(
        queries=_normalised(queries, sizes).repeat_interleave(share, dim=1) * sizes.key_dim**-0.5,
        keys=_normalised(keys, sizes).repeat_interleave(share, dim=1),
        values=values.float().reshape(-1, sizes.num_value_heads, sizes.value_dim),
        log_decays=net.decay_H * functional.softplus(steps_SH.float() + net.time_bias_H),
        strengths=strengths_SH.sigmoid().float(),
    )


def _normalised(heads: Tensor, sizes: RecurrentSizes) -> Tensor:
    """Heads of length one: `[S, heads, D]` in float32."""
    heads = heads.float().reshape(-1, sizes.num_key_heads, sizes.key_dim)
    return heads * torch.rsqrt((heads * heads).sum(dim=-1, keepdim=True) + NORM_EPS)


def _scan(rows: _Rows, matrices_RHDE: Tensor, cache: HybridCache) -> Tensor:
    """Token by token, each state in its own slot: outputs `[S, H, E]`."""
    outputs, decays_SH = [], rows.log_decays.exp()
    for row in range(len(rows.keys)):
        before_HDE, after_HDE = matrices_RHDE[cache.slot(row)], matrices_RHDE[cache.slot(row + 1)]
        torch.mul(before_HDE, decays_SH[row, :, None, None], out=after_HDE)
        key_HD1 = rows.keys[row, :, :, None]
        change_HE = (rows.values[row] - (after_HDE * key_HD1).sum(dim=1)) * rows.strengths[row, :, None]
        after_HDE.addcmul_(key_HD1, change_HE[:, None])
        outputs.append((after_HDE * rows.queries[row, :, :, None]).sum(dim=1))
    return torch.stack(outputs)


def _scan_blocks(rows: _Rows, matrices_RHDE: Tensor, cache: HybridCache) -> Tensor:
    """Block by block, for prompts, of which only the last state is held: outputs `[S, H, E]`.

    Row i's change u_i of the state depends on those before it in its block by beta_i e^(G_i - G_j) (k_i . k_j), where G
    are the sums of the log decays from the block's start on: a triangular system, solved for all rows at once.
    """
    num_rows, outputs = len(rows.keys), []
    state_HDE = matrices_RHDE[cache.slot(0)]
    for start in range(0, num_rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        queries, keys, values = (each[block].transpose(0, 1) for each in (rows.queries, rows.keys, rows.values))
        strengths_HB1 = rows.strengths[block].T[..., None]
        sums_HB1 = rows.log_decays[block].T.cumsum(dim=-1)[..., None]
        # Above the diagonal the exponents are positive and may overflow: they are dropped before and after.
        faded_HBB = (sums_HB1 - sums_HB1.transpose(1, 2)).tril().exp().tril()
        system_HBB = (strengths_HB1 * faded_HBB * (keys @ keys.transpose(1, 2))).tril(-1)
        wanted_HBE = strengths_HB1 * (values - sums_HB1.exp() * (keys @ state_HDE))
        changes_HBE = torch.linalg.solve_triangular(system_HBB, wanted_HBE, upper=False, unitriangular=True)
        inside_HBB = faded_HBB * (queries @ keys.transpose(1, 2))
        outputs.append(sums_HB1.exp() * (queries @ state_HDE) + inside_HBB @ changes_HBE)
        left_HB1 = (sums_HB1[:, -1:] - sums_HB1).exp()
        state_HDE = sums_HB1[:, -1:].exp() * state_HDE + (keys * left_HB1).transpose(1, 2) @ changes_HBE
    matrices_RHDE[cache.slot(num_rows)].copy_(state_HDE)
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _gated(net: DeltaNet, outputs_SHE: Tensor, gates: Tensor) -> Tensor:
    """Each head over its root mean square, times the norm's weight and silu of its gate: `[S, H E]`."""
    normed = functional.rms_norm(outputs_SHE.float(), net.norm_E.shape, net.norm_E, net.norm_eps)
    gated = normed.flatten(1) * functional.silu(gates.float())
    return gated.to(outputs_SHE.dtype)
