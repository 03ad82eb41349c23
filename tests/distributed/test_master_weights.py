"""Test bfloat16 weights with float32 masters in the optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from rlqwen.config import SFTConfig
from rlqwen.distributed import OptimizerStep, ParameterGroup
from rlqwen.errors import ConfigError
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import pack
from tests.models.test_policy import make_model, skewed_trees

LORA = LoraConfig(r=4, target_modules="all-linear")


def config(**options: Any) -> SFTConfig:
    values = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": True,
        "master_weights": True,
    }
    return SFTConfig(**values | options)


def started(args: SFTConfig, *, lora: Any = None) -> tuple[Policy, OptimizerStep]:
    torch.manual_seed(0)
    policy = Policy(make_model("qwen3"), args, peft_config=lora)
    group = ParameterGroup("policy", policy.trained_parameters, args.learning_rate, policy.trained_names, policy.root)
    return policy, OptimizerStep([group], args, total_updates=100)


def update(policy: Policy, optimizer: OptimizerStep, seed: int = 0, micro_batches: int = 1) -> float:
    total = 0.0
    for part in range(micro_batches):
        logp_N, _ = policy.logprobs(pack(skewed_trees(seed + part)))
        loss = -logp_N.mean() / micro_batches
        total += loss.item()
        optimizer.backward(loss)
    assert not optimizer.step().skipped
    return total


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {
        name: weight.detach().clone()
        for name, weight in zip(policy.trained_names, policy.trained_parameters, strict=True)
    }


def test_updates_below_a_step_of_bfloat16_add_up_in_the_masters() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    args = config(learning_rate=1e-4, max_grad_norm=0.0)
    optimizer = OptimizerStep([ParameterGroup("policy", [weight], 1e-4)], args, total_updates=100)
    assert weight.dtype == torch.bfloat16
    moved_at = None
    for number in range(1, 41):
        optimizer.backward(weight.float().sum())
        optimizer.step()
        assert torch.allclose(optimizer.masters.master_of(weight), torch.tensor(1 - number * 1e-4), atol=2e-6)
        if moved_at is None and not torch.equal(weight.float(), torch.ones(4, 4)):
            moved_at = number
    # Below 1, bfloat16 has steps of 2 ** -8; half of one is 0.00195.
    assert moved_at == 20
    assert torch.equal(weight.float(), torch.full((4, 4), 1 - 2**-8))


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = OptimizerStep([ParameterGroup("policy", [weight], 1e-4)], config(), total_updates=10)
    for size in (256.0, 1.0, 1.0):  # in bfloat16, 256 + 1 is 256
        optimizer.backward(size * weight.float().sum())
    assert optimizer.step().grad_norm == pytest.approx(2 * 258.0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapter"])
def test_losses_follow_those_of_autocast(lora: Any) -> None:
    curves = []
    for masters in (False, True):
        policy, optimizer = started(config(master_weights=masters), lora=lora)
        matrices = {weight.dtype for weight in policy.trained_parameters if weight.ndim > 1}
        assert matrices == ({torch.bfloat16} if masters else {torch.float32})
        curves.append([update(policy, optimizer, micro_batches=2) for _ in range(12)])
    assert curves[0][0] - curves[0][-1] > (0.3 if lora is None else 0.01)
    assert curves[1] == pytest.approx(curves[0], abs=0.03 * (curves[0][0] - curves[0][-1]) + 2e-3)


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapter"])
def test_a_resumed_run_is_equal_to_the_last_bit(lora: Any, tmp_path: Path) -> None:
    policy, optimizer = started(config(), lora=lora)
    for seed in range(3):
        update(policy, optimizer, seed)
    policy.save_checkpoint(tmp_path)
    optimizer.save_checkpoint(tmp_path)
    other, other_optimizer = started(config(), lora=lora)
    other.load_checkpoint(tmp_path)
    other_optimizer.load_checkpoint(tmp_path)
    for one, another in ((policy, optimizer), (other, other_optimizer)):
        for seed in range(3, 6):
            update(one, another, seed)
    for name, weight in weights_of(policy).items():
        assert torch.equal(weight, weights_of(other)[name]), name
    for (name, master), (_, restored) in zip(
        optimizer.groups[0].named(), other_optimizer.groups[0].named(), strict=True
    ):
        assert torch.equal(master, restored), name


def test_checkpoints_hold_the_masters_and_workers_get_bfloat16(tmp_path: Path) -> None:
    policy, optimizer = started(config(learning_rate=1e-5))
    update(policy, optimizer)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = dict(policy.model.named_parameters())[name]
    master = optimizer.masters.master_of(weight)
    assert not torch.equal(master, weight.float())
    policy.save(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], master)
    exported = dict(policy.export_weights())[name]
    assert exported.dtype == torch.bfloat16
    assert torch.equal(exported, weight)
    plain, plain_optimizer = started(config(master_weights=False))
    plain.load_checkpoint(tmp_path)  # a run may go on without them, from the exact weights
    assert torch.equal(weights_of(plain)[name], master)
    optimizer.save_checkpoint(tmp_path)
    plain_optimizer.load_checkpoint(tmp_path)
    assert torch.equal(weights_of(plain)[name], master)


def test_a_saved_adapter_holds_the_masters(tmp_path: Path) -> None:
    policy, optimizer = started(config(learning_rate=1e-5), lora=LORA)
    update(policy, optimizer)
    policy.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(policy.trained_parameters)
    for name, weight in zip(policy.trained_names, policy.trained_parameters, strict=True):
        assert torch.equal(saved[name.replace(".default.", ".")], optimizer.masters.master_of(weight)), name


def test_a_skipped_update_changes_neither_weights_nor_masters() -> None:
    policy, optimizer = started(config())
    update(policy, optimizer)
    before, masters = weights_of(policy), [master.detach().clone() for master in optimizer.groups[0].parameters]
    logp_N, _ = policy.logprobs(pack(skewed_trees()))
    optimizer.backward(logp_N.sum() * float("nan"))
    assert optimizer.step().skipped
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(policy).items())
    assert all(torch.equal(*pair) for pair in zip(masters, optimizer.groups[0].parameters, strict=True))


def test_masters_without_bfloat16_are_refused() -> None:
    for options in ({"bf16": False}, {"fp16": True, "bf16": None}):
        with pytest.raises(ConfigError, match="master_weights=true keeps weights in bfloat16"):
            config(**options)
    with pytest.raises(ConfigError, match="the forward pass on this cpu is in float32"):
        started(config(bf16=None))
    with pytest.raises(ConfigError, match="does not know shards of layers"):
        config(parallel={"autotp_size": 2})
