"""Compute the KL divergence of two models' next-token distributions, from hidden states, without holding all logits.

Logits of both models exist for one chunk of tokens at a time, in the forward and, computed again, in the backward pass.

Shapes: N tokens, V vocabulary, C and D hidden sizes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlqwen.packing.logprobs import scaled_logits


def chunked_kl(
    hidden_NC: Tensor,
    head_VC: Tensor,
    other_hidden_ND: Tensor,
    other_head_VD: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """Return (N,) KL(p || q) in nats, float32: p and q are the softmaxes of the two sides' logits over the vocabulary.

    With gradient for `hidden_NC` and `head_VC`; the other side is a constant. If one head has more rows (padding of the
    vocabulary), only rows that both have count.
    """
    size = min(len(head_VC), len(other_head_VD))
    arguments = (hidden_NC, head_VC, other_hidden_ND, other_head_VD, size, temperature, chunk_size)
    return _ChunkedKL.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        other_hidden: Tensor,
        other_head: Tensor,
        size: int,
        temperature: float,
        chunk_size: int,
    ) -> Tensor:
        kl = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            log_p = _log_probs(hidden[part], head, size, temperature)
            log_q = _log_probs(other_hidden[part], other_head, size, temperature)
            kl[part] = (log_p.exp() * (log_p - log_q)).sum(-1)
        ctx.save_for_backward(hidden, head, other_hidden, other_head, kl)
        ctx.size, ctx.temperature, ctx.chunk_size = size, temperature, chunk_size
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, other_hidden, other_head, kl = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        weight = head[: ctx.size].to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            log_p = _log_probs(hidden[part], head, ctx.size, ctx.temperature)
            log_q = _log_probs(other_hidden[part], other_head, ctx.size, ctx.temperature)
            # d KL / d logits = p * (log p - log q - KL)
            grad = log_p.exp() * (log_p - log_q - kl[part, None]) * grad_kl[part, None]
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_head is not None:
                grad_head[: ctx.size] += grad.T @ hidden[part]
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None, None, None


def _log_probs(hidden: Tensor, head: Tensor, size: int, temperature: float) -> Tensor:
    """Return (n, size) float32 log-probabilities."""
    return scaled_logits(hidden, head[:size].to(hidden.dtype), temperature).log_softmax(-1)
