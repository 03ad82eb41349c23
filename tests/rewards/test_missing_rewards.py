"""Test the effect of missing rewards on totals, advantages, the loss and evaluation metrics."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlqwen.config import ScoringConfig
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.types import Completion, Group, Prompt
from tests.losses import grpo_loss
from tests.trainers.test_grpo import ROWS
from tests.trainers.test_grpo import make_trainer as make_grpo
from tests.trainers.test_ppo import make_trainer as make_ppo

FAILING = 13
"""Token id on which a reward fails."""


def fails_on_13(completion_ids: list[list[int]], **_: object) -> list[float]:
    if any(FAILING in ids for ids in completion_ids):
        raise ValueError("thirteen")
    return [float(ids[0] % 3) for ids in completion_ids]


def rises(completion_ids: list[list[int]], **_: object) -> list[Any]:
    return [0.25 * ids[0] for ids in completion_ids]


def not_for_single_tokens(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    return [None if len(ids) == 1 else 1.0 for ids in completion_ids]


def scored(
    *token_ids: list[int],
    rewards: Sequence[Callable[..., Any]] = (fails_on_13, rises),
    weights: tuple[float, float] | tuple[float] | None = None,
) -> Group:
    """Return a group of these completions, scored in this process."""
    completions = [Completion(ids, [-1.0] * len(ids), "stop", "") for ids in token_ids]
    group = Group(Prompt(0, [5, 6, 7], "x"), completions, policy_version=1)
    config = ScoringConfig(in_process=[reward.__name__ for reward in rewards], max_failure_share=1.0)
    with Scorer(build_rewards(list(rewards)), config, weights=weights) as scorer:
        scorer.score([group])
    return group


def test_a_failed_call_makes_the_total_missing_and_none_is_left_out() -> None:
    group = scored([3, 4], [FAILING, 4], [8], rewards=(fails_on_13, rises, not_for_single_tokens))
    assert group.call_statuses["fails_on_13"] == ["ok", "error", "ok"]
    assert group.rewards["rises"] == [0.75, 3.25, 2.0]
    assert group.total_rewards_G == [0.75 + 1.0, None, 2.0 + 2.0]
    assert scored([8], rewards=(not_for_single_tokens,)).total_rewards_G == [None]
    half = scored([8], [8, 9], rewards=(not_for_single_tokens, rises), weights=(1.0, 0.0))
    assert half.total_rewards_G == [None, 1.0]
    assert scored([8], rewards=(rises,), weights=(0.0,)).total_rewards_G == [
        0.0
    ]  # a run may train on the KL term alone
    monitored = scored([3, 4], [FAILING, 4], weights=(0.0, 2.0))
    assert monitored.total_rewards_G == [1.5, 6.5]  # the failing reward has weight 0, so it is only monitored


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "loss_type": "grpo"},
        {"entropy_coef": 0.1, "advantage_estimator": "rloo", "loss_type": "dr_grpo"},
        {"advantage_estimator": "reinforce_pp"},
        {"scale_rewards": "batch", "soft_overlong_cache": 2},
    ],
    ids=str,
)
def test_grpo_ignores_completions_with_a_missing_reward(
    tiny_model_path: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = make_grpo(tiny_model_path, tmp_path, **options)
    results = []
    for missing in ([[FAILING, 8, 9]], []):
        group = scored([4, 5, 6], [7], *missing, [11, 12])
        assert group.total_rewards_G.count(None) == len(missing)
        trainer._assign_advantages([group])
        update = trainer._pack([(group, list(range(len(group))))])
        (micro,) = update.micro_batches
        if trainer.args.beta:
            micro.per_token["ref_logp"] = trainer.policy.reference_logprobs(micro)
        logp_N, entropy_N = trainer.policy.logprobs(micro, entropy=True)
        loss_value, _ = grpo_loss(logp_N, entropy_N, micro, trainer.args, update.totals)
        present = [a for a, total in zip(group.advantages_G, group.total_rewards_G, strict=True) if total is not None]
        results.append((update.totals, micro.target_N.tolist(), present, loss_value.item()))
    trainer.close()
    (totals, targets, advantages, loss), (expected_totals, expected_targets, expected, expected_loss) = results
    assert (totals, targets) == (expected_totals, expected_targets)
    assert advantages == pytest.approx(expected)
    assert any(expected)
    assert loss == pytest.approx(expected_loss)


def test_ppo_ignores_completions_with_a_missing_reward(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_ppo(tiny_model_path, tmp_path)
    results = []
    for missing in ([[FAILING, 8, 9]], []):
        group = scored([4, 5, 6], [7], *missing, [11, 12])
        update = trainer._pack([(group, list(range(len(group))))])
        trainer._add_fixed_estimates([update])
        trainer._assign_advantages(update.micro_batches)
        (micro,) = update.micro_batches
        results.append(
            (
                update.totals,
                micro.target_N.tolist(),
                micro.per_sequence["reward"],
                micro.per_token["advantage"],
                micro.per_token["return"],
            )
        )
    trainer.close()
    assert results[0][:2] == results[1][:2]
    for ours, expected in zip(results[0][2:], results[1][2:], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("make", [make_grpo, make_ppo])
def test_evaluation_counts_missing_rewards_and_averages_the_others(
    tiny_model_path: Path, tmp_path: Path, make: Any
) -> None:
    def fails_once(prompts: Sequence[Prompt], **_: object) -> list[float]:
        if "3 + 1" in str(prompts):
            raise ValueError("three")
        return [1.0] * len(prompts)

    scoring = {"in_process": ["fails_once", "rises"], "max_failure_share": 1.0}
    rows = {"rows": ROWS} if make is make_grpo else {"eval_rows": ROWS[:4]}
    trainer = make(tiny_model_path, tmp_path, reward=[fails_once, rises], scoring=scoring, **rows)
    metrics = trainer.evaluate()
    trainer.close()
    assert metrics["eval/reward/missing"] == 0.25
    assert metrics["eval/reward/fails_once/error"] == 1
    assert metrics["eval/reward/fails_once/mean"] == 1.0
    (folder,) = (tmp_path / "completions").glob("eval-*")
    kept = [row["rewards"] for row in map(json.loads, folder.read_text().splitlines()) if row["reward"] is not None]
    assert metrics["eval/reward/mean"] == pytest.approx(sum(sum(one.values()) for one in kept) / 3)


def test_rewards_get_none_for_columns_that_a_row_lacks(tiny_model_path: Path, tmp_path: Path) -> None:
    """As in TRL's documentation of several tasks, columns are the union over the rows, whichever comes first."""
    seen: list[tuple[Any, ...]] = []

    def maths(completions: list[str], task: Any, solution: list[str], **columns: Any) -> list[float | None]:
        seen.append((task[0], solution[0], columns["tests"][0]))
        return [1.0 if one == "maths" else None for one in task]

    def code(completions: list[str], task: Any, tests: Any) -> list[float | None]:
        seen.append((task[0], tests[0]))
        return [1.0 if one == "code" else None for one in task]

    rows: list[dict[str, Any]] = [
        {"prompt": "1 + 1 = ", "task": "maths", "solution": "2"},
        {"prompt": "print", "task": "code", "tests": "x", "solution": None},
    ]
    scoring = {"in_process": ["maths", "code"]}
    trainer = make_grpo(tiny_model_path, tmp_path, reward=[maths, code], rows=rows, scoring=scoring, max_steps=1)
    trainer.train()
    assert set(seen) == {("maths", "2", None), ("code", None, "x"), ("maths", None), ("code", "x")}
    assert trainer.state.log_history[0]["reward/missing"] == 0
    line = "reward 'code' is given None in 1 of 2 rows of train_dataset, which have no 'tests'"
    assert line in trainer.reports["train"].warnings
