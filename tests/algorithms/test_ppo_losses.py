"""Test PPO's two losses by hand and against the formulas of TRL 1.9's trainer on padded rows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlqwen.algorithms.losses import Totals
from rlqwen.config import PPOConfig
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from tests.losses import ppo_policy_loss, ppo_value_loss

LENGTHS = (3, 5, 1, 4)


def make_batch(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> tuple[PackedBatch, Tensor, Tensor]:
    """Return a batch with the estimates of a rollout, and logprobs and values of a policy that has changed since."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def draw(scale: float = 1.0) -> Tensor:
        return torch.randn(count, generator=generator) * scale

    sampler = [(-torch.rand(length, generator=generator)).tolist() for length in lengths]
    branches = [Branch([7] * n, per_token={"sampler_logp": logp}) for n, logp in zip(lengths, sampler, strict=True)]
    batch = pack([Tree([1, 2], branches)])
    batch.per_token["old_logp"] = batch.per_token["sampler_logp"].clone()
    batch.per_token["ref_logp"] = batch.per_token["old_logp"] + draw(0.3)
    batch.per_token["old_value"], batch.per_token["advantage"], batch.per_token["return"] = draw(), draw(), draw()
    logp = (batch.per_token["old_logp"] + draw(0.3)).requires_grad_()
    values = (batch.per_token["old_value"] + draw(0.4)).requires_grad_()
    return batch, logp, values


def test_policy_loss_by_hand() -> None:
    """Use the ratios e^0.1, e^0.5 (clipped to 1.2) and e^-0.5 (not clipped, because the advantage is positive)."""
    batch = pack([Tree([1], [Branch([7, 7, 7])])])
    batch.per_token["old_logp"] = torch.tensor([-1.0, -1.0, -1.0])
    batch.per_token["advantage"] = torch.tensor([1.0, 2.0, 3.0])
    logp = torch.tensor([-0.9, -0.5, -1.5], requires_grad=True)
    loss, metrics = ppo_policy_loss(logp, None, batch, PPOConfig(), Totals(tokens=3, sequences=1), kl_coef=0.0)
    expected = -(1.1051709 + 2 * 1.2 + 3 * 0.6065307) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["clip_ratio"].item() == 1
    loss.backward()
    assert logp.grad is not None
    assert logp.grad[0] < 0  # a token with a positive advantage becomes likelier
    assert logp.grad[1] == 0  # a clipped token has no gradient
    assert logp.grad[2] < 0


def test_value_loss_by_hand() -> None:
    """Use value 1.0, old value 0.5, clip range 0.2 and return 0: clipped to 0.7 the error is smaller, so 1.0 counts."""
    batch = pack([Tree([1], [Branch([7, 7])])])
    batch.per_token["old_value"], batch.per_token["return"] = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    values = torch.tensor([1.0, 0.9], requires_grad=True)
    loss, metrics = ppo_value_loss(values, batch, PPOConfig(), Totals(tokens=2, sequences=1))
    # The second value has a squared error of 0.01, and of 0.09 if clipped to 0.7.
    assert loss.item() == pytest.approx(0.5 * (1.0 + 0.09) / 2)
    assert metrics["critic/clip_ratio"].item() == 1
    unclipped, _ = ppo_value_loss(values, batch, PPOConfig(cliprange_value=0), Totals(tokens=2, sequences=1))
    assert unclipped.item() == pytest.approx(0.5 * (1.0 + 0.01) / 2)


def test_equals_the_formulas_of_trl() -> None:
    """Compare with masked means of the clipped losses over padded rows.

    The formulas are in trl 1.9.0, trl/experimental/ppo/ppo_trainer.py, after `for micro_batch_start in`.
    """
    batch, logp, values = make_batch()
    config = PPOConfig(vf_coef=0.1, vllm_importance_sampling_correction=False)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]

    def pad(flat: Any) -> Tensor:
        return torch.zeros(mask.shape).masked_scatter(mask, flat)

    def masked_mean(padded: Tensor) -> Tensor:
        return (padded * mask).sum() / mask.sum()

    value, old = pad(values), pad(batch.per_token["old_value"])
    clipped = torch.clamp(value, old - config.cliprange_value, old + config.cliprange_value)
    squares = torch.max(
        torch.square(value - pad(batch.per_token["return"])), torch.square(clipped - pad(batch.per_token["return"]))
    )
    vf_loss = 0.5 * masked_mean(squares)
    ratio = torch.exp(pad(logp) - pad(batch.per_token["old_logp"]))
    advantage = pad(batch.per_token["advantage"])
    clipped_ratio = torch.clamp(ratio, 1.0 - config.cliprange, 1.0 + config.cliprange)
    pg_loss = masked_mean(torch.max(-advantage * ratio, -advantage * clipped_ratio))
    theirs = pg_loss + config.vf_coef * vf_loss
    their_grads = torch.autograd.grad(theirs, (logp, values), retain_graph=True)

    totals = Totals(tokens=sum(LENGTHS), sequences=len(LENGTHS))
    policy_loss, _ = ppo_policy_loss(logp, None, batch, config, totals, kl_coef=0.0)
    value_loss, _ = ppo_value_loss(values, batch, config, totals)
    ours = policy_loss + config.vf_coef * value_loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for our_grad, their_grad in zip(torch.autograd.grad(ours, (logp, values)), their_grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, atol=1e-6, rtol=0)


def test_every_split_into_micro_batches_gives_the_same_loss() -> None:
    config = PPOConfig(kl_penalty="loss", kl_estimator="k3", entropy_coef=0.1)
    batch, logp, values = make_batch()
    entropy = torch.rand(sum(LENGTHS))
    totals = Totals(tokens=sum(LENGTHS), sequences=len(LENGTHS))
    whole = ppo_policy_loss(logp, entropy, batch, config, totals, kl_coef=0.3)[0]
    whole = whole + ppo_value_loss(values, batch, config, totals)[0]
    parts = torch.zeros(())
    start = 0
    names = ("sampler_logp", "old_logp", "ref_logp", "old_value", "advantage", "return")
    for length in LENGTHS:
        part = slice(start, start + length)
        micro = pack([Tree([1, 2], [Branch([7] * length)])])
        for name in names:
            micro.per_token[name] = batch.per_token[name][part]
        parts = parts + ppo_policy_loss(logp[part], entropy[part], micro, config, totals, kl_coef=0.3)[0]
        parts = parts + ppo_value_loss(values[part], micro, config, totals)[0]
        start += length
    assert parts.item() == pytest.approx(whole.item(), abs=1e-6)


def test_kl_in_the_loss_pulls_towards_the_reference() -> None:
    batch, _, _ = make_batch()
    batch.per_token["advantage"] = torch.zeros(sum(LENGTHS))
    logp = batch.per_token["old_logp"].clone().requires_grad_()
    config = PPOConfig(kl_penalty="loss", kl_estimator="k2")
    totals = Totals(tokens=sum(LENGTHS), sequences=len(LENGTHS))
    loss, _ = ppo_policy_loss(logp, None, batch, config, totals, kl_coef=1.0)
    loss.backward()
    assert logp.grad is not None
    assert torch.equal(torch.sign(logp.grad), torch.sign(logp.detach() - batch.per_token["ref_logp"]))


def test_an_entropy_bonus_lowers_the_loss() -> None:
    batch, logp, _ = make_batch()
    totals = Totals(tokens=sum(LENGTHS), sequences=len(LENGTHS))
    entropy = torch.full((sum(LENGTHS),), 2.0)
    plain = ppo_policy_loss(logp, entropy, batch, PPOConfig(), totals, kl_coef=0.0)[0]
    bonus = ppo_policy_loss(logp, entropy, batch, PPOConfig(entropy_coef=0.1), totals, kl_coef=0.0)[0]
    assert (plain - bonus).item() == pytest.approx(0.2, rel=1e-5)
