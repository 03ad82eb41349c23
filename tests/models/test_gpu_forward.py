"""Compare norms that run as one kernel with those of transformers."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from rlqwen.models.gpu_forward import is_plain_norm, speed_up_on_gpu, use_one_kernel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("norm", "is_plain"),
    [
        (Qwen3RMSNorm(16), True),
        (Qwen3NextRMSNorm(16), False),  # multiplies by 1 + weight
        (Gemma3RMSNorm(16), False),  # likewise
        (Qwen3NextRMSNormGated(16), False),
        (nn.LayerNorm(16), False),
        (nn.RMSNorm(16), False),  # is one kernel already
    ],
)
def test_only_a_norm_that_multiplies_by_its_weight_is_replaced(norm: nn.Module, is_plain: bool) -> None:
    assert is_plain_norm(norm) is is_plain


def test_a_model_on_a_cpu_is_left_alone() -> None:
    model = nn.Sequential(Qwen3RMSNorm(8))
    speed_up_on_gpu(model)  # type: ignore[arg-type]
    assert "forward" not in vars(model[0])


def test_a_replaced_norm_computes_as_before_on_a_cpu_and_can_be_copied() -> None:
    norm = Qwen3RMSNorm(8)
    nn.init.uniform_(norm.weight)
    x = torch.randn(3, 8)
    before = norm(x)
    use_one_kernel(norm)
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        norm.weight.zero_()
    torch.testing.assert_close(twin(x), before, atol=0, rtol=0)
    assert not norm(x).any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_norm_up_to_rounding(dtype: torch.dtype) -> None:
    norm = Qwen3RMSNorm(128).cuda()
    nn.init.uniform_(norm.weight)
    fused = copy.deepcopy(norm)
    use_one_kernel(fused)
    x = torch.randn(40, 128, device="cuda", dtype=dtype)
    results = []
    for module in (norm, fused):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = module(leaf)
        out.float().square().sum().backward()
        results.append((out.float(), leaf.grad, module.weight.grad))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).norm() <= 0.01 * other.float().norm()
