"""From a measured request and its backend's spans to the figures of its lanes. Must not know journals or files."""

from __future__ import annotations

from typing import Any

import numpy as np

from spdbench.backend import Backend
from spdbench.judge.metrics.bubble import full_cycles, lane_time, read_spans
from spdbench.measure.clock import Measurement


def lane_figures(backend: Backend, measured: Measurement) -> dict[str, Any]:
    """The fields of a run that come from the spans of the request just measured; none where there are no spans.

    Raises:
        ValueError: the spans cannot be: the backend is broken.
    """
    spans = backend.spans()
    step_ends = _decode_steps(measured)
    if not len(spans) or step_ends[0] == step_ends[-1]:
        return {}
    table = read_spans(spans, backend.describe().lanes)
    found: dict[str, Any] = {"bubble": lane_time(table, step_ends).shares()}
    if backend.kind == "pipeline":
        found["full_cycles"] = full_cycles(table, step_ends)
    return found


def _decode_steps(measured: Measurement) -> list[int]:
    """Ends of the steps from the one with the first token to the one with the last, on the spans' clock."""
    counted = np.flatnonzero(measured.steps.emitted)
    ends = measured.steps.t_ns[counted[0] : counted[-1] + 1]
    return [measured.start_ns + at for at in ends]
