"""Trainers that tests run on one rank, in their own process, and on two, by torchrun; what each leaves is compared.

torchrun --nproc-per-node 2 -m tests.ranked MODEL FOLDER CASE [CASE ...]
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlqwen import DPOTrainer, RewardTrainer, SFTTrainer
from rlqwen.distributed import UpdateResult
from rlqwen.packing.batch import PackedBatch

DEADLINE_S = int(os.environ.get("RANKED_DEADLINE_S", "300"))
NUM_RANKS = 2

SUMS = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}], "solution": str(i + 1)} for i in range(12)]
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"{i}{'x' * (i % 5)}"}],
        "chosen": [{"role": "assistant", "content": f"{i}b" * (1 + i % 2)}],
        "rejected": [{"role": "assistant", "content": f"{i}a" * (1 + i % 3)}],
        "margin": 0.1 * (i % 3),
    }
    for i in range(15)
]
LABELLED = [
    {"prompt": f"say {i}{'!' * (i % 7)}:", "completion": " yes" if i % 3 else " no, no", "label": bool(i % 3)}
    for i in range(15)
]


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def by_prompt(prompts: list[list[dict[str, str]]], completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    """Groups of one prompt in three carry a signal."""
    signal = [int(prompt[0]["content"].split()[0]) % 3 == 0 for prompt in prompts]
    return [s * float(sum(ids) % 3) for s, ids in zip(signal, completion_ids, strict=True)]


def first_only(prompts: list[list[dict[str, str]]], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """At most one group of a rollout carries a signal, and often none."""
    return [
        float(sum(ids) % 2) if prompt[0]["content"].startswith("7 ") else 0.0
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def kills_the_main_rank(completion_ids: list[list[int]], **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_workers(model: str, folder: Path) -> Any:
    """Those of the rollouts, before the second step."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if trainer.rollouts.sampler is not None and state.global_step == 1:
                for process in trainer.rollouts.sampler.engine.process_ids():
                    os.kill(process, signal.SIGKILL)

    trainer = _vllm(model, folder, max_restarts=0)
    trainer.callbacks.append(Kill())
    return trainer


def _vllm(model: str, folder: Path, **rollout: Any) -> Any:
    rollout = {"engine": "vllm", "num_workers": 1, "max_num_seqs": 16, **rollout}
    return _online("GRPO", model, folder, max_steps=3, rollout=rollout, eval_strategy="no", eval_on_start=False)


def kill_the_other_rank(model: str, folder: Path) -> Any:
    """In its second step, while the main rank samples for it."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if os.environ["RANK"] == "1" and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = _online("GRPO", model, folder, max_steps=3)
    trainer.callbacks.append(Kill())
    return trainer


def blown_up(model: str, folder: Path) -> Any:
    """Weights that are far off after five updates, on both ranks, once; a symptom that asks to go back."""
    from transformers import TrainerCallback

    class BlowUp(TrainerCallback):
        num_left = 1

        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step == 5 and self.num_left:
                self.num_left = 0
                trainer.policy.base_model.model.norm.weight.data.mul_(1000.0)

    symptom = {"action": "rollback", "min_steps": 2, "window": 5, "threshold": 5}
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = _sft(model, folder, max_steps=7, learning_rate=1e-5, watch={"grad_norm": symptom}, **saving)
    trainer.callbacks.append(BlowUp())
    return trainer


def fails(completion_ids: list[list[int]], **kwargs: Any) -> None:
    raise ValueError("this reward fails")


def _dpo(
    model: str, folder: Path, rows: Sequence[dict[str, Any]] = PAIRS, peft: bool = False, **options: Any
) -> DPOTrainer:
    from peft import LoraConfig

    from rlqwen import DPOConfig, DPOTrainer

    size = options.pop("size", 6) // launched()
    defaults = {**COMMON, "output_dir": str(folder), "per_device_train_batch_size": size, "max_steps": 3}
    train, held_out = [
        [{key: value for key, value in row.items() if key != "margin"} for row in part]
        for part in (rows[:12], rows[8:])
    ]
    return DPOTrainer(
        model,
        args=DPOConfig(**defaults | options),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None,
    )


def _sft(model: str, folder: Path, **options: Any) -> SFTTrainer:
    from rlqwen import SFTConfig, SFTTrainer

    size = options.pop("size", 6) // launched()
    defaults = {"max_steps": 3, **COMMON, "output_dir": str(folder), "per_device_train_batch_size": size}
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    peft_config = options.pop("peft_config", None)
    return SFTTrainer(model, SFTConfig(**defaults | options), rows[:12], rows[8:], peft_config=peft_config)


def _lora() -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")


def _reward(model: str, folder: Path, **options: Any) -> RewardTrainer:
    from rlqwen import RewardConfig, RewardTrainer

    defaults = {**COMMON, "output_dir": str(folder), "per_device_train_batch_size": 6 // launched(), "max_steps": 3}
    return RewardTrainer(model, RewardConfig(**defaults | options), PAIRS[:12], PAIRS[8:])


def _online(algorithm: str, model: str, folder: Path, reward: Callable[..., Any] = prefers_even, **options: Any) -> Any:
    import rlqwen

    size = options.pop("size", 8) // launched()
    defaults = {
        **COMMON, "output_dir": str(folder), "per_device_train_batch_size": size, "max_completion_length": 6,
        "rollout": {"engine": "transformers"}, "scoring": {"in_process": [reward.__name__]}, "temperature": 1.0,
        "num_generations": 4, "vllm_importance_sampling_mode": "token_truncate",
    }  # fmt: skip
    trainer, config = getattr(rlqwen, f"{algorithm}Trainer"), getattr(rlqwen, f"{algorithm}Config")
    return trainer(model, reward, config(**defaults | options), SUMS, SUMS[:3])


COMMON = {
    "learning_rate": 0.1, "adam_epsilon": 1.0, "optim": "adamw_torch", "save_strategy": "no", "max_grad_norm": 0.5,
    "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "per_device_eval_batch_size": 3,
}  # fmt: skip
"""An epsilon of 1 makes an update as large as its gradient, and not the sign of what rounding left of 0."""


def _arriving(model: str, folder: Path, **options: Any) -> Any:
    """Groups are read one by one, although the engine of this process samples them all before the first is read."""
    trainer = _online("GRPO", model, folder, num_generations=2, max_tokens_per_micro_batch=60, **options)
    trainer.trains_on_arrival = True
    return trainer


CASES: dict[str, Callable[..., Any]] = {
    "sft": lambda model, folder: _sft(model, folder, eval_generation={"metrics": ["exact_match"], "max_tokens": 4}),
    "sft_plain": lambda model, folder: _sft(model, folder),
    "sft_on": lambda model, folder: _sft(
        model, folder, max_steps=2, resume_allow_changes=True,
        resume_from_checkpoint=str(folder.parent / "sft@saved1" / "checkpoints" / "step-000002"),
    ),
    "sft_tokens": lambda model, folder: _sft(model, folder, max_tokens_per_micro_batch=60),
    "sft_packed": lambda model, folder: _sft(model, folder, packing=True, max_length=60, size=2),
    "dpo": lambda model, folder: _dpo(model, folder),
    "dpo_tokens": lambda model, folder: _dpo(model, folder, max_tokens_per_micro_batch=60, use_weighting=True),
    "dpo_ranking": lambda model, folder: _dpo(model, folder, loss_type=["aot", "sft"]),
    "dpo_precomputed": lambda model, folder: _dpo(model, folder, precompute_ref_log_probs=True, ld_alpha=0.5),
    "dpo_lora": lambda model, folder: _dpo(model, folder, peft=True, learning_rate=1.0),
    "kto": lambda model, folder: _dpo(model, folder, LABELLED, loss_type="kto", max_tokens_per_micro_batch=60),
    "reward": lambda model, folder: _reward(model, folder, center_rewards_coefficient=0.1),
    "ppo": lambda model, folder: _online(
        "PPO", model, folder, num_generations=1, num_mini_batches=2, num_ppo_epochs=2, max_steps=8, kl_target=1.0,
        whiten_rewards=True, entropy_coef=0.01,
    ),
    "ppo_head": lambda model, folder: _online(
        "PPO", model, folder, critic={"kind": "head", "warmup_rollouts": 1}, num_ppo_epochs=1, max_steps=3,
        max_tokens_per_micro_batch=60,
    ),
    "grpo": lambda model, folder, **options: _online(
        "GRPO", model, folder, beta=0.1, generation_batch_size=16, num_iterations=2, max_steps=8, **options,
    ),
    "grpo_best": lambda model, folder: _online(
        "GRPO", model, folder, max_steps=12, eval_steps=1, load_best_model_at_end=True, early_stopping_patience=1,
        greater_is_better=False, save_steps=4, save_strategy="steps", sync_ref_model=True, ref_model_sync_steps=2, beta=0.1,
    ),
    "grpo_dynamic": lambda model, folder: _online(
        "GRPO", model, folder, by_prompt, dynamic_sampling=True, max_steps=3, max_tokens_per_micro_batch=60,
    ),
    "grpo_arrival": lambda model, folder: _arriving(
        model, folder, beta=0.1, generation_batch_size=16, num_iterations=2, max_steps=8,
    ),
    "grpo_idle": lambda model, folder: _online(
        "GRPO", model, folder, first_only, size=4, num_generations=2, max_steps=6, loss_type="grpo",
    ),
    "stopped": lambda model, folder: _sft(
        model, folder, learning_rate=0.0, watch={"idle": {"steps": 2, "action": "stop"}},
    ),
    "blown_up": blown_up,
    "vllm": _vllm,
    "kill_the_workers": kill_the_workers,
    "kills_the_main_rank": lambda model, folder: _online("GRPO", model, folder, kills_the_main_rank, max_steps=1),
    "kill_the_other_rank": kill_the_other_rank,
    "sft_lora": lambda model, folder: _sft(model, folder, peft_config=_lora()),
    "fails": lambda model, folder: _online("GRPO", model, folder, fails, max_steps=1),
}  # fmt: skip


SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Else ranks would keep weights as small as these whole."""
WAYS: dict[str, dict[str, Any]] = {
    "fsdp2": {"parallel": {"engine": "fsdp2"}},
    "fsdp2_bf16": {"parallel": {"engine": "fsdp2"}, "bf16": True},
    "fsdp2_fp16": {"parallel": {"engine": "fsdp2"}, "fp16": True},
    "fsdp2_recomputed": {"parallel": {"engine": "fsdp2"}, "gradient_checkpointing": True},
    "fsdp2_saved": {"parallel": {"engine": "fsdp2"}, "save_strategy": "steps", "save_steps": 2},
    "zero1": {"parallel": {"zero_stage": 1}},
    "zero2": {"parallel": {"zero_stage": 2}},
    "zero3": {"parallel": {"zero_stage": 3, "deepspeed": SHARD_ALL}},
    "offload3": {"parallel": {"zero_stage": 3, "deepspeed": SHARD_ALL, "offload_optimizer": True, "offload_parameters": True}},
    "bf16_3": {"parallel": {"zero_stage": 3, "deepspeed": SHARD_ALL}, "bf16": True},
    "bf16_2": {"parallel": {"zero_stage": 2}, "bf16": True},
    "saved1": {"parallel": {"zero_stage": 1}, "save_strategy": "steps", "save_steps": 2},
    "saved2": {"parallel": {"zero_stage": 2}, "save_strategy": "steps", "save_steps": 2},
    "saved3": {"parallel": {"zero_stage": 3, "deepspeed": SHARD_ALL}, "save_strategy": "steps", "save_steps": 2},
    "given": {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1,
            "fp16": {"enabled": True, "initial_scale_power": 12},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        },
    },
    "auto": {
        "deepspeed": {
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True},
        },
    },
}  # fmt: skip
"""Ways to carry a case out: `case@way` is `case` with these arguments."""
OFFLOAD = {"device": "cpu"}
STAGES = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2_offload": {"stage": 2, "offload_optimizer": OFFLOAD},
    "stage3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "stage3_offload": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD,
    },
}  # fmt: skip
OVERFLOW_UPDATES = 6
for _name, _stage in STAGES.items():
    for _way, _power in (("overflow", 20), ("overflows", 40)):
        WAYS[f"{_way}_{_name}"] = {
            "deepspeed": {"fp16": {"enabled": True, "initial_scale_power": _power}, "zero_optimization": _stage},
            "max_steps": OVERFLOW_UPDATES if _way == "overflow" else 2, "eval_strategy": "no", "eval_on_start": False,
        }  # fmt: skip
"""Some updates overflow, the first among them, or all do; the scale of the loss begins at 2 to that power."""


def answer_fp16(patch: "pytest.MonkeyPatch", capable: bool) -> None:
    """Answer DeepSpeed's question whether this machine computes in float16, which PyTorch does on any, if slowly."""
    from deepspeed.accelerator import get_accelerator

    patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: capable)


def launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_case(name: str, model: str, folder: Path) -> dict[str, Any]:
    """What a case leaves on this rank: its history, and digests and sums of its weights; or its error."""
    from rlqwen.errors import RlqwenError
    from rlqwen.models.reference_cache import digest_weights
    from rlqwen.rollout.prefetch import Prefetcher

    started = time.monotonic()
    print(name, file=sys.stderr, flush=True)
    try:
        case, _, way = name.partition("@")
        way, _, emulated = way.partition("+")
        with pytest.MonkeyPatch.context() as patch:
            if way:
                answer_fp16(patch, not emulated)
            for key, value in WAYS.get(way, {}).items():
                patch.setitem(COMMON, key, value)
            if case == "grpo_arrival":
                patch.setattr(Prefetcher, "open", lambda self, batch: batch.sample(self._engine))
            trainer = CASES[case](model, folder / name)
            memories = follow_memory(trainer) if way.startswith("overflow") else []
            trainer.train()
    except RlqwenError as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - started}
    state = load_file(folder / name / "final" / "model.safetensors")  # the model's own may lie in shards
    return {
        "history": trainer.state.log_history,
        "digest": digest_weights(state),
        "position": trainer.stream.position,
        "memories": memories,
    }


def follow_memory(trainer: Any) -> list[list[Any]]:
    """Before each update: the scale of the loss, and a digest of this rank's weights and optimizer state."""
    from rlqwen.models.reference_cache import digest_weights

    memories: list[list[Any]] = []
    update: Callable[..., UpdateResult] = trainer.update

    def followed(micro_batches: Sequence[PackedBatch], **options: Any) -> UpdateResult:
        weights = {
            name: getattr(weight, "ds_tensor", weight) for name, weight in trainer.policy.model.named_parameters()
        }
        remembered = dict(trainer.optimizer._state())
        memories.append([trainer.optimizer.scale.value, digest_weights(weights), digest_weights(remembered)])
        return update(micro_batches, **options)

    trainer.update = followed
    return memories


def launch(names: list[str], model: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run cases on two ranks."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}",
        "-m", "tests.ranked", str(model), str(folder), *names,
    ]  # fmt: skip
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def run_on_two_ranks(names: list[str], model: Path, folder: Path) -> list[dict[str, Any]]:
    """By rank: what each case left, by name."""
    done = launch(names, model, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def main() -> None:
    import torch

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(DEADLINE_S - 10, exit=True)  # a rank that waits for ever says where
    model, folder, *names = sys.argv[1:]
    results = {}
    for name in names:
        results[name] = run_case(name, model, Path(folder))
        Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
