"""Test the losses of GRPO and its relatives by hand and against TRL's own code."""

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlqwen.algorithms.losses import Totals, kl_divergence, rollout_correction
from rlqwen.config import GRPOConfig
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from tests.losses import grpo_loss, sft_loss
from tests.narrowing import present

LENGTHS = (5, 1, 3, 4)


def make_batch(
    lengths: Sequence[int] = LENGTHS,
    advantages: tuple[float, float, float, float] | tuple[float] | tuple[float, float] | tuple[Any] = (
        1.0,
        -1.0,
        0.5,
        -0.7,
    ),
    *,
    seed: int = 0,
) -> tuple[PackedBatch, Tensor]:
    """Return a batch with logprobs of old policy, reference and sampler, and the policy's logprobs."""
    generator = torch.Generator().manual_seed(seed)
    branches = [
        Branch([7] * length, per_token={"sampler_logp": [0.0] * length}, per_sequence={"advantage": advantage})
        for length, advantage in zip(lengths, advantages, strict=True)
    ]
    batch = pack([Tree([1, 2], branches)])
    logp = -torch.rand(sum(lengths), generator=generator) * 3
    batch.per_token["old_logp"] = logp + torch.randn(sum(lengths), generator=generator) * 0.3
    batch.per_token["ref_logp"] = logp + torch.randn(sum(lengths), generator=generator) * 0.5
    batch.per_token["sampler_logp"] = batch.per_token["old_logp"] + torch.randn(sum(lengths), generator=generator) * 0.1
    return batch, logp.requires_grad_()


def totals_of(batch: PackedBatch) -> Totals:
    return Totals(tokens=batch.num_targets, sequences=batch.num_sequences)


def plain(**options: Any) -> GRPOConfig:
    return GRPOConfig(vllm_importance_sampling_correction=False, **options)


def test_sft_loss_is_the_mean_negative_log_likelihood() -> None:
    loss, _ = sft_loss(torch.tensor([-1.0, -2.0, -6.0]), Totals(tokens=3, sequences=1))
    assert loss.item() == 3


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    # Ratios are 1, so each token's loss is minus its advantage: 5 x -1, 1 x 1, 3 x -0.5, 4 x 0.7 over 13 tokens.
    [
        ("dapo", (-5 + 1 - 1.5 + 2.8) / 13),
        ("bnpo", (-5 + 1 - 1.5 + 2.8) / 13),
        ("grpo", (-1 + 1 - 0.5 + 0.7) / 4),
        ("dr_grpo", (-5 + 1 - 1.5 + 2.8) / (4 * 10)),
    ],
)
def test_normalizers_match_a_hand_calculation(loss_type: str, expected: list[int]) -> None:
    batch, logp = make_batch()
    batch.per_token.pop("old_logp", None)
    loss, _ = grpo_loss(logp, None, batch, plain(loss_type=loss_type, max_completion_length=10), totals_of(batch))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def one_token(ratio: float, advantage: float, **options: Any) -> tuple[Any, int | float | Any]:
    """Return loss and gradient of one token that is `ratio` times as likely under the policy as under the old policy."""
    batch, _ = make_batch((1,), (advantage,))
    batch.per_token["old_logp"] = torch.tensor([-1.0])
    logp = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
    loss, _ = grpo_loss(logp, None, batch, plain(**options), totals_of(batch))
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "grad"),
    [
        (1.1, 2.0, {}, -2.2, -2.2),
        (1.5, 2.0, {}, -2.4, 0.0),  # clipped at 1.2
        (1.5, 2.0, {"epsilon_high": 0.6}, -3.0, -3.0),
        (0.5, -1.0, {}, 0.8, 0.0),  # clipped at 0.8
        (0.5, 1.0, {}, -0.5, -0.5),
        (9.0, -1.0, {}, 9.0, 9.0),
        (9.0, -1.0, {"delta": 4.0}, 4.0, 0.0),  # dual clip
        (3.0, 2.0, {"loss_type": "cispo", "epsilon_high": 2.0}, -2 * 2 * (-1 + math.log(3)), -4.0),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, options: dict[str, Any], loss: Tensor, grad: float) -> None:
    got_loss, got_grad = one_token(ratio, advantage, **options)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert got_grad == pytest.approx(grad, rel=1e-5, abs=1e-9)


def test_gspo_has_one_ratio_per_sequence() -> None:
    batch, _ = make_batch((2,), (1.0,))
    batch.per_token["old_logp"] = torch.zeros(2)
    logp = torch.tensor([0.3, -0.1], requires_grad=True)
    config = plain(importance_sampling_level="sequence", loss_type="grpo")
    loss, _ = grpo_loss(logp, None, batch, config, totals_of(batch))
    loss.backward()
    ratio = math.exp(0.1)
    assert loss.item() == pytest.approx(-ratio)
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-ratio / 2] * 2)


def test_kl_estimators_by_hand() -> None:
    logp, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert kl_divergence(logp, ref, "k1").item() == pytest.approx(0.5)
    assert kl_divergence(logp, ref, "k2").item() == pytest.approx(0.125)
    assert kl_divergence(logp, ref, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_term_pulls_towards_the_reference(estimator: str) -> None:
    batch, _ = make_batch((1,), (0.0,))
    batch.per_token["ref_logp"] = torch.tensor([-2.0])
    logp = torch.tensor([-1.0], requires_grad=True)
    config = plain(beta=0.1, kl_estimator=estimator, use_bias_correction_kl=False)
    grpo_loss(logp, None, batch, config, totals_of(batch))[0].backward()
    assert logp.grad is not None
    assert logp.grad.item() > 0


def test_entropy_bonus_raises_entropy() -> None:
    batch, logp = make_batch()
    entropy = torch.ones(13, requires_grad=True)
    loss, metrics = grpo_loss(logp, entropy, batch, plain(entropy_coef=0.5), totals_of(batch))
    loss.backward()
    torch.testing.assert_close(entropy.grad, torch.full((13,), -0.5 / 13))
    assert metrics["entropy"].item() == 13


@pytest.mark.parametrize(
    ("mode", "expected"),
    # Ratios of policy to sampler: 2 and 5 in the first sequence, 0.1 in the second.
    [
        ("token_truncate", [2.0, 3.0, 0.5]),
        ("token_mask", [2.0, 0.0, 0.0]),
        ("sequence_truncate", [3.0, 3.0, 0.5]),
        ("sequence_mask", [0.0, 0.0, 0.0]),
    ],
)
def test_rollout_correction_by_hand(mode: str, expected: list[float]) -> None:
    batch, _ = make_batch((2, 1), (1.0, 1.0))
    batch.per_token["sampler_logp"] = -torch.tensor([2.0, 5.0, 0.1]).log()
    config = GRPOConfig(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.5)
    torch.testing.assert_close(rollout_correction(torch.zeros(3), batch, config), torch.tensor(expected))


VARIANTS = [
    {"loss_type": loss_type, **options}
    for loss_type in ("grpo", "dapo", "bnpo", "dr_grpo", "cispo")
    for options in (
        {},
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False, "epsilon_high": 0.4},
        {"delta": 1.5, "epsilon": 0.1},
        {"importance_sampling_level": "sequence"},
        {"entropy_coef": 0.01},
        {"vllm_importance_sampling_mode": "token_truncate"},
    )
]


def trl_loss(logp: Tensor, entropy: Tensor, batch: PackedBatch, config: GRPOConfig) -> Any:
    """Return the loss of TRL's GRPOTrainer._compute_loss for the same numbers, padded as it expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's import warns about the version of vLLM
        from trl import GRPOTrainer

    width = int(batch.lengths_S.max())
    mask = torch.arange(width) < batch.lengths_S[:, None]

    def pad(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_scatter(mask, values)

    correction = rollout_correction(batch.per_token["old_logp"], batch, config)
    rows = mask.shape[0]
    inputs = {
        "prompt_ids": torch.zeros(rows, 2, dtype=torch.long), "prompt_mask": torch.ones(rows, 2),
        "completion_ids": torch.zeros(rows, width, dtype=torch.long), "completion_mask": mask.long(),
        "advantages": batch.per_sequence["advantage"], "old_per_token_logps": pad(batch.per_token["old_logp"]),
        "ref_per_token_logps": pad(batch.per_token["ref_logp"]), "importance_sampling_ratio": pad(correction),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    args = SimpleNamespace(
        delta=config.delta, use_bias_correction_kl=config.use_bias_correction_kl, steps_per_generation=1
    )
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (pad(logp), pad(entropy), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=config.beta, args=args,
        importance_sampling_level=config.importance_sampling_level, loss_type=config.loss_type,
        epsilon_low=config.epsilon, epsilon_high=config.epsilon_high or config.epsilon, use_vllm=True,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1,
        max_completion_length=config.max_completion_length, accelerator=accelerator, _metrics=metrics,
        _entropy_bonus_enabled=bool(config.entropy_coef), entropy_coef=config.entropy_coef, use_adaptive_entropy=False,
        model=SimpleNamespace(training=True),
    )  # fmt: skip
    trainer.accelerator.sync_gradients = True
    compute_loss: Any = GRPOTrainer._compute_loss
    return compute_loss(trainer, None, inputs)


def our_loss(logp: Tensor, entropy: Tensor, batch: PackedBatch, config: GRPOConfig) -> Tensor:
    return grpo_loss(logp, entropy, batch, config, totals_of(batch))[0]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_equals_trl(options: Any) -> None:
    config = GRPOConfig(max_completion_length=10, **options)
    results = []
    for function in (our_loss, trl_loss):
        batch, logp = make_batch()
        entropy = torch.linspace(0.1, 2.0, 13).requires_grad_()
        loss = function(logp, entropy, batch, config)
        loss.backward()
        results.append((loss.detach(), logp.grad, entropy.grad))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)
    if config.entropy_coef:
        torch.testing.assert_close(results[0][2], results[1][2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_split_into_micro_batches_gives_the_same_loss_and_gradient(options: Any) -> None:
    config = GRPOConfig(max_completion_length=10, **options)
    batch, logp = make_batch()
    entropy = torch.linspace(0.1, 2.0, 13)
    totals = totals_of(batch)
    whole, _ = grpo_loss(logp, entropy, batch, config, totals)
    whole.backward()

    parts, grads, start = 0.0, [], 0
    for length, advantage in zip(LENGTHS, batch.per_sequence["advantage"].tolist(), strict=True):
        token = slice(start, start + length)
        part, _ = make_batch((length,), (advantage,))
        part.per_token["old_logp"], part.per_token["ref_logp"] = (
            batch.per_token["old_logp"][token],
            batch.per_token["ref_logp"][token],
        )
        part.per_token["sampler_logp"] = batch.per_token["sampler_logp"][token]
        part_logp = logp.detach()[token].requires_grad_()
        loss, _ = grpo_loss(part_logp, entropy[token], part, config, totals)
        loss.backward()
        parts += loss.item()
        grads.append(present(part_logp.grad))
        start += length
    assert parts == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(torch.cat(grads), logp.grad, atol=1e-6, rtol=1e-5)
