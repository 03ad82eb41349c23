"""Attend over a packed row by two calls of a variable-length kernel: no mask, no padding, memory in O(T).

A row is a run of segments that lie one after another: a prefix, its branches, the next prefix, and so on. Attention of
a query is split in two:

- own: each segment attends causally to itself, one call over the row as it lies;
- cross: the branches of a prefix attend to all of it, one call over the branch tokens.

With o the outputs and l the log-sum-exp of the scores of both, the whole is (e^l_own o_own + e^l_cross o_cross) /
(e^l_own + e^l_cross). The kernel's backward computes dS = P * (dO V^T - rowsum(dO * O)) with P = exp(S - l), so that
calling it for each part with the merged output and log-sum-exp gives exactly that part's share of the gradients, as in
ring attention (arXiv 2310.01889).

Shapes: T tokens in the row; Q tokens of branches that have a prefix, P tokens of prefixes that have a branch; H heads of
width D.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlqwen.packing.row_layout import Layout, Span, send

MAX_HEAD_DIM = 256
"""The widest head of PyTorch's flash kernels, whose widths are multiples of 8."""


_NO_ROWS = np.zeros(0, dtype=np.int64)


class Runs(NamedTuple):
    """Runs of tokens that lie one after another."""

    ends: Tensor
    """(runs + 1,) int32: 0, and where each run ends."""
    longest: int
    """Tokens of the longest run."""


class Call(NamedTuple):
    """What a call of the kernel computes: run i of the queries attends to run i of the keys."""

    queries: Runs
    keys: Runs
    causal: bool

    @property
    def limits(self) -> tuple[Tensor, Tensor, int, int]:
        """Return the ends and longest runs of both sides, in the kernel's order."""
        return self.queries.ends, self.keys.ends, self.queries.longest, self.keys.longest


@dataclass(slots=True, frozen=True)
class CascadePlan:
    """Hold the arguments of the two calls for a layout, on its device."""

    own: Runs
    """Every segment of the row."""
    queries: Runs
    """For each prefix, the tokens of its branches."""
    prefixes: Runs
    """For each prefix, its own tokens."""
    query_rows_Q: Tensor
    """(Q,) long: where in the row the tokens of `queries` lie; no row twice."""
    prefix_rows_P: Tensor
    """(P,) long: where in the row the tokens of `prefixes` lie; no row twice."""

    @classmethod
    def build(cls, layout: Layout) -> "CascadePlan":
        """Plan the calls for `layout`; one copy to its device."""
        branches: dict[tuple[int, int], list[Span]] = {}
        cuts = {0}
        for span in layout.spans:
            cuts |= set(span)
            if span.prefix_length and span.length:
                branches.setdefault((span.prefix_start, span.prefix_end), []).append(span)
        ends = sorted(cuts)
        query_lengths = [sum(span.length for span in spans) for spans in branches.values()]
        prefix_lengths = [end - start for start, end in branches]
        query_rows = [np.arange(span.start, span.end) for spans in branches.values() for span in spans]
        prefix_rows = [np.arange(start, end) for start, end in branches]
        parts = [
            np.array(ends),
            np.cumsum([0, *query_lengths]),
            np.cumsum([0, *prefix_lengths]),
            np.concatenate([_NO_ROWS, *query_rows]),
            np.concatenate([_NO_ROWS, *prefix_rows]),
        ]
        values = send(torch.from_numpy(np.concatenate(parts)), layout.device)
        own, queries, prefixes, query_rows_Q, prefix_rows_P = values.split([len(part) for part in parts])
        return cls(
            Runs(own.int(), max(end - start for start, end in itertools.pairwise(ends))),
            Runs(queries.int(), max(query_lengths, default=0)),
            Runs(prefixes.int(), max(prefix_lengths, default=0)),
            query_rows_Q,
            prefix_rows_P,
        )

    @property
    def own_call(self) -> Call:
        """Return the call in which each segment attends causally to itself."""
        return Call(self.own, self.own, causal=True)

    @property
    def cross_call(self) -> Call:
        """Return the call in which branches attend to all of their prefix."""
        return Call(self.queries, self.prefixes, causal=False)


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
    """Return whether FlashAttention computes these: half precision, on a GPU from Ampere on, heads of one fitting width."""
    width = query_THD.shape[-1]
    return (
        query_THD.is_cuda
        and query_THD.dtype in (torch.bfloat16, torch.float16)
        and width == value_TKD.shape[-1]
        and width % 8 == 0
        and width <= MAX_HEAD_DIM
        and _is_ampere(query_THD.device)
    )


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: CascadePlan, scale: float, kernel: FlashKernel
    ) -> Tensor:
        out, lse = kernel.forward(query, key, value, plan.own_call, scale)
        if plan.queries.longest:
            rows_Q, rows_P = plan.query_rows_Q, plan.prefix_rows_P
            picked = (query.index_select(0, rows_Q), key.index_select(0, rows_P), value.index_select(0, rows_P))
            cross, lse_cross = kernel.forward(*picked, plan.cross_call, scale)
            own, lse_own = out.index_select(0, rows_Q), lse.index_select(1, rows_Q)
            share = torch.sigmoid(lse_cross - lse_own).T[..., None]
            merged = torch.lerp(own.to(share.dtype), cross.to(share.dtype), share).to(out.dtype)
            out = out.index_copy(0, rows_Q, merged)
            lse = lse.index_copy(1, rows_Q, torch.logaddexp(lse_own, lse_cross))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale, ctx.kernel = plan, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        plan, scale, kernel = ctx.plan, ctx.scale, ctx.kernel
        grad = grad.contiguous()
        gradients = kernel.backward(grad, query, key, value, out, lse, plan.own_call, scale)
        if plan.queries.longest:
            rows_Q, rows_P = plan.query_rows_Q, plan.prefix_rows_P
            cross = kernel.backward(
                grad.index_select(0, rows_Q),
                query.index_select(0, rows_Q),
                key.index_select(0, rows_P),
                value.index_select(0, rows_P),
                out.index_select(0, rows_Q),
                lse.index_select(1, rows_Q),
                plan.cross_call,
                scale,
            )
            for whole, part, rows in zip(gradients, cross, (rows_Q, rows_P, rows_P), strict=True):
                # No row is named twice, so that adding needs no atomics, and gives the same bits every time.
                whole.index_copy_(0, rows, whole.index_select(0, rows).add_(part))
        return (*gradients, None, None, None)
