"""Test packing of trees into rows, and splitting of trees into micro-batches."""

from typing import Any

import pytest
import torch

from rlqwen.packing.batch import Branch, Tree, pack, split_trees


def test_pack_by_hand() -> None:
    batch = pack(
        [
            Tree(
                [10, 11],
                [Branch([20, 21], per_sequence={"advantage": 1.0}), Branch([30], per_sequence={"advantage": -1.0})],
            ),
            Tree([], [Branch([40, 41, 42], loss_mask=[True, False, True], per_sequence={"advantage": 0.0})]),
        ]
    )
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30, 40, 41, 42]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2]]
    assert batch.target_N.tolist() == [20, 21, 30, 42]
    assert batch.source_N.tolist() == [1, 2, 1, 6]
    assert batch.sequence_N.tolist() == [0, 0, 1, 2]
    assert batch.lengths_S.tolist() == [2, 1, 1]
    assert batch.per_sequence["advantage"].tolist() == [1, -1, 0]
    assert not batch.per_token


def test_pack_carries_sampler_logprobs_of_targets_only() -> None:
    batch = pack([Tree([1], [Branch([2, 3], loss_mask=[False, True], per_token={"sampler_logp": [-0.5, -0.25]})])])
    assert batch.per_token["sampler_logp"].tolist() == [-0.25]


def test_pack_takes_an_empty_completion() -> None:
    batch = pack([Tree([1, 2], [Branch([]), Branch([3])])])
    assert batch.lengths_S.tolist() == [0, 1]
    assert batch.target_N.tolist() == [3]


def test_pack_refuses_trees_without_branches() -> None:
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([Tree([1], [])])


def trees() -> list[Tree]:
    return [Tree([0] * 10, [Branch([1] * 5) for _ in range(4)]) for _ in range(3)]


@pytest.mark.parametrize("limits", [{"max_branches": 4}, {"max_branches": 3}, {"max_tokens": 30}, {"max_tokens": 45}])
def test_split_keeps_every_branch_once_within_the_limits(limits: dict[str, Any]) -> None:
    parts = list(split_trees(trees(), **limits))
    assert sum(len(tree.branches) for part in parts for tree in part) == 12
    for part in parts:
        assert sum(len(tree.branches) for tree in part) <= limits.get("max_branches", 12)
        assert sum(tree.num_tokens for tree in part) <= limits.get("max_tokens", 1000)


def test_split_repeats_the_prefix_in_every_part_of_a_tree() -> None:
    parts = list(split_trees([trees()[0]], max_tokens=20))
    assert [[len(tree.branches) for tree in part] for part in parts] == [[2], [2]]


def test_split_keeps_whole_trees_together() -> None:
    parts = list(split_trees(trees(), max_tokens=65))
    assert [len(part) for part in parts] == [2, 1]


def test_a_sequence_over_the_limit_gets_its_own_part() -> None:
    parts = list(split_trees([Tree([0] * 50, [Branch([1])]), Tree([0], [Branch([1])])], max_tokens=20))
    assert [[tree.num_tokens for tree in part] for part in parts] == [[51], [2]]


def test_moving_a_batch_keeps_its_values() -> None:
    batch = pack(trees())
    moved = batch.to(torch.device("cpu"))
    assert moved.layout.segments == batch.layout.segments
    assert torch.equal(moved.input_ids, batch.input_ids)
