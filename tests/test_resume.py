"""A run that is killed and goes on comes to the same as one that isn't, to the bit; what has changed is refused."""

import json
import os
import signal

import pytest
import torch
from forked import run_forked
from peft import LoraConfig
from transformers import TrainerCallback

from rlqwen import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlqwen.metrics import read_metrics
from rlqwen.verification import compare_runs

PROMPTS = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}], "solution": str(i + 1)} for i in range(9)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {i} {'x' * (i % 7)}"},
            {"role": "assistant", "content": f"{i}" * 3},
        ]
    }
    for i in range(11)
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{i} + 1 = ?"}],
        "chosen": [{"role": "assistant", "content": str(i + 1)}],
        "rejected": [{"role": "assistant", "content": str(i)}],
    }
    for i in range(9)
]
SHARED = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, "learning_rate": 3e-3}
ONLINE = {
    "max_completion_length": 5,
    "rollout": {"engine": "transformers"},
    "scoring": {"in_process": ["prefers_even"]},
}


def prefers_even(completion_ids, **kwargs):
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1, **options)


def sft(model, folder, *, peft_config=None, train=CHATS, **options):
    args = SFTConfig(**SHARED | {"output_dir": str(folder)} | options)
    return SFTTrainer(str(model), args, train, CHATS[:4], peft_config=peft_config)


def dpo(model, folder, *, peft_config=None, **options):
    args = DPOConfig(**SHARED | {"output_dir": str(folder)} | options)
    return DPOTrainer(str(model), None, args, PAIRS, PAIRS[:3], peft_config=peft_config)


def reward(model, folder, *, peft_config=None, **options):
    args = RewardConfig(**SHARED | {"output_dir": str(folder)} | options)
    return RewardTrainer(str(model), args, PAIRS, PAIRS[:3], peft_config=peft_config)


def grpo(model, folder, *, peft_config=None, **options):
    args = GRPOConfig(**SHARED | ONLINE | {"output_dir": str(folder), "num_generations": 4} | options)
    return GRPOTrainer(str(model), prefers_even, args, PROMPTS, PROMPTS[:3], peft_config=peft_config)


def ppo(model, folder, *, peft_config=None, **options):
    args = PPOConfig(**SHARED | ONLINE | {"output_dir": str(folder)} | options)
    return PPOTrainer(str(model), prefers_even, args, PROMPTS, PROMPTS[:3], peft_config=peft_config)


EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
CASES = {
    "sft": (sft, {}),
    "sft: packing, accumulation, evaluation, the best": (
        sft,
        EVALUATING
        | {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        | {"load_best_model_at_end": True, "save_total_limit": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ),
    "sft: early stopping": (
        sft,
        EVALUATING | {"early_stopping_patience": 3, "early_stopping_threshold": 9.0, "save_steps": 1},
    ),
    "sft: LoRA with dropout": (sft, {"peft_config": lora()}),
    "sft: DoRA and a whole embedding": (sft, {"peft_config": lora(use_dora=True, modules_to_save=["embed_tokens"])}),
    "sft: PiSSA": (sft, {"peft_config": lora(init_lora_weights="pissa")}),
    "dpo": (dpo, EVALUATING),
    "dpo: a reference that follows": (dpo, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "dpo: LoRA": (dpo, {"peft_config": lora()}),
    "reward": (reward, {"peft_config": lora()}),
    "grpo": (grpo, EVALUATING),
    "grpo: a reference, two passes": (grpo, {"beta": 0.1, "num_iterations": 2, "max_steps": 8, "save_steps": 4}),
    "grpo: dynamic sampling, LoRA": (grpo, {"dynamic_sampling": True, "peft_config": lora()}),
    "ppo: a steered KL": (
        ppo,
        {"kl_target": 0.1, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 12, "save_steps": 4},
    ),
    "ppo: LoRA on policy and critic": (ppo, {"peft_config": lora(), "max_steps": 8, "num_ppo_epochs": 1}),
    "ppo: a head, the policy later": (ppo, {"critic": {"kind": "head", "warmup_rollouts": 2}, "num_ppo_epochs": 1}),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the forked child, so that sums are taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class KillAfter(TrainerCallback):
    """SIGKILL, once update `step` is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step >= self.step and "loss" in kwargs["logs"]:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(make, step):
    trainer = make()
    trainer.callbacks.append(KillAfter(step))
    trainer.train()


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_is_the_same_to_the_bit(tiny_model_path, tmp_path, name):
    kind, options = CASES[name]
    straight = kind(tiny_model_path, tmp_path / "straight", **options)
    straight.train()
    step = max(3, straight.args.save_steps + 1)
    killed = tmp_path / "killed"
    assert run_forked(lambda: train_and_die(lambda: kind(tiny_model_path, killed, **options), step)) == -signal.SIGKILL
    assert max(line["step"] for line in read_metrics(killed)) >= step
    torch.manual_seed(99)  # nothing may hang on where the process was
    kind(tiny_model_path, killed, **options, resume_from_checkpoint=True).train()
    comparison = compare_runs(tmp_path / "straight", killed)
    assert comparison.is_exact, str(comparison)
    assert comparison.num_weights > 10_000
    assert comparison.num_metrics > 20
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["resumed"][0]["step"] <= step
    assert summary["initial_eval"] == pytest.approx(
        json.loads((tmp_path / "straight" / "summary.json").read_text())["initial_eval"], abs=60
    )
