"""Trees that users ask Medusa for: by name, from files, and those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spdbench.decoding.tree import named_tree
from spdbench.errors import InputError
from spdbench_backends.medusa.trees import MAX_PATHS, check_levels, check_ranks, find_tree, read_tree_file

PATHS = ((0,), (3,), (0, 0), (0, 2), (3, 1), (0, 2, 5))


def test_a_tree_by_name() -> None:
    assert find_tree("mc_sim_7b_63") == named_tree("mc_sim_7b_63")


def test_a_name_that_is_nothing_says_what_is_known() -> None:
    with pytest.raises(InputError, match=r"no tree of that name.*did you mean 'mc_sim_7b_63'\?.*vicuna_13b_stage2"):
        find_tree("mc_sim_7b_36")


@pytest.mark.parametrize("name", ["~nobody-is-called-so/tree.json", "a" * 5000])
def test_a_name_that_could_be_no_file_is_no_file(name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        find_tree(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tree.json", json.dumps([list(path) for path in reversed(PATHS)])),
        ("tree.yaml", "".join(f"- {list(path)}\n" for path in PATHS)),
        ("tree.yml", "[[0], [3], [0, 0], [0, 2], [3, 1], [0, 2, 5]]"),
    ],
)
def test_a_file_lists_paths_in_any_order(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert find_tree(str(tmp_path / name)) == PATHS


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], "has at least one"),
        ({"tree": [[0]]}, "a tree is a list of paths"),
        ("[[0]]", "a tree is a list of paths"),
        ([[0], 1], r"1 is not a path"),
        ([[0], []], r"\[\] is not a path"),
        ([[0], [-1]], r"\[-1\] is not a path"),
        ([[0], [0, 1.0]], r"\[0, 1\.0\] is not a path"),
        ([[0], [True]], r"\[True\] is not a path"),
        ([["0"]], r"\['0'\] is not a path"),
        ([[0], [1], [0]], r"path \[0\] is there twice"),
        ([[0], [0, 0, 1]], r"path \[0, 0, 1\] has no parent, \[0, 0\] is missing"),
        ([[0], [1, 0], [1, 0, 0]], r"path \[1, 0\] has no parent, \[1\] is missing"),
        ([[rank] for rank in range(MAX_PATHS + 1)], f"at most {MAX_PATHS} are supported"),
    ],
)
@pytest.mark.parametrize("name", ["tree.json", "tree.yaml"])
def test_what_is_no_tree_is_named(tmp_path: Path, name: str, content: object, why: str) -> None:
    file = tmp_path / name
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{file}: .*{why}"):
        read_tree_file(file)


@pytest.mark.parametrize("rank", ["0x" + "f" * 4000, "4294967296"])
def test_rank_that_no_vocabulary_has_is_no_rank(tmp_path: Path, rank: str) -> None:
    (tmp_path / "t.yaml").write_text(f"- [{rank}]\n")
    with pytest.raises(InputError, match="is not a path: a list of ranks"):
        read_tree_file(tmp_path / "t.yaml")


@pytest.mark.parametrize(("name", "text"), [("t.json", "[[0]"), ("t.yaml", "[[0]"), ("t.json", "[" * 100_000)])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="cannot be read as a tree"):
        read_tree_file(tmp_path / name)
    with pytest.raises(InputError, match=r"cannot be read .Is a directory"):
        read_tree_file(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="cannot be read as a tree"):
        read_tree_file(tmp_path / name)


def test_a_tree_is_no_deeper_than_there_are_heads() -> None:
    check_levels(PATHS, 3)
    with pytest.raises(InputError, match=r"has 3 levels, e\.g\. path \[0, 2, 5\], but there are only 2 heads"):
        check_levels(PATHS, 2)


def test_a_tree_asks_for_no_more_choices_than_there_are() -> None:
    check_ranks(PATHS, 6)
    with pytest.raises(InputError, match=r"path \[0, 2, 5\] asks for rank 5, but only 5 tokens are drafted"):
        check_ranks(PATHS, 5)
