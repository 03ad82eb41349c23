"""Compare a plan with what two ranks under FSDP2 really hold."""

import functools
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlqwen.config import Recipe
from rlqwen.planning.plan_target import measure
from rlqwen.preflight.memory_plan import STEP
from rlqwen.preflight.memory_planner import plan_memory
from rlqwen.preflight.parallel_layout import ParallelLayout
from tests.forked_ranks import run_ranks
from tests.ranked import _lora, _sft


def held(model: Path, folder: Path, has_adapter: bool) -> tuple[int, int]:
    """Return the bytes of weights and of moments on this rank after an update."""
    options: dict[str, Any] = {"peft_config": _lora()} if has_adapter else {}
    trainer = _sft(str(model), folder, parallel={"engine": "fsdp2"}, max_steps=1, **options)
    trainer.train()
    states = [state for optimizer in trainer.optimizer.optimizers for state in optimizer.state.values()]
    moments = sum(part(each).nbytes for state in states for each in state.values() if each.ndim)
    return sum(part(weight).nbytes for weight in trainer.policy.model.parameters()), moments


def part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("has_adapter", [False, True])
def test_two_ranks_hold_what_is_planned(has_adapter: bool, tiny_model_path: Path, tmp_path: Path) -> None:
    measured = run_ranks(functools.partial(held, tiny_model_path, tmp_path / "run", has_adapter))
    values: dict[str, Any] = {
        "algorithm": "sft",
        "model": {"path": str(tiny_model_path), "dtype": "float32"} | ({"lora": {"r": 4}} if has_adapter else {}),
        "data": {"train": {"path": "builtin:questions"}},
        "train": {"bf16": False},
        "parallel": {"engine": "fsdp2"},
        "output_dir": "runs/plan",
    }
    recipe = Recipe.parse(values)
    layout = ParallelLayout.of(recipe.train.parallel, 2)
    assert layout.is_sharded
    parts = plan_memory(recipe, measure(recipe), layout=layout, on_gpu=False).parts
    for weights, moments in measured:
        # Norms are whole on each rank, and matter in a model as small as this one.
        assert parts["weights"][STEP] == pytest.approx(weights, rel=0.02)
        assert parts["optimizer"][STEP] == pytest.approx(moments, rel=0.02)
