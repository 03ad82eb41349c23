"""Test routing replay: recorded experts are used again after packing, sharding, resuming and vLLM rollouts."""

import copy
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from rlqwen import GRPOConfig, GRPOTrainer, SFTConfig
from rlqwen.config import RolloutConfig
from rlqwen.errors import ConfigError
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import PackedBatch, Tree, pack, split_trees
from rlqwen.packing.forward import _own_experts
from rlqwen.packing.routing_replay import routers_of
from rlqwen.packing.sequence_parallel import SequenceGroup
from rlqwen.rollout.group_broadcast import pack_groups, unpack_groups
from rlqwen.rollout.prefetch import RolloutBatch
from rlqwen.trainers.micro_batching import share_trees
from rlqwen.types import Completion, Group, Prompt
from tests.models.test_lora_targets import moe
from tests.models.test_policy import make_model, skewed_trees
from tests.narrowing import present

KINDS = ["qwen3_moe", "qwen3_next", "qwen3_5_moe"]


def with_experts(trees: list[Tree], num_layers: int = 2, *, num_experts: int = 4, leave_out: int = 1) -> list[Tree]:
    """Return the trees with random recorded experts, two of `num_experts` per token except the last `leave_out` tokens."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        scores = rng.random((max(count, 0), num_layers, num_experts))
        return scores.argsort(-1)[..., :2].astype(np.uint8)

    trees = copy.deepcopy(trees)
    for tree in trees:
        tree.prefix_experts = draw(len(tree.prefix))
        for branch in tree.branches:
            branch.experts = draw(len(branch.token_ids) - leave_out)
    return trees


def forced(model: Any, experts_TLK: torch.Tensor) -> None:
    """Replace the routers of a reference model by routers that choose the recorded experts of one known row."""
    for layer, router in enumerate(routers_of(model).values()):

        def forward(hidden: Tensor, router: Any = router, layer: int = layer) -> tuple[Tensor, Tensor, Tensor]:
            hidden = hidden.reshape(-1, router.hidden_dim)
            logits = torch.nn.functional.linear(hidden, router.weight)
            own = logits.topk(router.top_k, dim=-1).indices
            recorded = experts_TLK[:, layer].long()
            chosen = torch.where(recorded[:, :1] < 0, own, recorded)
            kept = torch.full_like(logits, -torch.inf).scatter(-1, chosen, 0.0)
            normalizes = getattr(router, "norm_topk_prob", True)
            weights = (logits + kept if normalizes else logits).softmax(-1).gather(-1, chosen)
            return logits, weights, chosen

        router.forward = forward


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_experts_get_the_weights_of_the_router(kind: str, checkpointing: bool) -> None:
    batch = pack(with_experts(skewed_trees()))
    assert batch.experts_TLK is not None
    model = moe(kind)
    plain = copy.deepcopy(model)
    policy = Policy(model, SFTConfig(gradient_checkpointing=checkpointing, router_aux_loss_coef=0.0))
    policy.replay_routing()
    forced(plain, batch.experts_TLK)
    reference = Policy(plain, SFTConfig(gradient_checkpointing=False, router_aux_loss_coef=0.0))

    weights = torch.randn(batch.num_targets)
    ours, _ = policy.logprobs(batch)
    theirs, _ = reference.logprobs(batch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    (ours @ weights).backward()
    (theirs @ weights).backward()
    gradients = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            gradient = present(gradients[name].grad)
            assert (weight.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    routers = routers_of(model).values()
    assert all(present(router.get_parameter("weight").grad).abs().max() > 0 for router in routers)
    differs = present(policy.replay).metrics(lambda value: [value])["router/replay_differs"]
    assert 0.5 < differs < 1  # one of 6 pairs of experts is what the router chooses
    assert (ours - Policy(moe(kind), SFTConfig()).logprobs(batch)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_same_for_one_sequence_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack(with_experts(skewed_trees()))
    logprobs = []
    for packs in (True, False):
        if not packs:
            monkeypatch.setattr("rlqwen.packing.forward.packs_prefixes", lambda config: False)
        policy = Policy(moe(kind), SFTConfig())
        policy.replay_routing()
        logprobs.append(policy.logprobs(batch)[0])
    torch.testing.assert_close(*logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("lora", [None, ["q_proj", "experts", "gate"]], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_replaying_its_own_choices_changes_nothing(kind: str, lora: list[str] | None, options: dict[str, Any]) -> None:
    config = lora and LoraConfig(r=2, target_modules=lora, init_lora_weights=False)
    policy = Policy(moe(kind), SFTConfig(**options), peft_config=config, reference=True)
    chosen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda router, args, output: chosen.append(output[2]))
        for router in routers_of(policy.base_model).values()
    ]
    tree = skewed_trees()[0]
    batch = pack([Tree(tree.prefix, tree.branches[:1])])
    expected, _ = policy.logprobs(batch)
    (expected.sum() / 10).backward()
    gradients = [present(weight.grad).clone() for weight in policy.trained_parameters]
    policy.model.zero_grad()
    batch.experts_TLK = torch.stack(chosen[:2], dim=1).to(torch.int16)
    expected_reference = policy.reference_logprobs(batch)
    for hook in hooks:
        hook.remove()
    policy.replay_routing()
    logp, _ = policy.logprobs(batch)
    torch.testing.assert_close(logp, expected, atol=1e-6, rtol=0)
    (logp.sum() / 10).backward()
    for weight, gradient in zip(policy.trained_parameters, gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)
    assert present(policy.replay).metrics(lambda value: [value]) == {"router/replay_differs": 0.0}
    if lora is None and "bf16" not in options:  # the reference still equals the policy, and uses the same experts
        torch.testing.assert_close(policy.reference_logprobs(batch), expected_reference, atol=1e-6, rtol=0)


def test_batches_without_records_and_dense_models() -> None:
    policy = Policy(moe("qwen3_moe"), SFTConfig())
    expected, _ = policy.logprobs(pack(skewed_trees()))
    policy.replay_routing()
    assert torch.equal(policy.logprobs(pack(skewed_trees()))[0], expected)
    assert present(policy.replay).metrics(lambda value: [value]) == {}
    recorded = with_experts(skewed_trees())
    replayed = policy.logprobs(pack(recorded))[0]
    assert not torch.equal(replayed, expected)
    some = with_experts(skewed_trees(), leave_out=0)
    for tree in some[1:]:
        tree.prefix_experts = None
        for branch in tree.branches:
            branch.experts = None
    count = sum(some[0].target_counts)
    torch.testing.assert_close(policy.logprobs(pack(some))[0][count:], expected[count:], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="routing_replay is for mixtures of experts, and Qwen3ForCausalLM is none"):
        Policy(make_model(), SFTConfig()).replay_routing()
    with pytest.raises(ConfigError, match="routing_replay=true replays experts that vLLM chose"):
        RolloutConfig.parse({"engine": "transformers", "routing_replay": True})


def test_records_follow_their_tokens() -> None:
    trees = with_experts(skewed_trees())
    whole = pack(trees)
    experts_TLK = present(whole.experts_TLK)
    assert experts_TLK.shape == (whole.num_tokens, 2, 2)
    first = len(trees[0].prefix)
    torch.testing.assert_close(experts_TLK[:first].numpy(), present(trees[0].prefix_experts).astype(np.int16))
    assert (experts_TLK[first + len(trees[0].branches[0].token_ids) - 1] == -1).all()  # its last token
    by_token = {}
    for tree in trees:
        for branch in tree.branches:
            by_token[id(branch.token_ids)] = (present(tree.prefix_experts), branch.experts)
    parts = list(split_trees(trees, max_branches=2))
    parts += [share for share in share_trees(trees, 3) if share]
    assert all(
        np.array_equal(by_token[id(branch.token_ids)][0], present(tree.prefix_experts))
        and by_token[id(branch.token_ids)][1] is branch.experts
        for part in parts
        for tree in part
        for branch in tree.branches
    )


def test_a_rank_of_a_sequence_group_replays_its_slice() -> None:
    batch = pack(with_experts(skewed_trees()))
    group = SequenceGroup()
    group.size, length = 4, -(-batch.num_tokens // 4)
    for group.rank in range(4):
        own = present(_own_experts(batch, group))
        real = group.num_real(batch.num_tokens)
        assert own.shape[0] == length
        start = group.rank * length
        assert torch.equal(own[:real], present(batch.experts_TLK)[start : start + real])


def group_with_experts() -> Group:
    experts = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2)
    completions = [Completion([1, 2, 3], [-0.5] * 3, "stop", "x", experts), Completion([4], [-0.5], "length", "y")]
    return Group(Prompt(0, [7, 8], "p"), completions, 1, total_rewards_G=[1.0, 0.0], prompt_experts=experts[:, :, ::-1])


def test_records_reach_other_ranks_and_resumed_runs() -> None:
    group = group_with_experts()
    (arrived,) = unpack_groups(pack_groups([group]), [group.prompt])
    scorer: Any = SimpleNamespace(open_batch=lambda: None)
    batch = RolloutBatch("train/1", (), scorer, 1)
    batch._groups = [group]
    saved = json.loads(json.dumps(batch.state_dict()))
    (restored,) = RolloutBatch.from_state(saved, [group.prompt], scorer).score()
    for other in (arrived, restored):
        np.testing.assert_array_equal(other.prompt_experts, group.prompt_experts)
        np.testing.assert_array_equal(other.completions[0].experts, group.completions[0].experts)
        assert present(other.completions[0].experts).dtype == np.uint8
        assert other.completions[1].experts is None


def length_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


def test_vllm_records_the_experts_that_the_trainer_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare in float32, where both choose the same experts, also with prefix cache and weight sync."""
    rows = [{"prompt": [{"role": "user", "content": f"{a} + {a} = ?" * 4}]} for a in (3, 3, 4, 3)]
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, save_strategy="no", learning_rate=1e-2, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=24, bf16=False,
        generation_kwargs={"stop_token_ids": list(range(40))},  # some completions end while others of the same prompt continue
        model_init_kwargs={"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1},
        rollout={"routing_replay": True}, scoring={"in_process": ["length_reward"]},
    )  # fmt: skip
    trainer = GRPOTrainer("builtin:tiny-qwen3-moe", length_reward, args=args, train_dataset=rows)
    packed = []
    original = trainer.micro_batches

    def keep(trees: Sequence[Tree]) -> list[PackedBatch]:
        batches = original(trees)
        packed.extend(batches)
        return batches

    monkeypatch.setattr(trainer, "micro_batches", keep)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    for step in steps:
        assert step["router/replay_differs"] <= 0.002  # ties may differ
        assert step["sampling/logp_gap"] < 1e-4
        assert step["sync/canary_gap"] < 1e-4
    assert packed
    for batch in packed:
        unknown = (present(batch.experts_TLK)[..., 0] < 0).all(1)
        assert unknown.sum() == batch.num_sequences  # the last token of each completion was never an input
    script: Any = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "routing_replay.py"))
    gaps, differ = script["score"](trainer.policy, packed[-1:])
    assert gaps.shape == differ.shape == (packed[-1].num_targets,)
    assert not differ.any()
