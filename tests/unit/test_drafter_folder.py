"""Matrices in 8 bits come back as what they were, to within half a step of each row's scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from spdbench_backends.drafter_files.folder import stored, unpacked

MATRICES = arrays.arrays(
    "float32", st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-1e4, 1e4, width=32)
).map(torch.from_numpy)


@given(MATRICES)
def test_every_number_is_within_half_a_step_and_bfloat16s_rounding(matrix: Tensor) -> None:
    found = unpacked(stored({"w": matrix}, "int8"))
    assert found.keys() == {"w"}
    most_O1 = matrix.abs().amax(dim=1, keepdim=True)
    assert bool(((found["w"].float() - matrix).abs() <= most_O1 / 127 / 2 * 1.001 + most_O1 * 2**-8 + 1e-37).all())


@given(MATRICES)
def test_what_was_stored_once_stays_the_same(matrix: Tensor) -> None:
    once = unpacked(stored({"w": matrix}, "int8"))
    assert torch.equal(unpacked(stored(once, "bfloat16"))["w"], once["w"])


def test_only_matrices_are_in_8_bits() -> None:
    norm, matrix = torch.rand(4), torch.rand(3, 4)
    packed = stored({"norm.weight": norm, "up.weight": matrix}, "int8")
    assert {name: tensor.dtype for name, tensor in packed.items()} == {
        "norm.weight": torch.bfloat16,
        "up.weight": torch.int8,
        "up.weight.scale": torch.float32,
    }


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": torch.ones(2, 3, dtype=torch.int8)},
        {"w": torch.ones(2, 3), "w.scale": torch.ones(2)},
        {"w": torch.ones(2, 3, dtype=torch.int8), "w.scale": torch.ones(3)},
        {"w.scale": torch.ones(2)},
    ],
    ids=["no scale", "not in 8 bits", "another size", "a scale alone"],
)
def test_what_does_not_fit_is_left_for_the_reader_to_refuse(tensors: dict[str, Tensor]) -> None:
    assert unpacked(tensors).keys() == tensors.keys()
