"""Test recomputed activations: the same gradients, and what `selective` keeps."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlqwen.config import SFTConfig
from rlqwen.models.policy import Policy
from rlqwen.models.recomputation import ATTENTION_OPS, Recomputation
from rlqwen.packing.batch import PackedBatch, pack
from rlqwen.preflight.activations import ForwardRules, attention_outputs
from tests.models.test_policy import make_model, skewed_trees

KINDS: tuple[Recomputation, ...] = (False, True, "selective")


class Calls(TorchDispatchMode):
    """Count the calls of operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operator] += 1
        return operator(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        return sum(count for operator, count in self.counts.items() if operator in ATTENTION_OPS)


def policy_of(kind: Recomputation, model: str = "qwen3", lora: Any = None, **options: Any) -> Policy:
    torch.manual_seed(0)
    args = SFTConfig(gradient_checkpointing=kind, use_cpu=True, router_aux_loss_coef=0.0, **options)
    return Policy(make_model(model), args, peft_config=lora)


def gradients(policy: Policy, batch: PackedBatch) -> tuple[list[Tensor], int, int]:
    """Return the gradients, and how often attention was called in the forward and in the backward pass."""
    with Calls() as forward:
        logp_N, _ = policy.logprobs(batch)
    with Calls() as backward:
        (-logp_N.mean()).backward()
    found = [weight.grad for weight in policy.trained_parameters]
    return [gradient for gradient in found if gradient is not None], forward.attention, backward.attention


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ("qwen3", None),
        ("qwen3", LoraConfig(r=4, target_modules="all-linear")),
        ("qwen3_moe", None),
        ("qwen3_5_text", None),
    ],
)
def test_gradients_are_the_same_to_the_last_bit(model: str, lora: Any, bf16: bool) -> None:
    """Each policy sees its batch for the first time, so that plans of the layout are made within the layers."""
    results = [gradients(policy_of(kind, model, lora, bf16=bf16), pack(skewed_trees())) for kind in KINDS]
    calls = results[0][1]
    assert calls > 0
    assert [result[1:] for result in results] == [(calls, 0), (calls, calls), (calls, 0)]
    for other, *_ in results[1:]:
        assert len(other) == len(results[0][0])
        assert all(torch.equal(*pair) for pair in zip(results[0][0], other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_on_a_gpu_are_the_same_up_to_rounding() -> None:
    results = []
    for kind in KINDS:
        torch.manual_seed(0)
        policy = Policy(make_model("qwen3"), SFTConfig(bf16=True, gradient_checkpointing=kind), device="cuda")
        results.append(gradients(policy, pack(skewed_trees()).to("cuda")))
    calls = results[0][1]
    assert [result[1:] for result in results] == [(calls, 0), (calls, calls), (calls, 0)]
    for other, *_ in results[1:]:
        for ours, theirs in zip(results[0][0], other, strict=True):
            assert (ours - theirs).norm() <= 1e-2 * ours.norm()


def test_selective_keeps_the_outputs_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    make: Any = checkpoint._CachingTorchDispatchMode

    def record(*arguments: Any) -> Any:
        modes.append(make(*arguments))
        return modes[-1]

    monkeypatch.setattr(checkpoint, "_CachingTorchDispatchMode", record)
    policy = policy_of("selective", bf16=False)
    batch = pack(skewed_trees()[-1:])
    logp_N, _ = policy.logprobs(batch)
    assert logp_N.requires_grad
    kept = [
        leaf.val
        for mode in modes
        for outputs in mode.storage.values()
        for output in (outputs.values() if isinstance(outputs, dict) else outputs)
        for leaf in tree_leaves(output)
        if isinstance(getattr(leaf, "val", None), Tensor)
    ]
    size = sum(value.untyped_storage().nbytes() for value in kept)
    rules = ForwardRules.of(on_gpu=False, half=False)
    assert size == pytest.approx(batch.num_tokens * attention_outputs(policy.text_config, rules), rel=0.15)


def test_generation_runs_without_recomputation_and_leaves_it_on() -> None:
    policy = policy_of("selective")
    with policy.generation_model() as model:
        assert not model.is_gradient_checkpointing
    assert policy.base_model.is_gradient_checkpointing
    assert gradients(policy, pack(skewed_trees()))[2] == 0
