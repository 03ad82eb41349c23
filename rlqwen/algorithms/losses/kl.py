"""Estimate the KL divergence from samples of the policy."""

from collections.abc import Callable

import torch
from torch import Tensor


def kl_divergence(logp_N: Tensor, ref_logp_N: Tensor, estimator: str) -> Tensor:
    """Return (N,) estimates of KL(policy || reference) from samples of the policy (http://joschu.net/blog/kl-approx.html).

    With d = logp - ref_logp: k1 = d (unbiased, noisy), k2 = d^2 / 2 (its gradient is that of the KL),
    k3 = exp(-d) - 1 + d (unbiased and never negative).
    """
    return _KL_ESTIMATORS[estimator](logp_N - ref_logp_N)


_KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}
