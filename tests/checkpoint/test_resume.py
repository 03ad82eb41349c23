"""Test that a run that is killed and resumed equals an uninterrupted run bit for bit."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
from rlqwen.cli import main
from rlqwen.config import Recipe
from rlqwen.errors import ConfigError, Preempted
from rlqwen.reporting import read_metrics
from rlqwen.runs.verification import Comparison, Difference, compare_runs
from rlqwen.trainers.base import Trainer
from rlqwen.trainers.preference_trees import PreferenceExample
from tests.forked import run_forked
from tests.forked_ranks import run_ranks

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


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.1, **options)


def sft(model: Path, folder: Path, *, peft_config: Any | None = None, train: Any = CHATS, **options: Any) -> SFTTrainer:
    args = SFTConfig(**SHARED | {"output_dir": str(folder)} | options)
    return SFTTrainer(str(model), args, train, CHATS[:4], peft_config=peft_config)


def dpo(model: Path, folder: Path, *, peft_config: Any | None = None, **options: Any) -> DPOTrainer:
    args = DPOConfig(**SHARED | {"output_dir": str(folder)} | options)
    return DPOTrainer(str(model), None, args, PAIRS, PAIRS[:3], peft_config=peft_config)


def reward(model: Path, folder: Path, *, peft_config: Any | None = None, **options: Any) -> RewardTrainer:
    args = RewardConfig(**SHARED | {"output_dir": str(folder)} | options)
    return RewardTrainer(str(model), args, PAIRS, PAIRS[:3], peft_config=peft_config)


def grpo(model: Path, folder: Path, *, peft_config: Any | None = None, **options: Any) -> GRPOTrainer:
    args = GRPOConfig(**SHARED | ONLINE | {"output_dir": str(folder), "num_generations": 4} | options)
    return GRPOTrainer(str(model), prefers_even, args, PROMPTS, PROMPTS[:3], peft_config=peft_config)


def ppo(model: Path, folder: Path, *, peft_config: Any | None = None, **options: Any) -> PPOTrainer:
    args = PPOConfig(**SHARED | ONLINE | {"output_dir": str(folder)} | options)
    return PPOTrainer(str(model), prefers_even, args, PROMPTS, PROMPTS[:3], peft_config=peft_config)


EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
CASES: dict[str, tuple[Callable[..., Trainer[Any, Any, Any]], dict[str, Any]]] = {
    "sft": (sft, {}),
    "sft: packing, accumulation, evaluation, best checkpoint": (
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
    "sft: DoRA and a full embedding": (sft, {"peft_config": lora(use_dora=True, modules_to_save=["embed_tokens"])}),
    "sft: PiSSA": (sft, {"peft_config": lora(init_lora_weights="pissa")}),
    "dpo": (dpo, EVALUATING),
    "dpo: a synchronized reference": (dpo, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "dpo: LoRA": (dpo, {"peft_config": lora()}),
    "reward": (reward, {"peft_config": lora()}),
    "grpo": (grpo, EVALUATING),
    "grpo: a reference, two iterations": (grpo, {"beta": 0.1, "num_iterations": 2, "max_steps": 8, "save_steps": 4}),
    "grpo: dynamic sampling, LoRA": (grpo, {"dynamic_sampling": True, "peft_config": lora()}),
    "ppo: an adaptive KL coefficient": (
        ppo,
        {"kl_target": 0.1, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 12, "save_steps": 4},
    ),
    "ppo: LoRA on policy and critic": (ppo, {"peft_config": lora(), "max_steps": 8, "num_ppo_epochs": 1}),
    "ppo: a value head, critic warm-up": (ppo, {"critic": {"kind": "head", "warmup_rollouts": 2}, "num_ppo_epochs": 1}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[Any]:
    """Use one thread, as in the forked child, so that sums are computed in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class KillAfter(TrainerCallback):
    """Kill this process by SIGKILL once update `step` is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.step and "loss" in kwargs["logs"]:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(make: Any, step: int) -> None:
    trainer = make()
    trainer.callbacks.append(KillAfter(step))
    trainer.train()


@pytest.mark.parametrize("name", CASES)
def test_a_killed_and_resumed_run_is_bitwise_equal(tiny_model_path: Path, tmp_path: Path, name: str) -> None:
    kind, options = CASES[name]
    straight = kind(tiny_model_path, tmp_path / "straight", **options)
    straight.train()
    step = max(3, straight.args.save_steps + 1)
    killed = tmp_path / "killed"
    assert run_forked(lambda: train_and_die(lambda: kind(tiny_model_path, killed, **options), step)) == -signal.SIGKILL
    assert max(line["step"] for line in read_metrics(killed)) >= step
    torch.manual_seed(99)  # the result must not depend on the RNG state of this process
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


class SignalAtTheEnd(TrainerCallback):
    """Send SIGTERM to rank 1 alone, after the last update."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def test_two_ranks_agree_on_a_signal_that_comes_after_the_last_update(tiny_model_path: Path, tmp_path: Path) -> None:
    def train() -> tuple[str, bool]:
        trainer = sft(tiny_model_path, tmp_path, per_device_train_batch_size=2, max_steps=1)
        trainer.callbacks.append(SignalAtTheEnd())
        with pytest.raises(Preempted) as caught:
            trainer.train()
        return str(caught.value), (tmp_path / "summary.json").is_file()

    ended = "it came after the last update; the run is finished"
    assert run_ranks(train) == [(f"stopped: {ended}", True), (f"SIGTERM: {ended}", True)]


def test_a_checkpoint_of_two_ranks_resumes_on_two_and_on_one(tiny_model_path: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "peft_config": lora()}

    def train(folder: Path, **more: Any) -> None:
        sft(tiny_model_path, folder, **options, **more).train()

    run_ranks(lambda: train(tmp_path / "straight"))
    run_ranks(lambda: train(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    assert (checkpoint / "rng-0.json").is_file()
    assert (checkpoint / "rng-1.json").is_file()
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    run_ranks(lambda: train(tmp_path / "run", resume_from_checkpoint=str(checkpoint)))
    comparison = compare_runs(tmp_path / "straight", tmp_path / "run")
    assert comparison.is_exact, str(comparison)
    with pytest.raises(ConfigError, match="world_size: was 2, is 1"):
        train(tmp_path / "alone", resume_from_checkpoint=True)
    alone = sft(tiny_model_path, tmp_path / "alone", **options, resume_allow_changes=True)
    alone.train(resume_from_checkpoint=tmp_path / "alone" / "checkpoints" / "step-000004")
    assert alone.state.global_step == 6


# The command line


def cli_recipes(folder: Path, model: Path) -> list[str]:
    """Write the recipes of two stages, the second of which starts from the first's model; return their paths."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    first = {
        "algorithm": "sft", "model": {"path": str(model)}, "data": {"train": {"path": str(folder / "rows.jsonl")}},
        "train": SHARED, "output_dir": str(folder / "sft"),
    }  # fmt: skip
    second = {
        "algorithm": "dpo", "model": {"path": str(folder / "sft" / "final")},
        "data": {"train": {"path": str(folder / "pairs.jsonl")}}, "train": SHARED, "output_dir": str(folder / "dpo"),
    }  # fmt: skip
    for name, values in (("first.yaml", first), ("second.yaml", second)):
        (folder / name).write_text(yaml.safe_dump(values))
    return [str(folder / "first.yaml"), str(folder / "second.yaml")]


def run_cli(*words: str, kill_at: int | None = None, number: int = signal.SIGKILL) -> int:
    """Run `rlqwen` with these words in a child process, and send it signal `number` after `kill_at` updates of DPO."""

    def child() -> int:
        if kill_at is not None:
            step = DPOTrainer.step

            def step_and_kill(self: DPOTrainer, rows: list[PreferenceExample]) -> dict[str, float]:
                if self.state.global_step == kill_at:
                    os.kill(os.getpid(), number)
                return step(self, rows)

            pytest.MonkeyPatch().setattr(DPOTrainer, "step", step_and_kill)
        os._exit(main(list(words)))

    return run_forked(child)


def test_a_pipeline_resumes_where_it_was_interrupted(
    tiny_model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = cli_recipes(tmp_path / "straight", tiny_model_path)
    words = cli_recipes(tmp_path / "killed", tiny_model_path)
    assert run_cli("run", *words, "--resume") == 2
    assert "there is no checkpoint to go on from" in capfd.readouterr().err
    assert run_cli("run", *straight) == 0
    assert run_cli("run", *words, kill_at=3) == -signal.SIGKILL
    finished = (tmp_path / "killed" / "sft" / "summary.json").stat().st_mtime_ns
    assert run_cli("run", *words) == 2
    assert run_cli("run", *words, "--resume", "dpo.train.learning_rate=1e-3") == 2
    assert "train.learning_rate: was 0.003, is 0.001" in capfd.readouterr().err
    assert run_cli("run", *words, "--resume", kill_at=4, number=signal.SIGTERM) == 75
    assert "SIGTERM: saved after update 5" in capfd.readouterr().err
    assert run_cli("run", *words, "--resume") == 0
    assert (tmp_path / "killed" / "sft" / "summary.json").stat().st_mtime_ns == finished
    assert not (tmp_path / "killed" / "dpo" / "error.log").exists()
    for stage in ("sft", "dpo"):
        comparison = compare_runs(tmp_path / "straight" / stage, tmp_path / "killed" / stage)
        assert comparison.is_exact, str(comparison)
    resumed = json.loads((tmp_path / "killed" / "dpo" / "summary.json").read_text())["resumed"]
    assert [one["step"] for one in resumed] == [2, 5]
    assert run_cli("run", *words, "--resume") == 0
    assert "finished already" in capfd.readouterr().out


def test_compare_runs_lists_differences(tiny_model_path: Path, tmp_path: Path) -> None:
    sft(tiny_model_path, tmp_path / "one").train()
    sft(tiny_model_path, tmp_path / "other", learning_rate=2.9e-3).train()
    comparison = compare_runs(tmp_path / "one", tmp_path / "other")
    assert not comparison.is_exact
    text = str(comparison)
    assert "it begins with update 1: " in text
    assert "the largest of a weight: weight model." in text
    shutil.rmtree(tmp_path / "other" / "final")
    assert "final/model.safetensors is in one run only" in str(compare_runs(tmp_path / "one", tmp_path / "other"))


@pytest.mark.parametrize(("size", "code", "verdict"), [(None, 0, "exact: "), (0.5, 1, "not exact: 1 differences")])
def test_verify_resume_prints_the_verdict_and_sets_the_exit_code(
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: float | None,
    code: int,
    verdict: str,
) -> None:
    def verify(recipe: Recipe, *, steps: int, announce: Callable[[str], None]) -> Comparison:
        assert (recipe.algorithm, steps) == ("sft", 6)
        found = [] if size is None else [Difference("loss (1.0 and 1.5)", 3, size)]
        return Comparison(found, num_metrics=10, num_weights=1000)

    monkeypatch.setattr("rlqwen.runs.verification.verify_resume", verify)
    first, second = cli_recipes(tmp_path, tiny_model_path)
    assert main(["verify-resume", first, "--steps", "6"]) == code
    printed = capsys.readouterr().out
    assert verdict in printed
    assert size is None or "it begins with update 3: loss (1.0 and 1.5) differs by 0.5" in printed
    assert main(["verify-resume", first, second]) == 2
