"""Test GRPO: learning, micro-batches, signal in groups, the reference, masks, metrics and refusals."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlqwen import GRPOConfig, GRPOTrainer
from rlqwen.data.cleaning.texts import Row
from rlqwen.errors import ConfigError, RewardSpecError
from rlqwen.rollout.group_metrics import describe_groups
from rlqwen.rollout.sampling_parameters import sampling_seed
from rlqwen.types import Completion, Group, Prompt

ROWS = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}], "solution": str(i + 1)} for i in range(12)]


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def constant(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def make_trainer(
    model: Path,
    folder: Path,
    *,
    reward: Callable[..., Any] | list[Callable[..., Any]] = prefers_even,
    rows: Sequence[Row] = ROWS,
    peft_config: LoraConfig | None = None,
    **options: Any,
) -> GRPOTrainer:
    """Build a trainer that samples with the transformers engine in this process, because vLLM has its own tests."""
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
        "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "rollout": {"engine": "transformers"},
        "scoring": {"in_process": [reward.__name__] if callable(reward) else []},
    }  # fmt: skip
    return GRPOTrainer(
        str(model), reward, GRPOConfig(**defaults | options), rows, eval_dataset=rows[:4], peft_config=peft_config
    )


def steps(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def test_reward_rises_and_the_folder_is_complete(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path, max_steps=25, per_device_train_batch_size=32, learning_rate=5e-3, eval_on_start=True
    )
    trainer.train()
    rewards = steps(trainer, "reward/mean")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1  # measured for three seeds and models: 0.22 to 0.30
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"initial_eval", "final_eval"} <= summary.keys()  # these have too few samples to show progress
    assert 0 <= summary["final_eval"]["eval/reward/mean"] <= 1
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    expected = {
        "loss", "entropy", "grad_norm", "reward/mean", "reward/prefers_even/mean", "completions/mean_length",
        "completions/truncated", "tokens/generated", "tokens/trained", "sampling/logp_gap", "time/rollout",
        "time/reward", "time/train", "time/sync", "time/step", "groups/no_signal",
    }  # fmt: skip
    assert expected <= last.keys()
    assert last["sampling/logp_gap"] < 1e-4
    rows = [json.loads(line) for line in (tmp_path / "completions" / "step-000003.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    assert rows[0]["rewards"].keys() == {"prefers_even"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        {"max_tokens_per_micro_batch": 50},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "generation_batch_size": 12},
    ],
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_micro_batches_change_only_rounding(
    tiny_model_path: Path, tmp_path: Path, split: dict[str, int], loss_type: str
) -> None:
    size = split.get("generation_batch_size", 16)
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "max_steps": 1,
        "beta": 0.1,
        "optim": "adamw_torch",
        "adam_epsilon": 1.0,
    }
    whole = make_trainer(tiny_model_path, tmp_path / "whole", per_device_train_batch_size=size, **options)
    parts = make_trainer(tiny_model_path, tmp_path / "parts", **{"per_device_train_batch_size": size} | options | split)
    whole.train()
    parts.train()
    assert steps(parts) == pytest.approx(steps(whole), abs=1e-6)
    assert steps(parts, "grad_norm") == pytest.approx(steps(whole, "grad_norm"), rel=1e-4)
    assert steps(parts, "tokens/generated") == steps(whole, "tokens/generated")


def test_leaving_out_groups_without_signal_does_not_change_the_update(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave the half of the groups that have equal rewards out of the forward pass."""

    def by_prompt(prompts: list[list[dict[str, str]]], completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
        signal = [int(prompt[0]["content"][0]) % 2 for prompt in prompts]
        return [s * (sum(ids) % 3) for s, ids in zip(signal, completion_ids, strict=True)]

    results = []
    for name in ("dropped", "kept"):
        if name == "kept":
            monkeypatch.setattr(GRPOTrainer, "_trains_without_advantage", True)
        trainer = make_trainer(tiny_model_path, tmp_path / name, reward=by_prompt, max_steps=1, adam_epsilon=1.0)
        trainer.train()
        results.append(trainer)
    dropped, kept = results
    assert steps(dropped, "tokens/trained")[0] < steps(kept, "tokens/trained")[0]
    assert steps(dropped, "grad_norm") == pytest.approx(steps(kept, "grad_norm"), rel=1e-5)
    assert steps(dropped) == pytest.approx(steps(kept), abs=1e-7)


def test_later_updates_use_the_logprobs_from_before_the_first_update(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_model_path, tmp_path, per_device_train_batch_size=8, generation_batch_size=16, num_iterations=2,
        max_steps=8, learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 8
    assert len(steps(trainer)) == 2
    assert max(steps(trainer, "clip_ratio")) > 0


def test_sync_ref_model_resets_the_kl(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, beta=0.1, max_steps=3, learning_rate=1e-2, sync_ref_model=True,
                           ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)  # fmt: skip
    trainer.train()
    kl = steps(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-5
    assert kl[2] < 1e-6


def test_lora_samples_from_the_adapted_policy(tiny_model_path: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(tiny_model_path, tmp_path, peft_config=lora, beta=0.05, max_steps=2)
    trainer.train()
    assert max(steps(trainer, "sampling/logp_gap")) < 1e-4
    assert steps(trainer, "kl")[0] > 1e-4


def test_dynamic_sampling_fills_the_batch_with_groups_that_have_signal(tiny_model_path: Path, tmp_path: Path) -> None:
    def rarely(prompts: list[list[dict[str, str]]], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [
            float(sum(ids) % 2) if int(prompt[0]["content"].split()[0]) % 3 == 0 else 0.0
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    trainer = make_trainer(
        tiny_model_path, tmp_path, reward=rarely, dynamic_sampling=True, max_sampling_rounds=6, max_steps=2
    )
    trainer.train()
    assert max(steps(trainer, "groups/sampled")) > 2
    rows = [json.loads(line) for line in (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {row["advantage"] != 0 for row in rows} == {True}


def test_the_loss_is_zero_if_no_group_has_signal(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, reward=constant, max_steps=1)
    trainer.train()
    assert steps(trainer) == [0.0]
    assert steps(trainer, "groups/no_signal") == [1.0]


def test_truncated_completions_are_masked_out(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, mask_truncated_completions=True, max_steps=1, beta=0.1)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()]
    finished = sum(row["num_tokens"] for row in rows if row["finish_reason"] == "stop")
    assert steps(trainer, "completions/truncated")[0] > 0.5
    assert steps(trainer, "tokens/trained")[0] <= finished + 2 * 30


def test_soft_overlong_penalty_lowers_the_advantage_of_long_completions(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model_path, tmp_path, reward=constant, soft_overlong_cache=4, max_completion_length=8)
    prompt = Prompt(0, [1], "x")
    group = Group(prompt, [Completion([1] * n, [0.0] * n, "stop", "") for n in (2, 8)], 1, total_rewards_G=[1.0, 1.0])
    trainer._assign_advantages([group])
    assert group.advantages_G[0] > 0 > group.advantages_G[1]
    trainer.close()


def test_the_example_of_trls_documentation_runs(tiny_model_path: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    def reward_num_unique_letters(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
        contents = [completion[0]["content"] for completion in completions]
        return [float(len(set(content))) for content in contents]

    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 1, "max_completion_length": 4, "use_vllm": False,
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_path),
        reward_funcs=[reward_num_unique_letters, "accuracy"],
        args=GRPOConfig(**arguments),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["reward/reward_num_unique_letters/mean"] > 0
    assert "reward/accuracy/mean" in entry


def test_wrong_inputs_are_refused_before_training(tiny_model_path: Path, tmp_path: Path) -> None:
    def needs_unit(completions: list[str], unit: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RewardSpecError, match="unit"):
        make_trainer(tiny_model_path, tmp_path / "a", reward=needs_unit)
    with pytest.raises(ConfigError, match="max_completion_length"):
        make_trainer(tiny_model_path, tmp_path / "b", max_completion_length=5000)
    with pytest.raises(ConfigError, match="weights"):
        make_trainer(tiny_model_path, tmp_path / "c", reward_weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="sync_ref_model"):
        make_trainer(tiny_model_path, tmp_path / "d", sync_ref_model=True)


def test_sampling_seeds_depend_on_every_part_and_are_reproducible() -> None:
    seeds = {
        sampling_seed(*parts)
        for parts in [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    }
    assert len(seeds) == 5
    assert sampling_seed(42, "train/1", 3, 5) == 6827950987873008809


def test_group_metrics_match_a_hand_calculation() -> None:
    completions = [Completion([1, 2], [0, 0], "stop", ""), Completion([1, 2, 3, 4], [0] * 4, "length", "")]
    group = Group(Prompt(0, [1], "x"), completions, 1, rewards={"a": [1.0, None]}, total_rewards_G=[0.5, None])
    metrics = describe_groups([group])
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/missing"] == 0.5
    assert metrics["reward/a/mean"] == 1.0
    assert metrics["completions/mean_length"] == 3
    assert metrics["completions/truncated"] == 0.5
    assert metrics["tokens/generated"] == 6
    assert torch.isnan(torch.tensor(describe_groups([])["reward/mean"]))
