"""Test that experts multiply in the precision of the forward, for any dtype of the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from rlqwen import SFTConfig
from rlqwen.models.experts import GROUPED_EXPERTS
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import pack
from tests.models.test_policy import make_model, skewed_trees
from tests.narrowing import present

FUSED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Record the dtypes of the operands of every grouped product."""
    seen = []
    real = torch.nn.functional.grouped_mm

    def spy(left: torch.Tensor, right: torch.Tensor, **kwargs: Any) -> Tensor:
        seen.append((left.dtype, right.dtype))
        return real(left, right, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spy)
    return seen


@pytest.mark.parametrize("precision", list(COMPUTE))
@pytest.mark.parametrize(
    ("kind", "lora"),
    [("qwen3_moe", None), ("qwen3_next", None), ("qwen3_moe", {}), ("qwen3_moe", FUSED)],
    ids=["full", "next", "attention", "experts"],
)
def test_experts_multiply_in_the_compute_dtype(
    kind: str, lora: Any, precision: str | None, operands: list[tuple[Any, Any]]
) -> None:
    peft_config = None if lora is None else LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **lora)
    policy = Policy(make_model(kind), SFTConfig(**{precision: True} if precision else {}), peft_config=peft_config)
    logp, _ = policy.logprobs(pack(skewed_trees()))
    logp.sum().backward()
    assert set(operands) == {(COMPUTE[precision], COMPUTE[precision])}
    trained = dict(policy.model.named_parameters())
    experts = {name: weight for name, weight in trained.items() if ".experts." in name and weight.requires_grad}
    assert bool(experts) == (lora != {})
    assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in experts.values())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_other_implementations_of_experts_are_kept_and_run_under_autocast(implementation: str) -> None:
    model = make_model("qwen3_moe")
    model.set_experts_implementation(implementation)
    policy = Policy(model, SFTConfig(bf16=True))
    assert policy.base_model.config._experts_implementation == implementation
    grouped = Policy(make_model("qwen3_moe"), SFTConfig(bf16=True))
    assert grouped.base_model.config._experts_implementation == GROUPED_EXPERTS
    gaps = []
    with torch.no_grad():
        exact, _ = Policy(make_model("qwen3_moe"), SFTConfig(bf16=False)).logprobs(pack(skewed_trees()))
        for one in (policy, grouped):
            gaps.append((one.logprobs(pack(skewed_trees()))[0] - exact).abs().mean().item())
    assert 1e-5 < gaps[0] < 5e-3
    assert gaps[1] == pytest.approx(gaps[0], rel=0.3)  # the same rounding


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_bf16_equal_those_of_float32_up_to_rounding(checkpointing: bool) -> None:
    trees, weights = skewed_trees(), torch.randn(pack(skewed_trees()).num_targets)
    gradients = []
    for bf16 in (False, True):
        model = make_model(
            "qwen3_moe", num_experts=2
        )  # each token uses all experts, so rounding cannot change the choice
        policy = Policy(model, SFTConfig(bf16=bf16, gradient_checkpointing=checkpointing))
        (policy.logprobs(pack(trees))[0] @ weights).backward()
        gradients.append(
            {name: present(weight.grad) for name, weight in model.named_parameters() if ".experts." in name}
        )
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() < 0.02 * exact.norm(), name


def test_decoding_computes_only_the_chosen_experts(operands: list[tuple[Any, Any]]) -> None:
    policy = Policy(make_model("qwen3_moe"), SFTConfig(bf16=True))
    with policy.generation_model() as model:
        generating: Any = model  # the annotated `self` of generate fits none of transformers' own models
        batch = generating.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert batch.shape == (1, 7)
    assert len(operands) == 2 * 2  # for the prompt: two products in each of two layers
    assert set(operands) == {(torch.bfloat16, torch.bfloat16)}


def test_the_implementation_of_experts_is_not_saved(tmp_path: Path) -> None:
    policy = Policy(make_model("qwen3_moe"), SFTConfig())
    policy.save(tmp_path)
    assert GROUPED_EXPERTS not in (tmp_path / "config.json").read_text()
