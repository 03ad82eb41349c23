"""Test the load-balancing loss of routers on packed rows, and that every trainer adds it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

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
from rlqwen.errors import ConfigError
from rlqwen.models.moe_balance import load_balancing_loss
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, Tree, pack
from tests.models.test_lora_targets import moe
from tests.models.test_policy import make_model, skewed_trees
from tests.narrowing import instance_of

TINY_MOE = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "num_experts": 4}


def test_the_loss_is_k_for_an_even_load_and_e_for_a_collapsed_one() -> None:
    even = torch.eye(4).repeat(3, 1) * 50  # every expert is the only choice of some tokens
    loss, counts = load_balancing_loss([even], 1)
    assert loss.item() == pytest.approx(1.0)
    assert counts.tolist() == [[3.0] * 4]
    collapsed = torch.zeros(5, 4)
    collapsed[:, 2] = 50
    loss, counts = load_balancing_loss([collapsed, even[:5]], 1)
    assert load_balancing_loss([collapsed], 1)[0].item() == pytest.approx(4.0)
    assert counts.tolist() == [[0, 0, 5, 0], [2, 1, 1, 1]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_the_loss_counts_each_packed_token_once_and_equals_transformers(kind: str, checkpointing: bool) -> None:
    model = moe(kind)
    policy = Policy(model, SFTConfig(gradient_checkpointing=checkpointing, router_aux_loss_coef=0.5))
    trees = skewed_trees()
    policy.logprobs(pack(trees))
    loss = instance_of(torch.Tensor, policy.router_loss(0.25))
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("mlp.gate.weight" in name for name in ours)

    model.zero_grad()
    logits: list[list[torch.Tensor]] = []
    with policy.generation_model(), torch.enable_grad():
        for tree in trees:
            for number, branch in enumerate(branch for branch in tree.branches if branch.token_ids):
                ids = torch.tensor([tree.prefix + branch.token_ids])
                known = len(tree.prefix) if number else 0
                layers = model.model(input_ids=ids, output_router_logits=True).router_logits
                logits.append([layer[known:] for layer in layers])
    layers_N = tuple(map(torch.cat, zip(*logits, strict=True)))
    found = load_balancing_loss_func(layers_N, 4, 2)  # type: ignore[arg-type]  # it is annotated as a tuple of one
    expected = instance_of(torch.Tensor, found)
    torch.testing.assert_close(loss, 0.5 * 0.25 * expected)
    (0.125 * expected).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name


def test_forwards_without_gradients_add_no_router_loss() -> None:
    policy = Policy(make_model("qwen3_moe"), SFTConfig(), reference=True)
    assert policy.routers.coefficient == 0.001  # transformers' default
    batch = pack(skewed_trees())
    with policy.inference():
        policy.logprobs(batch)
    assert policy.router_loss(1.0) == 0
    policy.logprobs(batch)
    policy.reference_logprobs(batch)
    assert policy.router_loss(1.0) > 0
    assert policy.router_loss(1.0) == 0  # counted once per forward


def test_metrics_measure_the_balance_of_the_load() -> None:
    policy = Policy(make_model("qwen3_moe"), SFTConfig())
    policy.logprobs(pack(skewed_trees()))
    policy.router_loss(0.5)
    metrics = policy.routers.metrics(lambda value: [value, (0.0, 0.0, None)])  # the other rank had no micro-batch
    assert 2.0 <= metrics["router/aux_loss"] < 4.0
    assert 0.25 < metrics["router/max_load"] <= 0.5  # two of four experts per token
    assert policy.routers.metrics(lambda value: [value]) == {}


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_frozen_routers_get_no_loss_by_default(kind: str) -> None:
    def routers(coefficient: float | None, **lora: Any) -> Any:
        config = LoraConfig(r=2, **lora)
        args = SFTConfig(router_aux_loss_coef=coefficient)
        return Policy(moe(kind), args, peft_config=config).routers

    assert Policy(moe(kind), SFTConfig()).routers.coefficient == 0.001  # transformers' default
    assert routers(None, target_modules=["all-linear", "experts"]).coefficient == 0
    assert routers(None, target_modules=["gate"]).coefficient == 0.001

    assert routers(None, target_modules=["q_proj"]).coefficient == 0
    assert "routers are frozen" in routers(None, target_modules=["q_proj"]).note
    assert routers(0.01, target_modules=["q_proj"]).coefficient == 0.01
    trained = routers(None, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    assert trained.coefficient == 0.001
    assert trained.note is None
    saved = routers(None, target_modules=["q_proj"], modules_to_save=["mlp.gate"])
    assert saved.coefficient == 0.001


def test_a_dense_model_has_no_router_loss() -> None:
    assert Policy(make_model(), SFTConfig()).routers.coefficient == 0
    assert Policy(make_model(), SFTConfig(router_aux_loss_coef=0.0)).routers.coefficient == 0
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0.1 is for mixtures of experts"):
        Policy(make_model(), SFTConfig(router_aux_loss_coef=0.1))


def length_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


CHAT = [{"role": "user", "content": "1 + 2 = ?"}]
PAIR = {
    "prompt": CHAT,
    "chosen": [{"role": "assistant", "content": "\\boxed{3}"}],
    "rejected": [{"role": "assistant", "content": "no idea"}],
}
ONLINE = {
    "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
    "rollout": {"engine": "transformers"}, "scoring": {"in_process": ["length_reward"]},
}  # fmt: skip
RUNS = {
    "sft": (SFTTrainer, SFTConfig, {}, [{"messages": CHAT + PAIR["chosen"]}] * 4),
    "dpo": (DPOTrainer, DPOConfig, {}, [PAIR] * 4),
    "reward": (RewardTrainer, RewardConfig, {}, [PAIR] * 4),
    "ppo": (PPOTrainer, PPOConfig, ONLINE, [{"prompt": CHAT}] * 4),
    "grpo": (GRPOTrainer, GRPOConfig, ONLINE, [{"prompt": CHAT}] * 4),
}


@pytest.mark.parametrize("algorithm", list(RUNS))
@pytest.mark.filterwarnings("ignore:.*engine.*:UserWarning")
def test_every_trainer_adds_the_router_loss(algorithm: str, tmp_path: Path) -> None:
    trainer_class, config_class, options, rows = RUNS[algorithm]
    losses = {}
    for coefficient in (0.0, 10.0):
        args = config_class(
            output_dir=str(tmp_path / str(coefficient)), max_steps=1, save_strategy="no", learning_rate=1e-2,
            model_init_kwargs=TINY_MOE | {"seed": 1}, router_aux_loss_coef=coefficient, **options,
        )  # fmt: skip
        more = {"reward_funcs": length_reward} if algorithm in ("ppo", "grpo") else {}
        trainer = trainer_class("builtin:tiny-qwen3-moe", args=args, train_dataset=rows, **more)
        trainer.train()
        lines = (tmp_path / str(coefficient) / "metrics.jsonl").read_text().splitlines()
        logged = next(entry for entry in map(json.loads, lines) if "loss" in entry)
        losses[coefficient] = logged["loss"]
    assert logged["router/aux_loss"] >= 2.0  # two experts per token
    added = losses[10.0] - losses[0.0] - 10 * logged["router/aux_loss"]
    if algorithm == "ppo":
        assert 20 <= added < 40  # the critic is a separate model with routers too
    else:
        assert added == pytest.approx(0, abs=0.01)


def test_micro_batches_are_weighted_by_their_tokens(tmp_path: Path) -> None:
    trees = [Tree([], [Branch(list(range(1, length)))]) for length in (5, 40)]
    policy = Policy(make_model("qwen3_moe"), SFTConfig(router_aux_loss_coef=1.0))
    alone = []
    for tree in trees:
        policy.logprobs(pack([tree]))
        alone.append(instance_of(torch.Tensor, policy.router_loss(1.0)).item())
    trainer = SFTTrainer(
        "builtin:tiny-qwen3-moe",
        SFTConfig(output_dir=str(tmp_path), model_init_kwargs=TINY_MOE),
        [{"messages": CHAT + PAIR["chosen"]}],
    )
    batches = [pack([tree]) for tree in trees]
    shares = [trainer.router_loss.token_share(batch, batches) for batch in batches]
    assert shares == pytest.approx([4 / 43, 39 / 43])
    policy.routers.metrics(lambda value: [value])
    for batch, share in zip(batches, shares, strict=True):
        policy.logprobs(batch)
        policy.router_loss(share)
    metrics = policy.routers.metrics(lambda value: [value])
    assert metrics["router/aux_loss"] == pytest.approx((4 * alone[0] + 39 * alone[1]) / 43)
