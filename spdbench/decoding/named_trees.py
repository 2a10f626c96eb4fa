"""Trees that the methods' authors published, by name.

A tree whose siblings are the first ranks without a gap is told by how many children each node has. Must not know who
drafts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from spdbench.decoding.tree import Path

CHILDREN: dict[str, tuple[str, ...]] = {
    "eagle_1": ("4", "3 2 2 1", "3 2 2 1", "3", "2"),
    "mc_sim_7b_63": ("10", "10 7 3 2 1 1 1 1 1 1", "10 3 2 1 1 1 1 1 0 0 2 0 0 0 0 0 0 1", "2"),
    "vicuna_7b_stage2": ("10", "10 5 2 2 1 1 1 1", "9 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1", "4 1 1 0 0 0 0 0 0 1"),
    "vicuna_13b_stage2": (
        "10",
        "10 4 2 1 1 1",
        "10 4 2 1 1 1 0 0 0 0 3 1 0 0 1 0 1",
        "4 2 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 1",
    ),
    "vicuna_33b_stage2": (
        "10",
        "10 5 3 2 1 1 1 1",
        "10 4 2 1 1 1 0 0 0 0 3 1 0 0 0 1",
        "3 1 0 0 0 0 0 0 0 0 1",
    ),
    "zephyr_stage2": ("10", "10 6 4 2 2 1 1 1", "10 4 2 1 1 1 0 0 0 0 2 1 0 0 0 0 1", "2 1"),
}
"""Children by node, level by level: the root's, then those of level 1 in order, and so on; zeros at a level's end are
left out. `eagle_1`: EAGLE-1's static tree (arXiv 2401.15077). The others are Medusa's (arXiv 2401.10774): of version 1,
and of version 2 by model."""


@cache
def named_tree(name: str) -> tuple[Path, ...]:
    """The paths of the tree called `name`, by depth and preference."""
    level: Sequence[Path] = [()]
    paths: list[Path] = []
    for counts in CHILDREN[name]:
        by_node = zip(level, map(int, counts.split()), strict=False)
        level = [(*parent, rank) for parent, count in by_node for rank in range(count)]
        paths += level
    return tuple(paths)
