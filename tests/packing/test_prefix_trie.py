"""Test that shared runs of tokens are found, cut at the right place, and laid out in the order in which they came."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel

from rlqwen.config import SFTConfig
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, Tree, pack, split_trees
from rlqwen.packing.forward import _sequential
from rlqwen.packing.prefix_trie import MIN_SHARED, PrefixTrie
from rlqwen.packing.row_layout import ROOT, Layout, Segment
from tests.models.test_policy import make_model, padded_logprobs
from tests.packing.deep_trees import deep_trees

SYSTEM = list(range(1, 61))
"""A prefix of 60 tokens that trees share."""


def lay_out(*sequences: list[int]) -> tuple[list[int], Layout]:
    trie = PrefixTrie()
    token_ids, layout = trie.lay_out([trie.add(sequence) for sequence in sequences])
    assert trie.num_tokens == len(token_ids) == layout.num_tokens
    return token_ids.tolist(), layout


def test_a_shared_run_is_cut_out_where_sequences_part() -> None:
    token_ids, layout = lay_out([*SYSTEM, 70, 71], [5], [*SYSTEM, 80])
    assert token_ids == [*SYSTEM, 70, 71, 80, 5]
    assert layout.segments == [Segment(0, 60), Segment(60, 62, 0), Segment(62, 63, 0), Segment(63, 64)]
    assert layout.leaves == [1, 3, 2]
    assert (layout.depths, layout.offsets, layout.longest) == ([0, 1, 1, 0], [0, 60, 60, 0], 62)


def test_a_sequence_may_end_inside_another_or_equal_it() -> None:
    _, layout = lay_out([*SYSTEM, 70], [*SYSTEM, 70], SYSTEM[:40])
    assert layout.segments == [Segment(0, 40), Segment(40, 61, 0)]
    assert layout.leaves == [1, 1, 0]


@pytest.mark.parametrize(("shared", "num_tokens"), [(MIN_SHARED - 1, 2 * MIN_SHARED), (MIN_SHARED, MIN_SHARED + 2)])
def test_only_runs_that_are_long_enough_are_shared(shared: int, num_tokens: int) -> None:
    _, layout = lay_out([*range(shared), 1000], [*range(shared), 2000])
    assert layout.num_tokens == num_tokens


def test_a_sequence_without_tokens_ends_nowhere() -> None:
    _, layout = lay_out([], [3])
    assert layout.leaves == [ROOT, 0]


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_is_read_back_from_its_path(seed: int) -> None:
    sequences = [tree.prefix + branch.token_ids for tree in deep_trees(seed) for branch in tree.branches]
    random.Random(seed).shuffle(sequences)
    token_ids, layout = lay_out(*sequences)
    for sequence, leaf in zip(sequences, layout.leaves, strict=True):
        assert np.array(token_ids)[layout.rows(leaf)].tolist() == sequence
        assert layout.positions()[layout.rows(leaf)].tolist() == list(range(len(sequence)))
        assert layout.rows(leaf, 7).tolist() == layout.rows(leaf)[-7:].tolist()
    segments = layout.segments
    assert [one.end for one in segments[:-1]] == [one.start for one in segments[1:]]
    assert all(one.length for one in segments)
    for number, end in enumerate(layout.subtree_ends()):
        inside = [n for n, one in enumerate(segments) if segments[number].start <= one.start < end]
        assert inside == [n for n in range(len(segments)) if number in layout.path(n)]


def test_random_trees_are_deep_enough_to_test_something() -> None:
    depths = [max(pack(deep_trees(seed)).layout.depths) for seed in range(10)]
    assert max(depths) >= 4
    given = sum(tree.num_tokens for seed in range(10) for tree in deep_trees(seed))
    assert sum(pack(deep_trees(seed)).num_tokens for seed in range(10)) < 0.8 * given


def logprobs_and_gradients(model: PreTrainedModel, logp: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, len(logp), dtype=logp.dtype)
    return [logp, *torch.autograd.grad((logp * weights).sum(), [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_trees_of_any_depth_equal_padded_rows(kind: str, seed: int) -> None:
    model = make_model(kind)
    trees = deep_trees(seed)
    policy = Policy(model, SFTConfig())
    packed = logprobs_and_gradients(model, policy.logprobs(pack(trees))[0])
    model.set_attn_implementation("sdpa")
    padded = logprobs_and_gradients(model, padded_logprobs(model, trees))
    for one, other in zip(packed, padded, strict=True):
        assert_close(one, other, atol=3e-5, rtol=1e-4)


def test_trees_of_any_depth_equal_one_sequence_at_a_time() -> None:
    model: Any = make_model("qwen3")
    batch = pack(deep_trees(1))
    with torch.no_grad():
        logp, _ = Policy(model, SFTConfig()).logprobs(batch)
        model.set_attn_implementation("sdpa")
        hidden = _sequential(model, batch, batch.source_N, batch.sequence_N, None)
        head: torch.nn.Linear = model.lm_head
        alone = head(hidden).log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]
    assert_close(logp, alone, atol=3e-5, rtol=1e-4)


def test_experts_are_recorded_where_the_tokens_lie() -> None:
    def recorded(first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count).reshape(count, 1, 1)

    trees = [
        Tree(SYSTEM, [Branch([70, 71, 72], experts=recorded(60, 2))], recorded(0, 60)),
        Tree([*SYSTEM, 80], [Branch([90], experts=recorded(161, 1))], recorded(0, 61)),
    ]
    batch = pack(trees)
    assert batch.input_ids[0].tolist() == [*SYSTEM, 70, 71, 72, 80, 90]
    assert batch.experts_TLK is not None
    assert batch.experts_TLK.flatten().tolist() == [*range(60), 60, 61, -1, 60, 161]


def test_targets_of_a_shared_run_count_for_each_sequence() -> None:
    batch = pack([Tree([], [Branch([*SYSTEM, 70]), Branch([*SYSTEM, 80], per_token={})])])
    assert batch.num_tokens == 62
    assert batch.lengths_S.tolist() == [60, 60]
    assert batch.target_N.tolist() == [*SYSTEM[1:], 70, *SYSTEM[1:], 80]
    assert batch.source_N.tolist() == [*range(60), *range(60)]


@pytest.mark.parametrize("max_tokens", [80, 150, 400])
def test_micro_batches_are_counted_as_they_are_packed(max_tokens: int) -> None:
    trees = [Tree([*SYSTEM, 100 + i], [Branch([200 + i] * 4), Branch([300 + i] * 3)]) for i in range(30)]
    parts = list(split_trees(trees, max_tokens=max_tokens))
    sizes = [pack(part).num_tokens for part in parts]
    assert sum(len(tree.branches) for part in parts for tree in part) == 60
    assert all(size <= max_tokens for size in sizes)
    # Each part but the last is full: the next tree, of 8 tokens beside what is shared, would not fit.
    assert all(size > max_tokens - 8 for size in sizes[:-1])
