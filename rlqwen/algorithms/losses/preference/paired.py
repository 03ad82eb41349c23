"""Losses of pairs: each takes B chosen and B rejected answers and gives (B,) losses.

With h = beta * (s_chosen - s_rejected), where s is an answer's score: the log-ratio of policy and reference, r, or what
an f-divergence makes of it; sigma is the logistic function.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlqwen.algorithms.losses.preference.answers import Answers
from rlqwen.config import DPOConfig

PairLoss = Callable[[Answers, Answers, DPOConfig], Tensor]


def score(answers: Answers, config: DPOConfig) -> Tensor:
    """(B,) f'(t) of t = policy / reference, up to a constant (f-DPO, arXiv 2309.16240).

    reverse_kl: log t; forward_kl: 1 - 1/t; js_divergence: log(2t / (t + 1)); alpha_divergence:
    (t^(alpha - 1) - 1) / (alpha - 1), whose limit at alpha = 1 is log t.
    """
    log_t = answers.log_ratio_S
    if config.f_divergence_type == "forward_kl":
        return -torch.expm1(-log_t)
    if config.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(log_t)
    power = config.f_alpha_divergence_coef - 1
    if config.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        # Beyond exp(80) float32 ends.
        return torch.expm1((power * log_t).clamp(max=80.0)) / power
    return log_t


def sigmoid(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-log sigma(h) (DPO, arXiv 2305.18290); with label smoothing conservative DPO (ericmitchell.ai/cdpo.pdf)."""
    return _logistic(_margin(chosen, rejected, config), config)


def sigmoid_norm(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """The same with scores divided by the answers' lengths (Tulu 3, arXiv 2411.15124)."""
    return _logistic(config.beta * (_mean_score(chosen, config) - _mean_score(rejected, config)), config)


def hinge(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """max(0, 1 - h) (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return torch.relu(1 - _margin(chosen, rejected, config))


def ipo(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """(difference of scores a token - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17; a token, as its authors mean it)."""
    difference = _mean_score(chosen, config) - _mean_score(rejected, config)
    return (difference - 1 / (2 * config.beta)).square()


def robust(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """Unbiased under labels that are flipped with probability e (arXiv 2403.00409):
    (-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2e)."""
    margin, flipped = _margin(chosen, rejected, config), config.label_smoothing
    return (flipped * F.logsigmoid(-margin) - (1 - flipped) * F.logsigmoid(margin)) / (1 - 2 * flipped)


def exo_pair(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """KL((sigma(h), sigma(-h)) || (1 - e, e)), e the label smoothing (EXO, arXiv 2402.00856, eq. 16)."""
    margin, flipped = _margin(chosen, rejected, config), config.label_smoothing
    win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-flipped))
    return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(flipped))


def nca_pair(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-log sigma(beta r_c) - (log sigma(-beta r_c) + log sigma(-beta r_r)) / 2 (NCA, arXiv 2402.05369)."""
    good, bad = config.beta * chosen.log_ratio_S, config.beta * rejected.log_ratio_S
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def bco_pair(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-log sigma(beta r_c) - log sigma(-beta r_r) (BCO, arXiv 2404.04656, without its running reward shift, as TRL)."""
    return -F.logsigmoid(config.beta * chosen.log_ratio_S) - F.logsigmoid(-config.beta * rejected.log_ratio_S)


def sppo_hard(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """(r_c - 1 / (2 beta))^2 + (r_r + 1 / (2 beta))^2 (SPPO, arXiv 2405.00675, eq. 4.7 with certain wins)."""
    target = 0.5 / config.beta
    return (chosen.log_ratio_S - target).square() + (rejected.log_ratio_S + target).square()


def aot(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-log sigma(beta d), d the sorted policy margins less the sorted reference margins (AOT, arXiv 2406.05882).

    It asks for stochastic dominance of the policy's margins over the reference's: all pairs must be there at once.
    """
    ours = (chosen.logp_S - rejected.logp_S).sort().values
    theirs = (chosen.ref_logp_S - rejected.ref_logp_S).sort().values
    return _logistic(config.beta * (ours - theirs), config)


def aot_unpaired(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-log sigma(beta d), d the sorted r_c less the sorted r_r (AOT unpaired, arXiv 2406.05882)."""
    return _logistic(config.beta * (chosen.log_ratio_S.sort().values - rejected.log_ratio_S.sort().values), config)


def apo_zero(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """1 - sigma(beta r_c) + sigma(beta r_r): for answers better than the model's own (APO, arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-config.beta * chosen.log_ratio_S) + torch.sigmoid(config.beta * rejected.log_ratio_S)


def apo_down(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """sigma(beta r_c) + 1 - sigma(beta (r_c - r_r)): for answers worse than the model's own (APO, eq. 8)."""
    difference = chosen.log_ratio_S - rejected.log_ratio_S
    return torch.sigmoid(config.beta * chosen.log_ratio_S) + torch.sigmoid(-config.beta * difference)


def discopop(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-(1 - m) log sigma(h) + m exp(-h), m = sigma(h / tau) (DiscoPOP, arXiv 2406.08414, eq. 5)."""
    margin = _margin(chosen, rejected, config)
    mix = margin / config.discopop_tau
    # One exponential for m exp(-h): apart, exp(-h) overflows where m vanishes.
    return -torch.sigmoid(-mix) * F.logsigmoid(margin) + torch.exp(F.logsigmoid(mix) - margin)


def simpo(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-log sigma(beta (log-probability a token, chosen less rejected) - gamma) (SimPO, arXiv 2405.14734)."""
    return _logistic(config.beta * (chosen.mean_logp_S - rejected.mean_logp_S) - config.simpo_gamma, config)


def cpo(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-log sigma(beta (log-probability, chosen less rejected)) (CPO, arXiv 2401.08417); the whole loss adds
    cpo_alpha * negative log-likelihood of the chosen answers."""
    return _logistic(config.beta * (chosen.plain_logp_S - rejected.plain_logp_S), config)


def orpo(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """-beta log sigma(log-odds, chosen less rejected), p the geometric mean of an answer's tokens (ORPO,
    arXiv 2403.07691, eqs. 4 and 7); the whole loss adds the negative log-likelihood of the chosen answers."""
    return -config.beta * F.logsigmoid(_log_odds(chosen.mean_logp_S) - _log_odds(rejected.mean_logp_S))


PAIR_LOSSES: dict[str, PairLoss] = {
    function.__name__: function
    for function in (
        sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero,
        apo_down, discopop, simpo, cpo, orpo,
    )
}  # fmt: skip


def _margin(chosen: Answers, rejected: Answers, config: DPOConfig) -> Tensor:
    """h of the module's docstring."""
    return config.beta * (score(chosen, config) - score(rejected, config))


def _mean_score(answers: Answers, config: DPOConfig) -> Tensor:
    return score(answers, config) / answers.lengths_S.clamp(min=1)


def _logistic(margin: Tensor, config: DPOConfig) -> Tensor:
    """-log sigma(margin), where a share of the labels is taken to be flipped."""
    flipped = config.label_smoothing
    loss = -F.logsigmoid(margin)
    return loss if not flipped else (1 - flipped) * loss - flipped * F.logsigmoid(-margin)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p))."""
    logp = logp.clamp(max=-1e-7)  # p = 1 has infinite odds
    return logp - torch.where(logp > -math.log(2), (-torch.expm1(logp)).log(), torch.log1p(-logp.exp()))
