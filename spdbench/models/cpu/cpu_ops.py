"""A layer's operations between its matrix multiplications as compiled kernels, for a few rows on a CPU, where the call
of a torch operator takes longer than its arithmetic.

Shapes: S rows, M width, F feed-forward width, H query heads, K kv heads, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spdbench.models.attention_context import AttentionContext
from spdbench.models.cpu.worker_pool import (
    AttentionTask,
    GateTask,
    NormTask,
    RotaryTask,
    TaskKind,
    kind_word,
    worker_pool,
)
from spdbench.models.delta_net import DeltaNet
from spdbench.models.kv_cache import HybridCache, KVCache
from spdbench.models.layer_ops import Geometry, HeadNorms, LayerOps, NormWeight
from spdbench.models.torch_utils import array


class CpuOps(LayerOps):
    """The operations as compiled kernels over the tensors' memory.

    What an operation returns holds until the same operation, or a norm with the same weight, is called again with as
    many rows: a pass writes to the same buffers all the time.
    """

    records_tasks = True

    def __init__(self, geometry: Geometry, dtype: torch.dtype) -> None:
        pool = worker_pool()
        assert pool is not None
        super().__init__(geometry)
        self.pool, self.dtype = pool, dtype
        self._eps_bits = int(np.float32(geometry.norm_eps).view(np.int32))
        self._buffers: dict[tuple[object, tuple[int, ...]], tuple[Tensor, Any]] = {}

    def norm(self, rows_SM: Tensor, weight: NormWeight) -> Tensor:
        out, _ = self._buffer(weight, *rows_SM.shape)
        self._norm(rows_SM, weight, out)
        return out

    def norm_pair(self, left_SM: Tensor, left_weight: NormWeight, right_SM: Tensor, right_weight: NormWeight) -> Tensor:
        width = left_SM.shape[1]
        out, _ = self._buffer((left_weight, right_weight), left_SM.shape[0], width + right_SM.shape[1])
        self._norm(left_SM, left_weight, out[:, :width])
        self._norm(right_SM, right_weight, out[:, width:])
        return out

    def _norm(self, rows_SM: Tensor, weight: NormWeight, out_SM: Tensor) -> None:
        rows_SM = rows_SM.contiguous()
        task = NormTask(
            kind=kind_word(TaskKind.NORM, self.dtype),
            num_rows=rows_SM.shape[0],
            rows=rows_SM.data_ptr(),
            weight=weight.widened.data_ptr(),
            eps_bits=self._eps_bits,
            out=out_SM.data_ptr(),
            width=rows_SM.shape[1],
            out_width=out_SM.stride(0),
        )
        self.pool.run(task, rows_SM, out_SM)

    def attention(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        window: int | None,
        context: AttentionContext,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        geometry, num_rows = self.geometry, context.num_rows
        width = geometry.num_heads * geometry.head_dim
        queries, _ = self._buffer("queries", num_rows, width)
        out, _ = self._buffer("attention", num_rows, width)
        slot, keys_KTD, values_KTD = cache.room(layer, num_rows)
        context.slot[0] = slot
        cos_PD, sin_PD = context.angle_arrays
        qkv = qkv.contiguous()
        same: dict[str, int] = {
            "num_rows": num_rows,
            "keys": keys_KTD.ctypes.data,
            "values": values_KTD.ctypes.data,
            "slot_at": context.slot.ctypes.data,
            "queries": queries.data_ptr(),
            "num_heads": geometry.num_heads,
            "num_kv_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            "capacity": keys_KTD.shape[1],
        }
        rotary = RotaryTask(
            kind=kind_word(TaskKind.ROTARY, self.dtype),
            qkv=qkv.data_ptr(),
            q_norm=0 if norms is None else norms.query.widened.data_ptr(),
            k_norm=0 if norms is None else norms.key.widened.data_ptr(),
            eps_bits=self._eps_bits,
            positions=context.positions.ctypes.data,
            cos=cos_PD.ctypes.data,
            sin=sin_PD.ctypes.data,
            num_positions=len(cos_PD),
            **same,
        )
        attention = AttentionTask(
            kind=kind_word(TaskKind.ATTENTION, self.dtype),
            depths=context.depths.ctypes.data,
            visible=context.visible.ctypes.data,
            out=out.data_ptr(),
            tree_width=context.visible.shape[1],
            window=window or 0,
            **same,
        )
        self.pool.run(rotary, qkv, queries)
        self.pool.run(attention, queries, out)
        return out

    def delta_net(self, net: DeltaNet, projected: Tensor, cache: HybridCache, layer: int) -> Tensor:
        from spdbench.models.cpu import delta_net_kernel

        sizes, num_rows = net.sizes, projected.shape[0]
        cache.claim(num_rows, every_state=True)
        out, out_array = self._buffer("delta net", num_rows, sizes.values)
        conv_WC, decay_H, time_bias_H, norm_E = net.arrays
        windows_RWC, matrices_RHDE = cache.state_arrays(layer)
        delta_net_kernel.delta_net(
            array(projected),
            sizes.num_key_heads,
            sizes.num_value_heads,
            conv_WC,
            decay_H,
            time_bias_H,
            norm_E,
            net.norm_eps,
            windows_RWC,
            matrices_RHDE,
            cache.slot(0),
            out_array,
        )
        return out

    def gate(self, both_S2F: Tensor) -> Tensor:
        num_rows, width = both_S2F.shape[0], both_S2F.shape[1] // 2
        out, _ = self._buffer("gate", num_rows, width)
        both_S2F = both_S2F.contiguous()
        kind = kind_word(TaskKind.GATE, self.dtype)
        self.pool.run(GateTask(kind, num_rows, both_S2F.data_ptr(), out.data_ptr(), width), both_S2F, out)
        return out

    def _buffer(self, operation: object, *shape: int) -> tuple[Tensor, Any]:
        """A tensor and its memory as numpy sees it."""
        key = (operation, shape)
        if key not in self._buffers:
            tensor = torch.zeros(shape, dtype=self.dtype)
            self._buffers[key] = (tensor, array(tensor))
        return self._buffers[key]
