"""A page with everything that a run can keep stays below 3 MB."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spdbench.judge.comparison.compare import compare
from spdbench.judge.loaded import load
from spdbench.judge.results.embedded import EmbeddedFile
from spdbench.render.report.page import to_html
from tests.unit.render.report.recorded import recorded

NUM_PROMPTS, FEW, MORE = 240, 10, 30
MAX_BYTES = 2_700_000
"""A tenth below the 3 MB that are promised."""


def size(num_prompts: int) -> int:
    made = recorded(num_prompts)
    [compared] = compare([load(result, file) for file, result in made.items()], by_category=True)
    compared = replace(compared, decode=lambda ids: "".join(f" {token:x}" for token in ids))
    sources = [EmbeddedFile(file, result.model_dump_json(by_alias=True).encode()) for file, result in made.items()]
    return len(to_html(compared, sources, "report.html").encode())


def test_page_of_four_labels_with_spans_and_drafts_is_below_3_mb() -> None:
    """Of `NUM_PROMPTS`, by what each prompt more adds: making such a page takes 20 s."""
    pytest.importorskip("vl_convert")
    few, more = size(FEW), size(MORE)
    each = (more - few) / (MORE - FEW)
    assert few + each * (NUM_PROMPTS - FEW) < MAX_BYTES, each
