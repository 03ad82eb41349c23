"""Attend over a packed row by calls of a variable-length kernel: no mask, no padding, memory in O(T).

The row is cut into segments that form trees (rlqwen.packing.row_layout). Attention of a query is split in parts:

- own: each segment attends causally to itself, one call over the row as it lies;
- cross, for each depth of the trees: whatever continues a segment of this depth attends to all of it. One call for the
  prompts of groups, and one more for each level, such as a system prompt that they share.

With o the outputs and l the log-sum-exp of the scores of two parts, both together are (e^l1 o1 + e^l2 o2) /
(e^l1 + e^l2). The kernel's backward computes dS = P * (dO V^T - rowsum(dO * O)) with P = exp(S - l), so that calling it
for each part with the merged output and log-sum-exp gives exactly that part's share of the gradients, as in ring
attention (arXiv 2310.01889).

Shapes: T tokens in the row; Q tokens that attend, and P tokens that are attended to, in a cross call; H heads of width D.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlqwen.packing.row_layout import ROOT, Layout, send

MAX_HEAD_DIM = 256
"""The widest head of PyTorch's flash kernels, whose widths are multiples of 8."""


class Runs(NamedTuple):
    """Runs of tokens that lie one after another."""

    ends: Tensor
    """(runs + 1,) int32: 0, and where each run ends."""
    longest: int
    """Tokens of the longest run."""


class Call(NamedTuple):
    """Name the runs of a call of the kernel, in which run i of the queries attends to run i of the keys."""

    queries: Runs
    keys: Runs
    causal: bool

    @property
    def limits(self) -> tuple[Tensor, Tensor, int, int]:
        """Return the ends and longest runs of both sides, in the kernel's order."""
        return self.queries.ends, self.keys.ends, self.queries.longest, self.keys.longest


class Cross(NamedTuple):
    """A call in which tokens attend to all of a segment that they continue."""

    query_rows_Q: Tensor
    """(Q,) long: where in the row the tokens lie that attend; no row twice."""
    key_rows_P: Tensor
    """(P,) long: where in the row the segments lie; no row twice."""
    call: Call


@dataclass(slots=True, frozen=True)
class CascadePlan:
    """Hold the arguments of the calls for a layout, on its device."""

    own: Call
    """Every segment of the row attends to itself."""
    crosses: tuple[Cross, ...]
    """For each depth from 0 at which there are segments that others continue, what continues them attends to them."""

    @classmethod
    def build(cls, layout: Layout) -> "CascadePlan":
        """Plan the calls for `layout`; one copy to its device."""
        segments, subtree_ends = layout.segments, layout.subtree_ends()
        parents = sorted({segment.parent for segment in segments} - {ROOT})
        levels = [
            [number for number in parents if layout.depths[number] == depth]
            for depth in range(max((layout.depths[number] + 1 for number in parents), default=0))
        ]
        runs = [[(segment.start, segment.end) for segment in segments]]
        for numbers in levels:
            runs.append([(segments[number].end, subtree_ends[number]) for number in numbers])
            runs.append([(segments[number].start, segments[number].end) for number in numbers])
        ends = [np.cumsum([0, *(end - start for start, end in run)]) for run in runs]
        rows = [np.concatenate([np.arange(start, end) for start, end in run]) for run in runs[1:]]
        values = send(torch.from_numpy(np.concatenate([*ends, *rows])), layout.device)
        on_device = values.split([len(part) for part in (*ends, *rows)])
        own, *sides = (
            Runs(part.int(), max(end - start for start, end in run)) for part, run in zip(on_device, runs, strict=False)
        )
        rows_of = on_device[len(runs) :]
        crosses = (
            Cross(rows_of[i], rows_of[i + 1], Call(sides[i], sides[i + 1], causal=False))
            for i in range(0, len(sides), 2)
        )
        return cls(Call(own, own, causal=True), tuple(crosses))


class FlashKernel:
    """FlashAttention over runs of queries and keys, as PyTorch ships it.

    It is FA2, or FA3 if `torch.nn.attention.activate_flash_attention_impl` chose it.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
        """Return the (Q, H, D) output and the (H, Q) float32 log-sum-exp of the scores."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *call.limits, 0.0, call.causal, False, scale=scale
        )
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
        """Return the gradients of query, key and value."""
        unused = (torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device))
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, *call.limits, 0.0, call.causal, *unused, scale=scale
        )
        return gradients


def cascade_attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    kernel: FlashKernel | None = None,
) -> Tensor:
    """Return (T, H, D): each query's attention over its sequence, its prefix included, up to itself; differentiable.

    Args:
        query_THD: (T, H, D) queries in half precision.
        key_TKD: (T, H_kv, D) keys; H is a multiple of H_kv.
        value_TKD: (T, H_kv, D) values.
        scaling: factor of the scores; None: D ** -0.5.
        kernel: computes the parts; None: FlashAttention, on CUDA.
    """
    plan = layout.compute_once("cascade", CascadePlan.build)
    scale = query_THD.shape[-1] ** -0.5 if scaling is None else scaling
    tensors = (query_THD.contiguous(), key_TKD.contiguous(), value_TKD.contiguous())
    attended: Tensor = _Cascade.apply(*tensors, plan, scale, kernel or FlashKernel())  # type: ignore[no-untyped-call]
    return attended


def has_flash_kernel(query_THD: Tensor, value_TKD: Tensor) -> bool:
    """Return whether FlashAttention computes these, which must be of one width."""
    width = query_THD.shape[-1]
    return width == value_TKD.shape[-1] and supports_flash(query_THD.device, query_THD.dtype, width)


def supports_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether FlashAttention runs: in half precision, on a GPU from Ampere on, with heads of a fitting width."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= MAX_HEAD_DIM
        and _is_ampere(device)
    )


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: CascadePlan, scale: float, kernel: FlashKernel
    ) -> Tensor:
        out, lse = kernel.forward(query, key, value, plan.own, scale)
        for rows_Q, rows_P, call in plan.crosses:
            picked = (query.index_select(0, rows_Q), key.index_select(0, rows_P), value.index_select(0, rows_P))
            cross, lse_cross = kernel.forward(*picked, call, scale)
            before, lse_before = out.index_select(0, rows_Q), lse.index_select(1, rows_Q)
            share = torch.sigmoid(lse_cross - lse_before).T[..., None]
            merged = torch.lerp(before.to(share.dtype), cross.to(share.dtype), share).to(out.dtype)
            out = out.index_copy(0, rows_Q, merged)
            lse = lse.index_copy(1, rows_Q, torch.logaddexp(lse_before, lse_cross))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale, ctx.kernel = plan, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        plan, scale, kernel = ctx.plan, ctx.scale, ctx.kernel
        grad = grad.contiguous()
        gradients = kernel.backward(grad, query, key, value, out, lse, plan.own, scale)
        for rows_Q, rows_P, call in plan.crosses:
            cross = kernel.backward(
                grad.index_select(0, rows_Q),
                query.index_select(0, rows_Q),
                key.index_select(0, rows_P),
                value.index_select(0, rows_P),
                out.index_select(0, rows_Q),
                lse.index_select(1, rows_Q),
                call,
                scale,
            )
            for whole, part, rows in zip(gradients, cross, (rows_Q, rows_P, rows_P), strict=True):
                # No row is named twice, so that adding needs no atomics, and gives the same bits every time.
                whole.index_copy_(0, rows, whole.index_select(0, rows).add_(part))
        return (*gradients, None, None, None)
