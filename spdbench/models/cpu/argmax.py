"""The likeliest tokens by their logits, without waking torch's threads.

Those, once woken for a few rows of a large vocabulary, keep their processors busy for some milliseconds more, and who
decodes the next token beside them waits. Must not know what the ids are for.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdbench.models.kv_cache import array
from spdbench.models.layer_ops import cpu_kernels, has_cpu_kernels


def argmax(logits: Tensor) -> Tensor:
    """The argmax over the last dimension of `[V]` or `[S, V]`; of several equal ones on a CPU the first."""
    if logits.dim() == 0 or logits.dim() > 2 or not has_cpu_kernels(logits.dtype, logits.device):
        return logits.argmax(dim=-1)
    functions = cpu_kernels()
    assert functions is not None
    rows_SV = logits if logits.dim() == 2 else logits[None]
    ids_S = torch.empty(len(rows_SV), dtype=torch.long)
    functions.argmax(array(rows_SV), ids_S.numpy())
    return ids_S if logits.dim() == 2 else ids_S[0]
