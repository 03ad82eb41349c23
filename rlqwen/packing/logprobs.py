"""Compute log-probabilities and entropies of target tokens from hidden states, without ever holding all logits.

Logits exist for one chunk of tokens at a time, in the forward and, computed again, in the backward pass: memory is
chunk x V instead of N x V, for one more matrix product with the head. On a GPU the chunks are read by TRL's Triton
kernels, once each.

Shapes: N tokens, V vocabulary, C hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils.import_utils import is_triton_available

VOCABULARY_CHUNK = 8192
"""Columns of the head whose logits TRL's kernels hold at a time, of 4,096 tokens."""


def chunked_logprobs(
    hidden_NC: Tensor,
    head_VC: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(hidden @ head.T / temperature)[target] and, if asked, the entropy of that softmax.

    Args:
        hidden_NC: (N, C) hidden states that predict the targets; the product is taken in their dtype.
        head_VC: (V, C) weight of the language-model head.
        target_N: (N,) token ids.
        temperature: divides the logits.
        chunk_size: tokens whose logits exist at a time; TRL's kernels, which cut the vocabulary too, have their own.
        entropy: whether to compute entropies.

    Returns:
        (N,) logprobs in nats and (N,) entropies in nats or None; float32, both differentiable.
    """
    if _has_kernels(hidden_NC, head_VC):
        return kernel_logprobs(hidden_NC, head_VC, target_N, temperature=temperature, entropy=entropy)
    arguments = (hidden_NC, head_VC, target_N, temperature, chunk_size, entropy)
    logp_N, entropy_N = _ChunkedLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
    return logp_N, entropy_N if entropy else None


def kernel_logprobs(
    hidden_NC: Tensor, head_VC: Tensor, target_N: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Do what `chunked_logprobs` does by TRL's kernels, which run in plain torch where there is no Triton."""
    from trl.kernels import ChunkedLogProbFunction  # imports Triton

    outputs = ("entropy",) if entropy else ()
    softcap, logit_scale = None, 1.0
    arguments = (hidden_NC, head_VC, None, target_N, temperature, VOCABULARY_CHUNK, softcap, logit_scale, outputs)
    logp_N, entropy_N, *_ = ChunkedLogProbFunction.apply(*arguments)  # type: ignore[no-untyped-call]
    return logp_N, entropy_N


def _has_kernels(hidden_NC: Tensor, head_VC: Tensor) -> bool:
    """Return whether TRL's kernels take these; a head that ZeRO-3 shards is gathered for our own function alone."""
    return hidden_NC.is_cuda and hidden_NC.dtype != torch.float64 and is_triton_available() and not _is_shard(head_VC)


def _is_shard(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id")


@torch.no_grad()
def chunked_log_sum_sq_probs(hidden_NC: Tensor, head_VC: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Return (N,) float32 log of the sum over the vocabulary of p^2, p the softmax of hidden @ head.T; no gradient.

    This is the log-probability that two samples of the same distribution are equal.
    """
    weight = head_VC.to(hidden_NC.dtype)
    parts = []
    for hidden in hidden_NC.split(chunk_size):
        logits = scaled_logits(hidden, weight, 1.0)
        parts.append((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1))
    return torch.cat(parts)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target: Tensor, temperature: float, chunk_size: int, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden.shape[0]
        logp = hidden.new_empty(num_tokens, dtype=torch.float32)
        log_norm = torch.empty_like(logp)
        entropies = torch.empty_like(logp) if entropy else logp.new_empty(0)
        weight = head.to(hidden.dtype)
        for start in range(0, num_tokens, chunk_size):
            part = slice(start, start + chunk_size)
            logits = scaled_logits(hidden[part], weight, temperature)
            log_norm[part] = logits.logsumexp(-1)
            logp[part] = logits.gather(1, target[part, None])[:, 0] - log_norm[part]
            if entropy:
                probs = torch.exp(logits - log_norm[part, None])
                entropies[part] = log_norm[part] - (probs * logits).sum(-1)
        ctx.save_for_backward(hidden, head, target, log_norm, entropies)
        ctx.temperature, ctx.chunk_size, ctx.entropy = temperature, chunk_size, entropy
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, head, target, log_norm, entropies = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        weight = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            log_probs = scaled_logits(hidden[part], weight, ctx.temperature).sub_(log_norm[part, None])
            probs = log_probs.exp()
            # d logp[target] / d logits = onehot(target) - probs;  d entropy / d logits = -probs * (log probs + entropy)
            grad = torch.zeros_like(probs)
            if grad_logp is not None:
                grad.addcmul_(probs, grad_logp[part, None], value=-1.0)
                grad.scatter_add_(1, target[part, None], grad_logp[part, None])
            if ctx.entropy and grad_entropy is not None:
                grad.addcmul_(probs * (log_probs + entropies[part, None]), grad_entropy[part, None], value=-1.0)
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_head is not None:
                grad_head += grad.T @ hidden[part]
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None, None


def scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return (n, V) float32 logits divided by the temperature."""
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
