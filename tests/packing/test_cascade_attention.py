"""Compare the attention of variable-length calls with padded blocks: outputs and gradients."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from rlqwen.packing.attention import attention_note
from rlqwen.packing.block_attention import attend_in_blocks
from rlqwen.packing.cascade_attention import Call, CascadePlan, FlashKernel, Runs, cascade_attention, has_flash_kernel
from rlqwen.packing.row_layout import ROOT, Layout, Segment

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class PlainKernel(FlashKernel):
    """Compute in plain torch what FlashKernel computes, on any device and in any dtype."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(query)
        lse = query.new_zeros(query.shape[1], query.shape[0])
        for rows, columns in pairs(call.queries, call.keys):
            scores = scores_of(query[rows], key[columns], call.causal, scale)
            lse[:, rows] = scores.logsumexp(-1)
            probs = (scores - lse[:, rows, None]).exp()
            out[rows] = torch.einsum("hqk,khd->qhd", probs, repeated(value[columns], query))
        return out, lse

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        call: Call,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        delta = (grad * out).sum(-1).T
        for rows, columns in pairs(call.queries, call.keys):
            probs = (scores_of(query[rows], key[columns], call.causal, scale) - lse[:, rows, None]).exp()
            value_grad = torch.einsum("hqk,qhd->khd", probs, grad[rows])
            d_probs = torch.einsum("qhd,khd->hqk", grad[rows], repeated(value[columns], query))
            d_scores = probs * (d_probs - delta[:, rows, None]) * scale
            gradients[0][rows] += torch.einsum("hqk,khd->qhd", d_scores, repeated(key[columns], query))
            gradients[1][columns] += summed(torch.einsum("hqk,qhd->khd", d_scores, query[rows]), key)
            gradients[2][columns] += summed(value_grad, value)
        return gradients


def pairs(queries: Runs, keys: Runs) -> Iterator[tuple[slice, slice]]:
    query_ends, key_ends = queries.ends.tolist(), keys.ends.tolist()
    for i in range(len(query_ends) - 1):
        yield slice(query_ends[i], query_ends[i + 1]), slice(key_ends[i], key_ends[i + 1])


def repeated(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def summed(tensor: Tensor, like: Tensor) -> Tensor:
    total: Tensor = tensor.unflatten(1, (like.shape[1], -1)).sum(2)
    return total


def scores_of(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, repeated(key, query)) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return scores


def random_layout(seed: int) -> Layout:
    """Return a layout of trees up to 4 levels deep, of segments of 1 to 33 tokens."""
    rng = random.Random(seed)
    segments: list[Segment] = []

    def add(parent: int, levels: int) -> None:
        start = segments[-1].end if segments else 0
        number = len(segments)
        segments.append(Segment(start, start + rng.choice([1, 2, 7, 19, 33]), parent))
        for _ in range(rng.randint(0, 3) if levels > 1 else 0):
            add(number, levels - 1)

    for _ in range(rng.randint(1, 4)):
        add(ROOT, rng.randint(1, 4))
    return Layout(segments)


def inputs(
    layout: Layout, dtype: torch.dtype, device: str = "cpu", heads: tuple[int, int] = (4, 2), width: int = 8
) -> list[Tensor]:
    shapes = [(layout.num_tokens, count, width) for count in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(*shape, dtype=dtype, device=device) for shape in shapes]


def outputs_and_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: Tensor,
) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = attend(leaves[0], leaves[1], leaves[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("seed", range(30))
def test_calls_for_each_depth_equal_padded_blocks(seed: int) -> None:
    layout = random_layout(seed)
    tensors = inputs(layout, torch.float64)
    ours = outputs_and_gradients(lambda q, k, v: cascade_attention(q, k, v, layout, kernel=PlainKernel()), *tensors)
    blocks = outputs_and_gradients(lambda q, k, v: attend_in_blocks(q, k, v, layout), *tensors)
    for one, other in zip(ours, blocks, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_the_gradient_is_that_of_the_output() -> None:
    layout = Layout([Segment(0, 3), Segment(3, 6, 0), Segment(6, 8, 1), Segment(8, 10, 0), Segment(10, 13)])
    leaves = [tensor.requires_grad_() for tensor in inputs(layout, torch.float64, heads=(2, 1), width=4)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: cascade_attention(q, k, v, layout, kernel=PlainKernel()), leaves)


def test_a_plan_names_segments_and_the_rows_of_shared_prefixes() -> None:
    segments = [Segment(0, 2), Segment(2, 5, 0), Segment(5, 6, 1), Segment(6, 7, 0), Segment(7, 8), Segment(8, 10)]
    plan = CascadePlan.build(Layout(segments))
    assert plan.own.causal
    assert plan.own.queries.ends.tolist() == [0, 2, 5, 6, 7, 8, 10]
    assert plan.own.queries.longest == 3
    prompts, turns = plan.crosses
    assert prompts.query_rows_Q.tolist() == [2, 3, 4, 5, 6]
    assert prompts.key_rows_P.tolist() == [0, 1]
    assert (prompts.call.queries.ends.tolist(), prompts.call.keys.ends.tolist()) == ([0, 5], [0, 2])
    assert (turns.query_rows_Q.tolist(), turns.key_rows_P.tolist()) == ([5], [2, 3, 4])
    assert (turns.call.queries.longest, turns.call.keys.longest, turns.call.causal) == (1, 3, False)
    assert (plan.own.queries.ends.dtype, prompts.query_rows_Q.dtype) == (torch.int32, torch.long)


def test_a_row_without_prefixes_makes_one_call() -> None:
    layout = Layout([Segment(0, 4), Segment(4, 9)])

    class Once(PlainKernel):
        calls = 0

        def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
            assert call.causal
            self.calls += 1
            return super().forward(query, key, value, call, scale)

    kernel = Once()
    query, key, value, _ = inputs(layout, torch.float64)
    cascade_attention(query, key, value, layout, kernel=kernel)
    assert kernel.calls == 1


def test_flash_attention_is_not_used_on_a_cpu() -> None:
    query, _, value, _ = inputs(random_layout(0), torch.bfloat16)
    assert not has_flash_kernel(query, value)


@pytest.mark.parametrize(
    ("dtype", "width", "said"),
    [
        (torch.bfloat16, 128, "attention runs in FlashAttention's kernels for rows of many lengths (FA2)"),
        (torch.float32, 128, "padded blocks"),
        (torch.bfloat16, 512, "heads of width 512 on a GPU"),
    ],
)
def test_the_kernel_of_attention_is_named_on_a_gpu(
    dtype: torch.dtype, width: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlqwen.packing.cascade_attention._is_ampere", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    config = Qwen3Config(head_dim=width)
    assert said in str(attention_note(config, torch.device("cuda"), dtype))
    assert attention_note(config, torch.device("cpu"), dtype) is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [32, 128])
def test_flash_attention_equals_float32_blocks_up_to_rounding(seed: int, width: int) -> None:
    layout = random_layout(seed).to("cuda")
    exact = inputs(layout, torch.float32, "cuda", width=width)
    half = [tensor.bfloat16() for tensor in exact]
    ours = outputs_and_gradients(lambda q, k, v: cascade_attention(q, k, v, layout, kernel=FlashKernel()), *half)
    blocks = outputs_and_gradients(lambda q, k, v: attend_in_blocks(q, k, v, layout), *(t.float() for t in half))
    for one, other in zip(ours, blocks, strict=True):
        assert (one.float() - other).norm() <= 0.01 * other.norm() + 1e-6
