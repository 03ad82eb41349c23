"""Test every trainer on every class of Qwen3.5 and Qwen3-Next: exactly the trained weights change."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlqwen
from rlqwen.errors import ModelError
from rlqwen.models.loading import load_model
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.packing.batch import Branch, Tree, pack
from rlqwen.packing.sequence_parallel import SequenceGroup
from tests.forked_ranks import run_ranks

KINDS = ["qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"]
CLASSES = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "linear_head_dim": 32,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "max_length": 256, "initializer_range": 0.1,
}  # fmt: skip
ANSWERS = [
    {
        "prompt": [{"role": "user", "content": f"{i} + 1 = ?"}],
        "completion": [{"role": "assistant", "content": f"{i + 1}" * (1 + i % 3)}],
    }
    for i in range(8)
]
PAIRS = [
    {
        "prompt": row["prompt"],
        "chosen": row["completion"],
        "rejected": [{"role": "assistant", "content": f"{i}{'no' * (i % 2)}"}],
    }
    for i, row in enumerate(ANSWERS)
]
PROMPTS = [{"prompt": row["prompt"]} for row in ANSWERS]
SHARED = {
    "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no",
    "gradient_checkpointing": True,
}  # fmt: skip
SAMPLED = {"max_completion_length": 4, "rollout": {"engine": "transformers"}, "scoring": {"in_process": ["even_share"]}}
OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {"eval_generation": {"metrics": ["exact_match"], "max_tokens": 3}},
    "DPO": {},
    "Reward": {},
    "PPO": SAMPLED | {"num_ppo_epochs": 1, "max_steps": 2},
    "GRPO": SAMPLED | {"num_generations": 4, "beta": 0.1},
}
DELTA_NET = {"qwen3_next": {"in_proj_qkvz", "in_proj_ba", "out_proj"}}
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")


def even_share(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a tiny model of each class."""
    root = tmp_path_factory.mktemp("tiny")
    experts: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    return {
        kind: build_tiny_qwen3(
            root / kind, model_type=kind, **SHAPE,
            **(experts if "moe" in kind or "next" in kind else {"intermediate_size": 64}),
        )
        for kind in KINDS
    }  # fmt: skip


def make(
    algorithm: str,
    model: Path,
    folder: Path,
    *,
    peft_config: LoraConfig | None = None,
    reward: str | Callable[..., Any] = even_share,
    **options: Any,
) -> Any:
    config = getattr(rlqwen, f"{algorithm}Config")
    trainer = getattr(rlqwen, f"{algorithm}Trainer")
    args = config(**SHARED | OPTIONS[algorithm] | {"output_dir": str(folder)} | options)
    rows = {"SFT": ANSWERS, "DPO": PAIRS, "Reward": PAIRS}.get(algorithm, PROMPTS)
    given: dict[str, Any] = {"train_dataset": rows, "eval_dataset": rows[:2], "peft_config": peft_config}
    if algorithm in ("PPO", "GRPO"):
        given["reward_funcs"] = reward
    return trainer(model=str(model), args=args, **given)


def final_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def check_moved(trainer: Any, before: dict[Any, Any]) -> None:
    for name, weight in trainer.policy.model.named_parameters():
        assert weight.requires_grad is not weight.equal(before[name].to(weight.dtype)), name


def check_final(folder: Path, source: Path, kind: str, algorithm: str) -> None:
    """Check that the final model has all names of the source, and that untrained weights are unchanged."""
    ours, theirs = final_weights(folder), load_file(source / "model.safetensors")
    assert ours.keys() - theirs.keys() == ({"score.weight"} if algorithm == "Reward" else set())
    assert theirs.keys() <= ours.keys()
    untrained = [name for name in theirs if name.startswith(("mtp.", "model.visual."))]
    assert bool(untrained) is (not kind.endswith("_text"))
    assert all(ours[name].equal(theirs[name]) for name in untrained)
    config = json.loads((folder / "final" / "config.json").read_text())
    assert algorithm == "Reward" or config["architectures"] == [CLASSES[kind]]


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        (algorithm, kind)
        for algorithm in OPTIONS
        for kind in KINDS
        if not kind.endswith("text")
        or algorithm in ("SFT", "PPO")  # these two cover how text-only folders are loaded and saved
    ],
)
def test_every_trainer_trains_every_class(algorithm: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = (
        {"critic": {"kind": "head"}} if algorithm == "PPO" and kind.endswith(("text", "next")) else {}
    )
    trainer = make(algorithm, folders[kind], tmp_path, **options)
    before = {name: weight.detach().clone() for name, weight in trainer.policy.model.named_parameters()}
    trainer.train()
    check_moved(trainer, before)
    check_final(tmp_path, folders[kind], kind, algorithm)
    if algorithm == "PPO" and not options:
        critic = dict(trainer.critic.model.named_parameters())
        assert [name for name, weight in critic.items() if name in before and weight.equal(before[name])] == []


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        ("SFT", "qwen3_5"),
        ("DPO", "qwen3_next"),
        ("Reward", "qwen3_5_moe"),
        ("PPO", "qwen3_5"),
        ("GRPO", "qwen3_5_moe"),
    ],
)
def test_adapters_train_on_all_projections(algorithm: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = make(algorithm, folders[kind], tmp_path, peft_config=LORA)
    before = {name: weight.detach().clone() for name, weight in trainer.policy.model.named_parameters()}
    delta_net = {
        name.split(".lora_")[0].rpartition(".")[2] for name in before if "linear_attn" in name and "lora" in name
    }
    assert delta_net == DELTA_NET.get(kind, {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"})
    trainer.train()
    check_moved(trainer, before)
    check_final(tmp_path, folders[kind], kind, algorithm)
    if algorithm != "Reward":
        batch = pack([Tree([5, 6, 7], [Branch([8, 9]), Branch([30, 31, 32])])])
        with trainer.policy.inference():
            ours, _ = trainer.policy.logprobs(batch.to(trainer.policy.device))
        assert logprobs_alone(tmp_path / "final", [[5, 6, 7, 8, 9], [5, 6, 7, 30, 31, 32]], 3) == pytest.approx(
            ours.tolist(), abs=1e-5
        )


def logprobs_alone(folder: Path, sequences: list[list[Any]], start: int) -> list[Any]:
    """Return the logprobs of the tokens from `start` on, computed by transformers one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in sequences:
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [logp[place - 1, ids[place]].item() for place in range(start, len(ids))]
    return found


@pytest.mark.parametrize(("kind", "packing"), [*zip(KINDS, [True, False, False, True, True], strict=True)])
def test_the_loss_equals_that_of_transformers_and_falls(
    kind: str, packing: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}" * i} for i in range(1, 5)]
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    negative = []
    for prompt, completion in ([tokenizer.encode(row[key]) for key in ("prompt", "completion")] for row in rows):
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        negative += [-logp for logp in logprobs_alone(folders[kind], [ids], len(prompt))]
    packed = {"packing": True, "max_length": 256, "per_device_train_batch_size": 1} if packing else {}
    args = rlqwen.SFTConfig(
        **SHARED | {"output_dir": str(tmp_path), "max_steps": 8, "router_aux_loss_coef": 0.0} | packed
    )
    trainer = rlqwen.SFTTrainer(str(folders[kind]), args, rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(math.fsum(negative) / len(negative), abs=1e-5)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("algorithm", "kind", "options"),
    [
        ("SFT", "qwen3_5", {}),
        ("GRPO", "qwen3_5_moe", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        ("PPO", "qwen3_next", {"peft_config": LORA}),
    ],
)
def test_a_resumed_run_is_bit_exact(
    algorithm: str, kind: str, options: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    saving: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make(algorithm, folders[kind], tmp_path / "straight", **saving, **options)
    straight.train()
    resumed = make(algorithm, folders[kind], tmp_path / "resumed", **saving, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "straight" / "checkpoints" / "step-000002")
    ours, theirs = final_weights(tmp_path / "resumed"), final_weights(tmp_path / "straight")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    expected = {line["step"]: line["loss"] for line in straight.state.log_history if "loss" in line}
    found = {line["step"]: line["loss"] for line in resumed.state.log_history if "loss" in line}
    assert found == {step: expected[step] for step in found}
    assert len(found) >= 2


def test_a_qwen3_5_reward_model_scores_completions(folders: dict[str, Path], tmp_path: Path) -> None:
    make("Reward", folders["qwen3_5_moe"], tmp_path / "reward").train()
    trainer = make("GRPO", folders["qwen3_5"], tmp_path / "grpo", reward=str(tmp_path / "reward" / "final"), scoring={})
    trainer.train()
    assert any(line.get("reward/std") for line in trainer.state.log_history)


def test_sequence_parallelism_is_refused(folders: dict[str, Path]) -> None:
    """Refuse to split rows, because a recurrent state passes through the whole row."""
    args, ranks = rlqwen.SFTConfig(), SequenceGroup()
    ranks.size = 2
    with pytest.raises(ModelError, match=r"sequence_parallel_size=2: qwen3_5_text has layers that carry a state"):
        Policy(load_model(str(folders["qwen3_5"]), args), args, sequence=ranks)


ALL_SHARDED = {"zero_stage": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
RANKED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "weights in shards": ("SFT", "qwen3_5_moe", {"parallel": ALL_SHARDED, "router_aux_loss_coef": 0.0}),
    "gradients in shards": ("DPO", "qwen3_next", {"parallel": {"zero_stage": 2}, "peft_config": LORA}),
    "layers in shards": ("SFT", "qwen3_5", {"parallel": {"autotp_size": 2}, "eval_generation": None}),
}


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_train_like_one(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Set Adam's epsilon to 1: updates are then proportional to gradients, so rounding of zero gradients stays small."""
    algorithm, kind, options = RANKED[name]
    exact: dict[str, Any] = {"adam_epsilon": 1.0, "learning_rate": 0.1, "optim": "adamw_torch"}
    rows = 4 if "autotp_size" in options["parallel"] else 2

    def train() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing DeepSpeed causes many
            make(
                algorithm, folders[kind], tmp_path / "two", per_device_train_batch_size=rows, **exact, **options
            ).train()

    run_ranks(train)
    make(algorithm, folders[kind], tmp_path / "one", **exact, **options | {"parallel": {}}).train()
    ours, theirs = final_weights(tmp_path / "two"), final_weights(tmp_path / "one")
    before = load_file(folders[kind] / "model.safetensors")
    moved = max((theirs[name] - before[name]).abs().max() for name in before)
    assert moved > 1e-3
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-3 * moved
