"""Compare what a forward pass is computed to keep for its backward pass with what autograd keeps."""

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlqwen.config import SFTConfig
from rlqwen.models.gpu_forward import is_plain_norm
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from rlqwen.packing.cascade_attention import FlashKernel
from rlqwen.preflight.activations import ForwardRules, checkpoint_bytes, head_activations, layer_activations
from rlqwen.preflight.layer_shapes import layer_shapes
from tests.packing.test_cascade_attention import PlainKernel

NUM_LAYERS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
}  # fmt: skip
ROWS = {
    "alone": [Tree([], [Branch(list(range(first, first + 200)))]) for first in range(2)],
    "grouped": [Tree(list(range(100)), [Branch(list(range(first, first + 80))) for first in range(4)])],
}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 256, "num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": True}
    if kind == "moe":
        experts: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **SHAPES["tiny"], **experts))
    if kind == "delta-net":
        widths: dict[str, Any] = {f"linear_{name}_head_dim": 64 for name in ("key", "value")}
        heads: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
        kinds = ["linear_attention"] * (NUM_LAYERS - 1) + ["full_attention"]
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common, **SHAPES["tiny"], **widths, **heads, layer_types=kinds))
    return Qwen3ForCausalLM(Qwen3Config(**common, **SHAPES[kind]))


class _FusedNorm(torch.autograd.Function):
    """Keep what CUDA's own norm keeps: its input, its weight and a number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _norm(module: Any, x: Tensor) -> Tensor:
    normed: Tensor = _FusedNorm.apply(x, module.weight)  # type: ignore[no-untyped-call]
    return normed.to(torch.bfloat16)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets a policy keep on a CPU what it would keep on a GPU."""

    def change(policy: Policy) -> None:
        monkeypatch.setattr("rlqwen.packing.attention.has_flash_kernel", lambda query, value: True)
        monkeypatch.setattr(FlashKernel, "forward", PlainKernel.forward)
        model: Any = policy.base_model
        model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output.bfloat16())
        for module in model.modules():
            if is_plain_norm(module):
                module.forward = functools.partial(_norm, module)

    return change


def kept_bytes(policy: Policy, batch: PackedBatch) -> int:
    """Return the bytes of what autograd keeps, without weights and autocast's copies of them."""
    shapes = {tuple(weight.shape) for weight in policy.model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    weights = {weight.untyped_storage().data_ptr() for weight in [*policy.model.parameters(), *policy.model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp_N, _ = policy.logprobs(batch)  # alive until the end: what it keeps may not be freed and counted twice
    assert logp_N.requires_grad
    return sum(kept.values())


def computed_bytes(policy: Policy, batch: PackedBatch, *, on_gpu: bool, half: bool, checkpointing: bool) -> float:
    adapters = None
    if policy.has_adapter:
        named = (name.partition(".lora_A") for name, _ in policy.model.named_modules())
        adapters = frozenset(name.rpartition(".")[2] for name, found, _ in named if found)
    rules = ForwardRules.of(on_gpu=on_gpu, half=half, adapters=adapters, half_weights=half and policy.has_adapter)
    shapes = layer_shapes(policy.base_model, policy.text_config)
    assert shapes.total() == NUM_LAYERS
    layers = [layer_activations(shape, policy.text_config, rules).per_rank() for shape in shapes.elements()]
    each = NUM_LAYERS * checkpoint_bytes(policy.text_config, rules) if checkpointing else sum(layers)
    return batch.num_tokens * (each + head_activations(policy.text_config, rules))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("kind", ["tiny", "small", "moe"])
def test_activations_are_what_autograd_keeps(kind: str, targets: Any, checkpointing: bool, as_on_gpu: Any) -> None:
    for on_gpu, half in ((False, False), (False, True), (True, True)):
        model = make(kind)
        lora = None if targets is None else LoraConfig(r=4, target_modules=targets)
        if lora is not None and half:
            model = model.bfloat16()
        args = SFTConfig(bf16=half, use_cpu=True, gradient_checkpointing=checkpointing)
        policy = Policy(model, args, peft_config=lora)
        if on_gpu:
            as_on_gpu(policy)
        for row in ("alone", "grouped"):
            batch = pack(ROWS[row])
            computed = computed_bytes(policy, batch, on_gpu=on_gpu, half=half, checkpointing=checkpointing)
            measured = kept_bytes(policy, batch)
            assert computed == pytest.approx(measured, rel=0.15), (on_gpu, half, row)


def test_activations_of_delta_net_layers_are_what_autograd_keeps() -> None:
    for targets in (None, "all-linear"):
        lora = None if targets is None else LoraConfig(r=4, target_modules=targets)
        policy = Policy(make("delta-net"), SFTConfig(bf16=False, use_cpu=True), peft_config=lora)
        batch = pack(ROWS["alone"])
        computed = computed_bytes(policy, batch, on_gpu=False, half=False, checkpointing=False)
        assert computed == pytest.approx(kept_bytes(policy, batch), rel=0.15)
