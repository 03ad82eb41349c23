"""Compare a plan with what one update of the trainer on a CPU really holds and computes, for three shapes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlqwen import SFTConfig, SFTTrainer
from rlqwen.planning.flops import token_flops
from rlqwen.preflight.memory_plan import BACKWARD, STEP
from rlqwen.preflight.memory_planner import plan_memory
from rlqwen.preflight.model_check import ConfigFacts
from rlqwen.preflight.model_size import ModelSize
from tests.planning.models import sft

LENGTH, ROWS = 192, 2
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "tied": (Qwen3ForCausalLM, Qwen3Config, {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "tie_word_embeddings": True,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}),
    "wide": (Qwen3ForCausalLM, Qwen3Config, {
        "hidden_size": 320, "intermediate_size": 768, "num_hidden_layers": 2, "tie_word_embeddings": False,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}),
    "experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "tie_word_embeddings": False,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
        "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2}),
}  # fmt: skip


def grouped_flops(left: Any, right: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Count the products of experts, which torch's counter does not know: (tokens, k) and (experts, k, n), or gradients."""
    return 2 * int(left[0]) * int(left[1]) * int(right[-1])


class Measured:
    """Train for one update, and measure the bytes of tensors by part, and floating-point operations."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, checkpointing: bool) -> None:
        self.gradients = 0
        self.kept: dict[int, int] = {}
        self.weights = {weight.untyped_storage().data_ptr(): weight.nbytes for weight in model.parameters()}
        shapes = {tuple(weight.shape) for weight in model.parameters()}
        self._not_kept = shapes | {shape[::-1] for shape in shapes}
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(self._count_gradient)
        args = SFTConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, max_steps=1, save_strategy="no", packing=True, max_length=LENGTH,
            per_device_train_batch_size=ROWS, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        rows = [{"text": " ".join(str(first + i) for i in range(400))} for first in range(8)]
        trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
        with counter, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            trainer.train()
        counts: Counter[str] = Counter()
        for operation, flops in counter.get_flop_counts()["Global"].items():
            counts["attention" if "bmm" in str(operation) else "products"] += flops
        self.flops = counts
        states = [state for optimizer in trainer.optimizer.optimizers for state in optimizer.state.values()]
        self.moments = sum(each.nbytes for state in states for each in state.values() if each.ndim)

    def _count_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.gradients += weight.grad.nbytes

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights and tuple(tensor.shape) not in self._not_kept:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def measure(shape: str, folder: Path, tokenizer_path: Path, checkpointing: bool) -> tuple[ModelSize, Measured]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    model_class, config_class, widths = SHAPES[shape]
    model = model_class(config_class(vocab_size=len(tokenizer), max_position_embeddings=1024, **widths))
    size = ModelSize.measure(sft("Qwen3-0.6B", LENGTH), ConfigFacts("", {}, model.config, 1024, "float32", 0))
    return size, Measured(model, tokenizer, folder / "run", checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_what_an_update_takes(shape: str, checkpointing: bool, tmp_path: Path, tiny_model_path: Path) -> None:
    size, measured = measure(shape, tmp_path, tiny_model_path, checkpointing)
    train = {"per_device_train_batch_size": ROWS, "bf16": False, "gradient_checkpointing": checkpointing}
    plan = plan_memory(sft("Qwen3-0.6B", LENGTH, train=train), size, on_gpu=False)
    assert plan.parts["weights"][STEP] == sum(measured.weights.values())
    assert plan.parts["gradients"][STEP] == measured.gradients
    assert plan.parts["optimizer"][STEP] == pytest.approx(measured.moments, rel=0.01)
    flops = token_flops(size, LENGTH)
    products = flops.training(recomputes=checkpointing) - (3 + checkpointing) * flops.attention
    assert ROWS * LENGTH * products == pytest.approx(measured.flops["products"], rel=0.15)
    if not checkpointing:  # else kept tensors are packed again when layers are computed again
        assert plan.parts["activations"][BACKWARD] == pytest.approx(sum(measured.kept.values()), rel=0.15)


def test_attention_takes_the_operations_that_are_planned(tmp_path: Path, tiny_model_path: Path) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter does not know the kernel of a CPU
        size, measured = measure("tied", tmp_path, tiny_model_path, checkpointing=False)
    # It computes all pairs of tokens, and a kernel half of them.
    attention = 2 * 3 * token_flops(size, LENGTH).attention
    assert ROWS * LENGTH * attention == pytest.approx(measured.flops["attention"], rel=0.15)
