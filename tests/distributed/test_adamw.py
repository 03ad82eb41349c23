"""Test AdamW with moments in 8 bits."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlqwen.config import SFTConfig
from rlqwen.distributed import OptimizerStep, ParameterGroup
from rlqwen.errors import ConfigError

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def started(optim: str, **options: Any) -> tuple[nn.Linear, OptimizerStep]:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    args = SFTConfig(optim=optim, learning_rate=1e-2, lr_scheduler_type="constant", weight_decay=0.1, **options)
    group = ParameterGroup("policy", list(layer.parameters()), args.learning_rate, ["weight", "bias"])
    return layer, OptimizerStep([group], args, total_updates=100)


def train(layer: nn.Linear, optimizer: OptimizerStep, seeds: range) -> float:
    loss = torch.zeros(())
    for seed in seeds:
        x = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
        loss = (nn.functional.linear(x, layer.weight.float(), layer.bias) - x[:, :64]).square().mean()
        optimizer.backward(loss)
        assert not optimizer.step().skipped
    return loss.item()


def states(optimizer: OptimizerStep) -> dict[str, Tensor]:
    return dict(optimizer._state())


@needs_bitsandbytes
def test_moments_in_8_bits_train_as_those_in_32() -> None:
    losses = {}
    for optim in ("adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit"):
        layer, optimizer = started(optim)
        before = train(layer, optimizer, range(1))
        losses[optim] = train(layer, optimizer, range(1, 60)) / before
        dtypes = {value.dtype for value in states(optimizer).values() if value.numel() == layer.weight.numel()}
        assert dtypes == ({torch.uint8} if "8bit" in optim else {torch.float32})
    assert losses["adamw_torch_fused"] < 0.3
    assert losses["adamw_bnb_8bit"] == pytest.approx(losses["adamw_torch_fused"], rel=0.1)
    assert losses["adamw_8bit"] == losses["adamw_bnb_8bit"]


@needs_bitsandbytes
@pytest.mark.parametrize("options", [{}, {"bf16": True, "use_cpu": True, "master_weights": True}])
def test_8bit_states_are_resumed_to_the_last_bit(options: Any, tmp_path: Path) -> None:
    layer, optimizer = started("adamw_bnb_8bit", **options)
    train(layer, optimizer, range(5))
    optimizer.save_checkpoint(tmp_path)
    other, resumed = started("adamw_bnb_8bit", **options)
    other.load_state_dict(layer.state_dict())
    resumed.load_checkpoint(tmp_path)
    saved, restored = states(optimizer), states(resumed)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    train(layer, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
    _, plain = started("adamw_torch_fused")
    with pytest.raises(ConfigError, match="has moments of 8 bits, and that of this run of 32"):
        plain.load_checkpoint(tmp_path)


def test_8bit_optimizers_are_refused_where_they_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"by itself, and parallel\.zero_stage=2 cuts weights anywhere"):
        SFTConfig(optim="adamw_8bit", parallel={"zero_stage": 2})
    monkeypatch.setattr("rlqwen.distributed.adamw.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optim='adamw_8bit' needs bitsandbytes.*rlqwen\[quantization\]"):
        started("adamw_8bit")
