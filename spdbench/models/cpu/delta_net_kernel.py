"""The kernel of a recurrent layer between its input and output projections, for a few rows on a CPU; see
`spdbench.models.delta_net`, which it is tested against.

One token's update reads and writes the state once; as some twenty torch operators it would pass over it eight times,
and take four times as long (0.2 in place of 0.05 ms a layer for 16 heads of 128 x 128 on one core of an AMD EPYC). As
in `kernels`, a row has the same bits whichever rows are next to it. Importing this module needs numba.

Shapes: S rows, C channels, R states of a ring, W rows of a window, H value heads, D key head size, E value head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spdbench.models.cpu.compile import F, compiled, exponential, in_order, inner, narrow, widen


@in_order
def _sigmoid(x: Any) -> Any:
    return F(1) / (F(1) + exponential(-x))


@in_order
def _gated(x: Any, scale: Any, weight: Any, gate: Any) -> Any:
    """A number that is normalised, weighted, and gated by silu(gate)."""
    return x * scale * weight * gate * _sigmoid(gate)


@inner
def _normalise(head_D: Any, scale: Any) -> None:
    """A head of length one, times `scale`."""
    total = F(0)
    for d in range(head_D.shape[0]):
        total += head_D[d] * head_D[d]
    scale = scale / np.sqrt(total + F(1e-6))
    for d in range(head_D.shape[0]):
        head_D[d] *= scale


@in_order
def _convolve(row: Any, conv_WC: Any, before_WC: Any, after_WC: Any, mixed_C: Any) -> None:
    """silu of each channel's weighted sum over the window and `row`, which enters the window. The two windows may be
    the same."""
    window, channels = before_WC.shape
    for c in range(channels):
        mixed_C[c] = widen(row[c]) * conv_WC[window, c]
    for w in range(window):
        for c in range(channels):
            mixed_C[c] += widen(before_WC[w, c]) * conv_WC[w, c]
    for w in range(window - 1):
        for c in range(channels):
            after_WC[w, c] = before_WC[w + 1, c]
    for c in range(channels):
        if window > 0:
            after_WC[window - 1, c] = row[c]
        mixed_C[c] *= _sigmoid(mixed_C[c])


@in_order
def _update(
    before_DE: Any,
    after_DE: Any,
    faded_DE: Any,
    decay: Any,
    key_D: Any,
    query_D: Any,
    value_E: Any,
    strength: Any,
    out_E: Any,
) -> None:
    """One head's state after a token, and what it returns for the query; `value_E` becomes the change of the state.

    The states may be the same. They meet in no loop, since the compiler has another one for arrays that overlap, and
    that one rounds differently: between them is `faded_DE`, which stays in the processor's cache."""
    key_dim, value_dim = before_DE.shape
    for e in range(value_dim):
        out_E[e] = F(0)
    for d in range(key_dim):
        for e in range(value_dim):
            faded_DE[d, e] = before_DE[d, e] * decay
            out_E[e] += faded_DE[d, e] * key_D[d]
    for e in range(value_dim):
        value_E[e] = (value_E[e] - out_E[e]) * strength
        out_E[e] = F(0)
    for d in range(key_dim):
        for e in range(value_dim):
            new = faded_DE[d, e] + key_D[d] * value_E[e]
            after_DE[d, e] = new
            out_E[e] += new * query_D[d]


@compiled
def delta_net(
    projected: Any,
    num_key_heads: int,
    num_value_heads: int,
    conv_WC: Any,
    decay_H: Any,
    time_bias_H: Any,
    norm_E: Any,
    norm_eps: float,
    windows_RWC: Any,
    matrices_RHDE: Any,
    slot: int,
    out: Any,
) -> None:
    """`spdbench.models.delta_net.delta_net` for rows `projected` `[S, C + H E + 2 H]`, the state before them being in
    `slot` of the ring; writes `out` `[S, H E]`."""
    ring, channels = windows_RWC.shape[0], conv_WC.shape[1]
    key_dim, value_dim = matrices_RHDE.shape[2:]
    keys_at, values_at = num_key_heads * key_dim, 2 * num_key_heads * key_dim
    gates_at = channels
    strengths_at = channels + num_value_heads * value_dim
    steps_at = strengths_at + num_value_heads
    share = num_value_heads // num_key_heads
    mixed_C, out_E, faded_DE = np.empty(channels, F), np.empty(value_dim, F), np.empty((key_dim, value_dim), F)
    for s in range(projected.shape[0]):
        before, after = (slot + s) % ring, (slot + s + 1) % ring
        _convolve(projected[s], conv_WC, windows_RWC[before], windows_RWC[after], mixed_C)
        for k in range(num_key_heads):
            _normalise(mixed_C[k * key_dim : (k + 1) * key_dim], F(1) / np.sqrt(F(key_dim)))
            _normalise(mixed_C[keys_at + k * key_dim : keys_at + (k + 1) * key_dim], F(1))
        for h in range(num_value_heads):
            k, at = h // share * key_dim, h * value_dim
            step = widen(projected[s, steps_at + h]) + time_bias_H[h]
            rate = step if step > F(20) else np.log1p(exponential(step))
            _update(
                matrices_RHDE[before, h],
                matrices_RHDE[after, h],
                faded_DE,
                exponential(decay_H[h] * rate),
                mixed_C[keys_at + k : keys_at + k + key_dim],
                mixed_C[k : k + key_dim],
                mixed_C[values_at + at : values_at + at + value_dim],
                _sigmoid(widen(projected[s, strengths_at + h])),
                out_E,
            )
            total = F(0)
            for e in range(value_dim):
                total += out_E[e] * out_E[e]
            scale = F(1) / np.sqrt(total / F(value_dim) + F(norm_eps))
            for e in range(value_dim):
                gate = widen(projected[s, gates_at + at + e])
                out[s, at + e] = narrow(_gated(out_E[e], scale, norm_E[e], gate), out[s, at + e])
