"""The published trees, against what is known of them."""

from __future__ import annotations

from collections import Counter

import pytest

from spdbench.decoding.tree import CHILDREN, from_paths, named_tree, sorted_paths

LEVELS = {
    "eagle_1": [4, 8, 8, 3, 2],
    "mc_sim_7b_63": [10, 28, 23, 2],
    "vicuna_7b_stage2": [10, 23, 23, 7],
    "vicuna_13b_stage2": [10, 19, 25, 9],
    "vicuna_33b_stage2": [10, 24, 24, 5],
    "zephyr_stage2": [10, 27, 23, 3],
}


@pytest.mark.parametrize("name", CHILDREN)
def test_levels_are_as_large_as_published(name: str) -> None:
    paths = named_tree(name)
    by_level = Counter(map(len, paths))
    assert [by_level[level] for level in sorted(by_level)] == LEVELS[name]
    assert len(set(paths)) == len(paths)
    assert list(paths) == sorted_paths(paths)
    assert len(from_paths(paths)) == len(paths) + 1  # and every path has its parent


def test_a_tree_written_out() -> None:
    expected = "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
    assert ["".join(map(str, path)) for path in named_tree("eagle_1")] == expected.split()


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        (
            "mc_sim_7b_63",
            3,
            "000 001 002 003 004 005 006 007 008 009 010 011 012 020 021 030 040 050 060 070 100 101 200",
        ),
        ("mc_sim_7b_63", 4, "0000 0001"),
        ("vicuna_7b_stage2", 4, "0000 0001 0002 0003 0010 0020 0100"),
        ("vicuna_13b_stage2", 4, "0000 0001 0002 0003 0010 0011 0020 0100 1000"),
        ("vicuna_33b_stage2", 4, "0000 0001 0002 0010 0100"),
        ("zephyr_stage2", 4, "0000 0001 0010"),
    ],
)
def test_deep_levels_written_out(name: str, level: int, expected: str) -> None:
    found = ["".join(map(str, path)) for path in named_tree(name) if len(path) == level]
    assert found == expected.split()
