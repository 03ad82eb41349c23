"""Test DeepSpeed's AutoTP on real ranks: sharded layers train like whole ones, and are exported whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlqwen import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlqwen.distributed.tensor_parallel import check_shardable, is_shard
from rlqwen.errors import ModelError
from rlqwen.models.merged_weights import checkpoint_weights
from rlqwen.models.policy import Policy
from tests.forked_ranks import run_ranks
from tests.models.test_moe_balance import TINY_MOE
from tests.models.test_policy import make_model
from tests.packing.test_sequence_parallel import PAIRS, length_reward

TINY = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2, "seed": 1}
RUNS = {
    "sft": (SFTTrainer, SFTConfig, [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]),
    "dpo": (DPOTrainer, DPOConfig, PAIRS),
    "reward": (RewardTrainer, RewardConfig, PAIRS),
}


def train(algorithm: str, folder: Path, batch_size: int, **parallel: int) -> dict[str, Any]:
    trainer_class, config_class, rows = RUNS[algorithm]
    args = config_class(
        output_dir=str(folder), max_steps=3, learning_rate=0.1, adam_epsilon=1.0, optim="adamw_torch",
        per_device_train_batch_size=batch_size, model_init_kwargs=TINY, max_grad_norm=0.5, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, parallel=parallel,
    )  # fmt: skip
    trainer = trainer_class("builtin:tiny-qwen3", args=args, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()
    keys = ("loss", "grad_norm", "tokens/trained", "eval/loss")
    return {
        "metrics": [entry[key] for entry in trainer.state.log_history for key in keys if key in entry],
        "shards": sum(map(is_shard, trainer.policy.trained_parameters)),
        "exported": dict(checkpoint_weights(trainer.policy.base_model)),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("algorithm", [*RUNS])
def test_tensor_parallel_training_equals_training_on_one_rank(algorithm: str, tmp_path: Path) -> None:
    one = train(algorithm, tmp_path / "one", 8)
    assert one["shards"] == 0
    for found in run_ranks(lambda: train(algorithm, tmp_path / "four", 4, autotp_size=2), world_size=4):
        assert found["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert found["shards"] == 2 * 7
        assert found["exported"].keys() == one["exported"].keys()
        for name, weight in one["exported"].items():
            torch.testing.assert_close(found["exported"][name], weight, atol=1e-5, rtol=1e-4)
    if algorithm != "reward":
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "four" / "final").state_dict()
        assert all(torch.equal(saved[name], found["exported"][name]) for name in saved)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("qwen3", 3, r"does not divide the model's num_attention_heads=4 \(4 / 3 is 1.33\)"),
        ("qwen3", 4, r"num_key_value_heads=2 \(2 / 4 is 0.5\)"),
        ("qwen3_moe", 2, "no plan for fused experts"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused_with_the_numbers(kind: str, size: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_shardable(make_model(kind), size)


def test_a_model_with_an_adapter_is_not_sharded() -> None:
    policy = Policy(make_model(), SFTConfig(), peft_config=LoraConfig(r=2))
    with pytest.raises(ModelError, match="leave the adapter out"):
        check_shardable(policy.model, 2)


@pytest.mark.slow_fault
@pytest.mark.fault(
    "layers of the trained model lie in shards on two ranks; rollouts by vLLM",
    "the weights are gathered whole, and vLLM's logprobs of the canary are the trainer's",
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_shards_reach_vllm_exactly(tmp_path: Path) -> None:
    metrics = run_ranks(lambda: sample_with_vllm("builtin:tiny-qwen3", TINY, tmp_path, autotp_size=2))
    check_syncs(metrics[0])


@pytest.mark.slow_fault
@pytest.mark.fault("a mixture of experts is trained; rollouts by vLLM", "every sync is exact, without a new engine")
def test_experts_reach_vllm_exactly(tmp_path: Path) -> None:
    check_syncs(run_ranks(lambda: sample_with_vllm("builtin:tiny-qwen3-moe", TINY_MOE, tmp_path), world_size=1)[0])


def sample_with_vllm(model: str, shape: dict[str, Any], folder: Path, **parallel: int) -> list[dict[str, Any]]:
    args = GRPOConfig(
        output_dir=str(folder), max_steps=2, save_strategy="no", learning_rate=1e-2, parallel=parallel,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=8, model_init_kwargs=shape,
        rollout={"engine": "vllm", "num_workers": 1, "num_cpus_per_worker": 0.5},
        scoring={"in_process": ["length_reward"]},
    )  # fmt: skip
    rows = [{"prompt": row["prompt"]} for row in PAIRS]
    trainer = GRPOTrainer(model, length_reward, args, rows)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_syncs(history: list[dict[str, Any]]) -> None:
    assert len(history) == 2
    for entry in history:
        assert entry["sync/canary_gap"] < 1e-4
        assert entry["sync/rebuilt_engines"] == 0
