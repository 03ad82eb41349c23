"""Truncate a distribution by top-k, top-p and min-p: for sampling, and to compare the trainer with the sampler.

The sampler's logprobs are those of the truncated and renormalized distribution: log p(token) - log(probability of all
kept tokens). The trainer's are those of the whole one. Their ratio would shrink with every token although both have the
same weights, so the trainer subtracts the same term from its own (`chunked_log_kept`).

Ties at the edge are cut so that exactly k tokens stay, or the fewest that reach top-p, as in vLLM on GPUs. On a CPU
vLLM keeps the ties of the k-th token (`Truncation.keeps_ties`); bfloat16 has many, and
ignoring them would give every token a gap.

Shapes: N tokens, V vocabulary, C hidden size, K the likeliest tokens.
"""

import torch
from torch import Tensor

from rlqwen.packing.logprobs import scaled_logits
from rlqwen.types import Truncation

LIKELY = 1024
"""Tokens to sort first: few distributions need more, and sorting a whole vocabulary costs more than the head."""


@torch.no_grad()
def chunked_log_kept(
    hidden_NC: Tensor,
    head_VC: Tensor,
    target_N: Tensor,
    truncation: Truncation,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """Return (N,) float32 log of the probability that the truncation keeps, no gradient; see `log_kept`.

    Args:
        hidden_NC: (N, C) hidden states that predict the targets.
        head_VC: (V, C) weight of the language-model head.
        target_N: (N,) token ids.
    """
    weight = head_VC.to(hidden_NC.dtype)
    parts = [
        log_kept(scaled_logits(hidden, weight, temperature), target, truncation)
        for hidden, target in zip(hidden_NC.split(chunk_size), target_N.split(chunk_size), strict=True)
    ]
    return torch.cat(parts) if parts else hidden_NC.new_zeros(0, dtype=torch.float32)


def log_kept(logits_NV: Tensor, target_N: Tensor, truncation: Truncation) -> Tensor:
    """Return (N,) log of the probability of the kept tokens; the target always counts as kept.

    The sampler drew the target, so it had kept it. Even if rounding or older weights put it just beyond the cutoff,
    it counts as kept: otherwise a single token would make the ratio of a whole completion infinite.
    """
    probs_NV = logits_NV.softmax(-1)
    own_N = probs_NV.gather(1, target_N[:, None])[:, 0]
    mass_N, least_N = _kept_mass(probs_NV, truncation, _first_width(probs_NV, truncation))
    return (mass_N + own_N.masked_fill(own_N >= least_N, 0.0)).log()


def truncated(logits_BV: Tensor, truncation: Truncation) -> Tensor:
    """Return the logits with -inf for every token that is not kept."""
    ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = ordered_BV.softmax(-1)
    kept_BV = _is_kept(probs_BV[:, : truncation.top_k or None], probs_BV, truncation)
    kept_BV = torch.nn.functional.pad(kept_BV, (0, probs_BV.shape[1] - kept_BV.shape[1]))
    return logits_BV.masked_fill(~torch.zeros_like(kept_BV).scatter(1, order_BV, kept_BV), -torch.inf)


def _first_width(probs_NV: Tensor, truncation: Truncation) -> int:
    """Return how many of the likeliest tokens to sort: all that `top_k` may keep, else usually enough."""
    width = min(truncation.top_k or LIKELY, probs_NV.shape[1])
    if not (truncation.top_k and truncation.keeps_ties):
        return width
    edge_N1 = probs_NV.topk(width).values[:, -1:]
    return int((probs_NV >= edge_N1).sum(1).amax())


def _kept_mass(probs_NV: Tensor, truncation: Truncation, width: int) -> tuple[Tensor, Tensor]:
    """Return (N,) probability of all kept tokens, and (N,) probability of the least likely of them."""
    ordered_NK = probs_NV.topk(width).values
    kept_NK = _is_kept(ordered_NK, probs_NV, truncation)
    mass_N = ordered_NK.masked_fill(~kept_NK, 0.0).sum(1)
    least_N = ordered_NK.masked_fill(~kept_NK, torch.inf).amin(1)
    if not truncation.top_k and width < probs_NV.shape[1]:
        more_N = kept_NK[:, -1]  # the next token may be kept as well
        if more_N.any():
            mass_N[more_N], least_N[more_N] = _kept_mass(probs_NV[more_N], truncation, probs_NV.shape[1])
    return mass_N, least_N


def _is_kept(ordered_NK: Tensor, probs_NV: Tensor, truncation: Truncation) -> Tensor:
    """Return (N, K) bool: whether each of the K likeliest tokens stays: min-p, then top-k, then top-p of the rest.

    Without `top_k`, top-p is a share of all that min-p leaves of `probs_NV`.
    """
    floor_N1 = truncation.min_p * ordered_NK[:, :1]
    if truncation.top_k and truncation.keeps_ties:
        floor_N1 = floor_N1.maximum(ordered_NK[:, : truncation.top_k][:, -1:])
    kept_NK = ordered_NK >= floor_N1
    if truncation.top_p < 1:
        candidates_NK = ordered_NK.masked_fill(~kept_NK, 0.0)
        if truncation.top_k:
            total_N1 = candidates_NK.sum(1, keepdim=True)
        else:
            total_N1 = probs_NV.masked_fill(probs_NV < floor_N1, 0.0).sum(1, keepdim=True)
        likelier_NK = candidates_NK.cumsum(1) - candidates_NK
        kept_NK &= likelier_NK < truncation.top_p * total_N1
        kept_NK[:, 0] = True
    return kept_NK
