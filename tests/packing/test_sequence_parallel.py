"""Test sequence parallelism on two ranks: a row in two slices gives the values and gradients of the whole row."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from rlqwen import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
)
from rlqwen.config import SFTConfig
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.critic import ScalarModel, ValueHead
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from rlqwen.packing.sequence_parallel import SequenceGroup
from rlqwen.types import Truncation
from tests.forked_ranks import run_ranks
from tests.models.test_moe_balance import TINY_MOE
from tests.models.test_policy import QWEN3, make_model, skewed_trees
from tests.narrowing import instance_of, present

LONE_PROMPT = [Tree(list(range(1, 60)), [Branch([7, 8])])]
"""All targets are in the second half of the row, so the first rank has none."""


def batches() -> list[PackedBatch]:
    """Return batches with shared prefixes, an empty completion, odd and even lengths, and very few tokens."""
    rng = random.Random(5)
    plain = [Tree([], [Branch([rng.randrange(120) for _ in range(length)])]) for length in (17, 4)]
    return [pack(trees) for trees in (skewed_trees(), plain, LONE_PROMPT, [Tree([], [Branch([3, 4])])])]


def scalar_model() -> ScalarModel:
    torch.manual_seed(0)
    return ScalarModel(
        Qwen3ForSequenceClassification(Qwen3Config(**QWEN3 | {"num_labels": 1})), SFTConfig(), sequence=GROUP
    )


GROUP: SequenceGroup | None = None
"""The sequence group of this rank, if there is one."""


def policy_of(kind: str, **options: Any) -> Policy:
    args = SFTConfig(gradient_checkpointing=options.pop("checkpointing", False), router_aux_loss_coef=None)
    return Policy(make_model(kind, **options), args, reference=True, sequence=GROUP)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return gradients by name, added up over the ranks."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if GROUP is not None:
        for grad in found.values():
            dist.all_reduce(grad)
    return found


def token_loss(policy: Policy, batch: PackedBatch) -> dict[str, Any]:
    """Return values and gradients of a loss of logprobs, entropies, a value head and the routers."""
    head = ValueHead(64, train_trunk=True, device=torch.device("cpu"), sequence=policy.sequence)
    torch.nn.init.ones_(head.head.weight)
    logp_N, entropy_N, hidden_NC = policy.logprobs_and_hidden(
        batch, temperature=0.7, entropy=True, truncation=Truncation(top_p=0.8, min_p=0.01)
    )
    values_N = head.values(batch, hidden_NC)
    sums_S = logp_N.new_zeros(batch.num_sequences).index_add(0, batch.sequence_N, logp_N)  # a loss on whole sequences
    balance = policy.router_loss(1.0)
    loss = (sums_S**2).sum() / 100 + present(entropy_N).sum() + (values_N * logp_N.detach()).sum() + 100 * balance
    loss.backward()
    grads = gradients(policy.model) | gradients(head.head)
    policy.model.zero_grad()
    values = [
        logp_N,
        present(entropy_N),
        batch.per_token["log_kept"],
        values_N,
        torch.as_tensor(balance),
        policy.reference_logprobs(batch),
    ]
    with policy.inference():
        values += policy.logprobs_and_log_sum_sq_probs(batch)
    return {"values": [value.detach() for value in values], "gradients": grads}


def score_loss(model: ScalarModel, batch: PackedBatch) -> dict[str, Any]:
    scores_S, values_N = model.scores(batch), model.values(batch, torch.empty(0))
    ((scores_S**2).sum() + values_N.sum()).backward()
    grads = gradients(model.model)
    model.model.zero_grad()
    return {"values": [scores_S.detach(), values_N.detach()], "gradients": grads}


def everything() -> list[dict[str, Any]]:
    """Return the results of every kind of model for every batch."""
    found = []
    for kind, options in (
        ("qwen3", {}),
        ("qwen3", {"checkpointing": True, "num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("qwen3_moe", {}),
    ):
        policy = policy_of(kind, **options)
        found += [token_loss(policy, batch) for batch in batches()]
    model = scalar_model()
    return found + [score_loss(model, batch) for batch in batches()]


def in_a_rank() -> list[dict[str, Any]]:
    global GROUP
    dist.init_process_group("gloo")
    GROUP = SequenceGroup(dist.new_group())
    return everything()


def test_two_slices_give_the_values_and_gradients_of_the_whole_row() -> None:
    whole = everything()
    for found in run_ranks(in_a_rank):
        assert len(found) == len(whole)
        for ours, theirs in zip(found, whole, strict=True):
            for mine, expected in zip(ours["values"], theirs["values"], strict=True):
                torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-5)
            assert ours["gradients"].keys() == theirs["gradients"].keys()
            # The exact gradient of some weights is 0 (a single token attends only to itself), so allow for rounding.
            noise = 1e-6 * torch.stack([grad.norm() for grad in theirs["gradients"].values()]).norm()
            for name, expected in theirs["gradients"].items():
                gap = (ours["gradients"][name] - expected).norm()
                assert gap <= 1e-4 * expected.norm() + noise, name


class ThreeRanks(SequenceGroup):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.size = rank, 3


def test_slices_cover_the_row_and_every_position_has_one_owner() -> None:
    row = torch.arange(1, 8)[None]
    groups = [ThreeRanks(rank) for rank in range(3)]
    assert torch.cat([group.cut(row) for group in groups], dim=1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0, 0]]
    assert [group.num_real(7) for group in groups] == [3, 3, 1]
    places = torch.tensor([6, 0, 4, 2])
    owned = [group.own(places, 7) for group in groups]
    assert [instance_of(torch.Tensor, own).tolist() for own, _ in owned] == [[1, 3], [2], [0]]
    assert [inside.tolist() for _, inside in owned] == [[0, 2], [1], [0]]
    assert [group.num_real(1) for group in groups] == [1, 0, 0]


def test_models_that_cannot_be_sliced_are_refused_with_the_reason() -> None:
    with pytest.raises(
        ModelError, match=r"sequence_parallel_size=3 does not divide the model's 4 attention heads .*2, 4"
    ):
        Policy(make_model(), SFTConfig(), sequence=ThreeRanks(0))
    two = ThreeRanks(0)
    two.size = 2
    with pytest.raises(
        ModelError, match=r"qwen3_next has layers that carry a state along the sequence \(linear_attention\)"
    ):
        Policy(make_model("qwen3_next"), SFTConfig(), sequence=two)


def length_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 5) for completion in completions]


CHAT = [{"role": "user", "content": "1 + 2 = ?"}]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{number} + 2 = ?" + "!" * (number % 3)}],
        "chosen": [{"role": "assistant", "content": "\\boxed{3}" * (1 + number % 2)}],
        "rejected": [{"role": "assistant", "content": "no idea"}],
    }
    for number in range(8)
]
ONLINE = {
    "num_generations": 4, "max_completion_length": 12, "rollout": {"engine": "transformers"}, "temperature": 1.0,
    "scoring": {"in_process": ["length_reward"]},
}  # fmt: skip
RUNS = {
    "sft": (SFTTrainer, SFTConfig, {}, [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]),
    "dpo": (DPOTrainer, DPOConfig, {}, PAIRS),
    "reward": (RewardTrainer, RewardConfig, {}, PAIRS),
    "ppo": (PPOTrainer, PPOConfig, ONLINE | {"critic": {"kind": "head"}}, [{"prompt": row["prompt"]} for row in PAIRS]),
    "grpo": (GRPOTrainer, GRPOConfig, ONLINE | {"beta": 0.1}, [{"prompt": row["prompt"]} for row in PAIRS]),
}


def train(algorithm: str, folder: Path, batch_size: int, **parallel: int) -> tuple[list[float], list[torch.Tensor]]:
    """Return the logged metrics and the final weights of a run."""
    trainer_class, config_class, options, rows = RUNS[algorithm]
    args = config_class(
        output_dir=str(folder), max_steps=2, save_strategy="no", learning_rate=1e-3, parallel=parallel,
        per_device_train_batch_size=batch_size, model_init_kwargs=TINY_MOE | {"seed": 1},
        eval_strategy="steps", eval_steps=2, **options,
    )  # fmt: skip
    more = {"reward_funcs": length_reward} if algorithm in ("ppo", "grpo") else {}
    trainer = trainer_class("builtin:tiny-qwen3-moe", args=args, train_dataset=rows, eval_dataset=rows[:3], **more)
    trainer.train()
    keys = ("loss", "grad_norm", "tokens/trained", "eval/loss", "eval/reward/mean")
    metrics = [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]
    return metrics, [parameter.detach() for parameter in trainer.policy.trained_parameters]


@pytest.mark.parametrize("algorithm", [*RUNS])
@pytest.mark.filterwarnings("ignore:.*engine.*:UserWarning")
def test_sequence_groups_of_two_ranks_train_like_one_rank(algorithm: str, tmp_path: Path) -> None:
    metrics, weights = train(algorithm, tmp_path / "one", 8)
    found = run_ranks(lambda: train(algorithm, tmp_path / "four", 4, sequence_parallel_size=2), world_size=4)
    for ours, our_weights in found:
        assert ours == pytest.approx(metrics, rel=2e-3)  # the balance of experts depends on the micro-batch
        assert all(map(torch.equal, our_weights, found[0][1]))
    gap = torch.stack([(mine - theirs).norm() for mine, theirs in zip(our_weights, weights, strict=True)])
    assert gap.max() < 0.05  # two steps change a weight by at most 1e-3 each


@pytest.mark.filterwarnings("ignore")  # importing DeepSpeed causes them
@pytest.mark.parametrize("stage", [2, 3])
def test_sequence_groups_work_with_sharded_gradients_and_weights(stage: int, tmp_path: Path) -> None:
    metrics, _ = train("sft", tmp_path / "one", 8)
    parallel = {"sequence_parallel_size": 2, "zero_stage": stage}
    for ours, _ in run_ranks(lambda: train("sft", tmp_path / "four", 4, **parallel), world_size=4):
        assert ours == pytest.approx(metrics, rel=2e-3)


def test_a_group_size_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel.sequence_parallel_size=2 must divide the number of ranks, which is 1"
    ):
        SFTTrainer("builtin:tiny-qwen3", SFTConfig(parallel={"sequence_parallel_size": 2}), [])
    with pytest.raises(ConfigError, match="set one of them"):
        SFTConfig(parallel={"sequence_parallel_size": 2, "autotp_size": 2})
    with pytest.raises(ConfigError, match="autotp_size=2 and zero_stage=1: ZeRO would add up"):
        SFTConfig(parallel={"autotp_size": 2, "zero_stage": 1})
