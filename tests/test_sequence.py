"""Sequence parallelism on two real ranks: a row in two slices gives the values and gradients of the whole row."""

import random

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from test_policy import QWEN3, make_model, skewed_trees
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from rlqwen.batch import Branch, PackedBatch, Tree, pack
from rlqwen.config import SFTConfig
from rlqwen.critic import ScalarModel, ValueHead
from rlqwen.errors import ModelError
from rlqwen.policy import Policy
from rlqwen.sequence import SequenceGroup

LONE_PROMPT = [Tree(list(range(1, 60)), [Branch([7, 8])])]
"""All targets lie in the second half, so that the first rank has none."""


def batches() -> list[PackedBatch]:
    """Shared prefixes, an empty completion, odd and even lengths, fewer tokens than ranks' padding."""
    rng = random.Random(5)
    plain = [Tree([], [Branch([rng.randrange(120) for _ in range(length)])]) for length in (17, 4)]
    return [pack(trees) for trees in (skewed_trees(), plain, LONE_PROMPT, [Tree([], [Branch([3, 4])])])]


def scalar_model() -> ScalarModel:
    torch.manual_seed(0)
    return ScalarModel(Qwen3ForSequenceClassification(Qwen3Config(**QWEN3, num_labels=1)), SFTConfig(), sequence=GROUP)


GROUP: SequenceGroup | None = None
"""Of the rank, where there is one."""


def policy_of(kind: str, **options) -> Policy:
    args = SFTConfig(gradient_checkpointing=options.pop("checkpointing", False), router_aux_loss_coef=None)
    return Policy(make_model(kind, **options), args, reference=True, sequence=GROUP)


def gradients(model) -> dict[str, torch.Tensor]:
    """By name, added up over the ranks."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if GROUP is not None:
        for grad in found.values():
            dist.all_reduce(grad)
    return found


def token_loss(policy: Policy, batch: PackedBatch) -> dict:
    """Values and gradients of a loss on logprobs, entropies, a value head and the routers."""
    head = ValueHead(64, train_trunk=True, device=torch.device("cpu"), sequence=policy.sequence)
    torch.nn.init.ones_(head.head.weight)
    logp_N, entropy_N, hidden_NC = policy.logprobs_and_hidden(batch, temperature=0.7, entropy=True)
    values_N = head.values(batch, hidden_NC)
    sums_S = logp_N.new_zeros(batch.num_sequences).index_add(0, batch.sequence_N, logp_N)  # a loss on whole sequences
    balance = policy.router_loss(1.0)
    loss = (sums_S**2).sum() / 100 + entropy_N.sum() + (values_N * logp_N.detach()).sum() + 100 * balance
    loss.backward()
    grads = gradients(policy.model) | gradients(head.head)
    policy.model.zero_grad()
    values = [logp_N, entropy_N, values_N, torch.as_tensor(balance), policy.reference_logprobs(batch)]
    with policy.inference():
        values += policy.logprobs_and_collision(batch)
    return {"values": [value.detach() for value in values], "gradients": grads}


def score_loss(model: ScalarModel, batch: PackedBatch) -> dict:
    scores_S, values_N = model.scores(batch), model.values(batch, torch.empty(0))
    ((scores_S**2).sum() + values_N.sum()).backward()
    grads = gradients(model.model)
    model.model.zero_grad()
    return {"values": [scores_S.detach(), values_N.detach()], "gradients": grads}


def everything() -> list[dict]:
    """Of every kind of model, for every batch."""
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


def in_a_rank() -> list[dict]:
    global GROUP
    dist.init_process_group("gloo")
    GROUP = SequenceGroup(dist.new_group())
    return everything()


def test_two_slices_give_the_values_and_gradients_of_the_whole_row():
    whole = everything()
    for found in run_ranks(in_a_rank):
        assert len(found) == len(whole)
        for ours, theirs in zip(found, whole, strict=True):
            for mine, expected in zip(ours["values"], theirs["values"], strict=True):
                torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-5)
            assert ours["gradients"].keys() == theirs["gradients"].keys()
            # Rounding, as seen by a weight whose exact gradient is 0: a lone token's query attends to itself anyway.
            noise = 1e-6 * torch.stack([grad.norm() for grad in theirs["gradients"].values()]).norm()
            for name, expected in theirs["gradients"].items():
                gap = (ours["gradients"][name] - expected).norm()
                assert gap <= 1e-4 * expected.norm() + noise, name


class ThreeRanks(SequenceGroup):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.size = rank, 3


def test_slices_cover_the_row_and_every_place_has_one_owner():
    row = torch.arange(1, 8)[None]
    groups = [ThreeRanks(rank) for rank in range(3)]
    assert torch.cat([group.cut(row) for group in groups], dim=1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0, 0]]
    assert [group.num_real(7) for group in groups] == [3, 3, 1]
    places = torch.tensor([6, 0, 4, 2])
    owned = [group.own(places, 7) for group in groups]
    assert [own.tolist() for own, _ in owned] == [[1, 3], [2], [0]]
    assert [inside.tolist() for _, inside in owned] == [[0, 2], [1], [0]]
    assert [group.num_real(1) for group in groups] == [1, 0, 0]


def test_what_cannot_be_cut_is_refused_with_the_arithmetic():
    with pytest.raises(
        ModelError, match=r"sequence_parallel_size=3 does not divide the model's 4 attention heads .*2, 4"
    ):
        Policy(make_model(), SFTConfig(), sequence=ThreeRanks(0))
    two = ThreeRanks(0)
    two.size = 2
    with pytest.raises(ModelError, match="carry a state"):
        Policy(make_model("qwen3_next"), SFTConfig(), sequence=two)
