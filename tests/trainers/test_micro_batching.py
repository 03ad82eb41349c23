"""Test sharding over ranks and micro-batches: equal numbers on every rank, and idle batches that change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlqwen.algorithms.losses import Totals
from rlqwen.algorithms.losses.preference import AnswerTotals, read_answers
from rlqwen.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig
from rlqwen.distributed.ranks import Ranks
from rlqwen.models.critic import ScalarModel, ValueHead
from rlqwen.models.loading import load_model, load_scalar_model
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, PackedBatch, Tree, idle_batch, pack
from rlqwen.rollout.group_broadcast import pack_groups, unpack_groups
from rlqwen.trainers.micro_batching import arriving_micro_batches, count_tokens, micro_batches, pack_share, share_trees
from rlqwen.types import Completion, Group, Prompt
from tests.losses import grpo_loss, ppo_policy_loss, ppo_value_loss, preference_loss, reward_loss


def tree(prefix: int, *lengths: int, **branch: Any) -> Tree:
    return Tree([1] * prefix, [Branch([2] * length, **branch) for length in lengths])


def lengths(shares: list[list[Tree]]) -> list[list[list[int]]]:
    return [[[len(branch.token_ids) for branch in tree.branches] for tree in share] for share in shares]


def rank(number: int, of: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.world_size = number, of
    return ranks


def test_branches_are_sharded_evenly_and_trees_stay_whole_if_possible() -> None:
    trees = [tree(3, 1, 2), tree(3, 3, 4)]
    assert lengths(share_trees(trees, 1)) == [[[1, 2], [3, 4]]]
    assert lengths(share_trees(trees, 2)) == [[[1, 2]], [[3, 4]]]
    assert lengths(share_trees([tree(3, 1, 2, 3, 4)], 2)) == [[[1, 2]], [[3, 4]]]
    assert lengths(share_trees([*trees, tree(3, 5, 6)], 4)) == [[[1]], [[2], [3]], [[4]], [[5, 6]]]
    assert lengths(share_trees([tree(3, 1)], 2)) == [[], [[1]]]
    assert share_trees([], 2) == [[], []]


def test_trees_that_arrive_one_by_one_give_the_ranks_micro_batches_in_turn() -> None:
    trees = [tree(3, 1, 2), tree(3, 3, 4), tree(3, 5, 6), tree(2, 7, 8, 9)]
    alone = list(arriving_micro_batches(iter(trees), rank(0, 1), max_branches=2))
    whole = list(micro_batches(trees, rank(0, 1), max_branches=2))
    assert [one.lengths_S.tolist() for one in alone] == [one.lengths_S.tolist() for one in whole]
    by_rank = [list(arriving_micro_batches(iter(trees), rank(r, 3), max_branches=2)) for r in range(3)]
    assert [[one.lengths_S.tolist() for one in own] for own in by_rank] == [
        [[1, 2], [7, 8]], [[3, 4], [9]], [[5, 6], []],
    ]  # fmt: skip
    assert list(arriving_micro_batches(iter([]), rank(1, 3), max_branches=2)) == []


def test_sharding_by_tokens_balances_tokens() -> None:
    # The first tree has 22 of 40 tokens. The middle of its last branch is token 20 + 2 / 2 = 21, so it goes to rank 1.
    trees = [tree(10, 8, 2, 2), tree(10, 8)]
    assert lengths(share_trees(trees, 2, by_tokens=True)) == [[[8, 2]], [[2], [8]]]
    assert lengths(share_trees(trees, 2, by_tokens=True, divisible=False)) == [[[8, 2, 2]], [[8]]]


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_shards_contain_all_branches_in_order(by_tokens: bool, num_ranks: int) -> None:
    trees = [tree(place % 4, *range(1, 1 + place % 6 + 1)) for place in range(9)]
    shares = share_trees(trees, num_ranks, by_tokens=by_tokens)
    assert len(shares) == num_ranks
    sharded = [branch for share in shares for tree in share for branch in tree.branches]
    given = [branch for tree in trees for branch in tree.branches]
    assert all(ours is theirs for ours, theirs in zip(sharded, given, strict=True))
    sizes = [sum(len(tree.branches) for tree in share) for share in shares]
    if not by_tokens:
        assert max(sizes) - min(sizes) <= 1


def test_every_rank_has_the_same_number_of_micro_batches() -> None:
    trees = [tree(2, 30), tree(2, 4), tree(2, 4), tree(2, 4)]
    batches = [list(micro_batches(trees, rank(number, 2), max_tokens=8)) for number in range(2)]
    assert [[batch.num_sequences for batch in own] for own in batches] == [[1, 0, 0], [1, 1, 1]]
    assert [count_tokens(own) for own in batches] == [32, 18]
    assert list(micro_batches([], rank(0, 2), max_tokens=8)) == []
    parts = [[[trees[0]], [trees[1]]], []]
    assert [batch.num_sequences for batch in pack_share(parts, rank(1, 2))] == [0, 0]


@pytest.fixture(scope="module")
def policy(tiny_model_path: Path) -> Policy:
    args = GRPOConfig(use_cpu=True)
    return Policy(load_model(str(tiny_model_path), args), args)


def idle(**branch: Any) -> PackedBatch:
    batch = idle_batch(tree(4, 6, 7, per_token={"sampler_logp": [-1.0] * 7}, **branch))
    assert (batch.num_targets, batch.num_sequences) == (0, 0)
    assert batch.num_tokens == 2
    return batch


def assert_nothing(loss: Tensor, parameters: list[torch.nn.Parameter]) -> None:
    """Check that the loss is exactly 0, with a gradient of exactly 0 for every weight."""
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, parameters)
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_an_idle_batch_contributes_nothing_to_grpo(policy: Policy, loss_type: str) -> None:
    batch, config = idle(per_sequence={"advantage": 0.0}), GRPOConfig(loss_type=loss_type, beta=0.1, entropy_coef=0.1)
    logp_N, entropy_N = policy.logprobs(batch, entropy=True)
    batch.per_token["ref_logp"] = logp_N.detach()
    loss, sums = grpo_loss(logp_N, entropy_N, batch, config, Totals(tokens=5, sequences=2))
    assert all(value.item() == 0 for value in sums.values())
    assert_nothing(loss, policy.trained_parameters)


def test_an_idle_batch_contributes_nothing_to_ppo(policy: Policy) -> None:
    batch, config = idle(), PPOConfig(kl_penalty="loss", kl_estimator="k3")
    logp_N, entropy_N, hidden_NC = policy.logprobs_and_hidden(batch, entropy=True)
    head = ValueHead(hidden_NC.shape[1], train_trunk=True, device=torch.device("cpu"))
    values_N = head.values(batch, hidden_NC)
    for name in ("old_logp", "ref_logp", "advantage", "old_value", "return"):
        batch.per_token[name] = logp_N.detach()
    totals = Totals(tokens=5, sequences=2)
    policy_loss, _ = ppo_policy_loss(logp_N, entropy_N, batch, config, totals, kl_coef=0.1)
    value_loss, _ = ppo_value_loss(values_N, batch, config, totals)
    assert_nothing(policy_loss + value_loss, [*policy.trained_parameters, *head.trained_parameters])


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", "ipo", "orpo", "kto"])
def test_an_idle_batch_contributes_nothing_to_dpo(policy: Policy, loss_type: str) -> None:
    batch, config = idle(per_sequence={"ref_logp": -3.0, "label": True}), DPOConfig(loss_type=loss_type)
    assert batch.per_sequence["ref_logp"].shape == (0,)
    answers = read_answers(policy.logprobs(batch)[0], batch, ref_logp_S=batch.per_sequence["ref_logp"], ld_alpha=0.5)
    totals = AnswerTotals(good=1, bad=1, good_tokens=6, pairs=0 if loss_type == "kto" else 1)
    loss, metrics = preference_loss(answers, config, totals, kl=torch.tensor(0.1))
    assert all(value.item() == 0 for value in metrics.values())
    assert_nothing(loss, policy.trained_parameters)


def test_an_idle_batch_contributes_nothing_to_a_reward_model(tiny_model_path: Path) -> None:
    args = RewardConfig(use_cpu=True)
    model = ScalarModel(load_scalar_model(str(tiny_model_path), args)[0], args)
    batch = idle(per_sequence={"margin": 0.0})
    scores_S = model.scores(batch)
    loss, _ = reward_loss(
        scores_S[::2], scores_S[1::2], batch.per_sequence["margin"][::2], Totals(tokens=0, sequences=3)
    )
    assert_nothing(loss, model.trained_parameters)


def test_answer_totals_of_trees_equal_those_of_the_packed_batch() -> None:
    trees = [
        Tree(
            [1, 2],
            [
                Branch([3, 4, 5], per_sequence={"label": True}),
                Branch([6, 7], loss_mask=[False, True], per_sequence={"label": False}),
            ],
        ),
        Tree([], [Branch([3, 4, 5], per_sequence={"label": True}), Branch([6], per_sequence={"label": False})]),
    ]
    assert [one.target_counts for one in trees] == [[3, 1], [2, 0]]
    assert AnswerTotals.of_trees(trees, paired=True) == AnswerTotals.of([pack(trees)], paired=True)


def test_broadcast_groups_equal_the_originals_except_texts() -> None:
    prompts = [Prompt(index, [index], "x") for index in (4, 7)]
    groups = [
        Group(
            prompts[1],
            [Completion([1, 2, 3], [-0.5, -0.25, -2.0], "stop", "abc"), Completion([], [], "length", "")],
            policy_version=3,
            rewards={"a": [1.0, None]},
            call_statuses={"a": ["ok", "timeout"]},
            total_rewards_G=[0.1, None],
        ),
        Group(prompts[0], [Completion([9], [-1.0], "length", "z")], policy_version=2, total_rewards_G=[2.0]),
    ]
    arrived = unpack_groups(pack_groups(groups), prompts)
    for group in groups:
        for completion in group.completions:
            completion.text = ""
    assert arrived == groups
    assert arrived[0].prompt is prompts[1]
