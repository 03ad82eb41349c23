"""Define losses of pairs: each takes B chosen and B rejected answers and returns (B,) losses.

A loss is called with those of these inputs that its signature names:

- `chosen`, `rejected`: `Answers`, which hold log-probabilities under policy and reference, lengths and weights.
- `chosen_score`, `rejected_score`: (B,) scores of the answers: the log-ratio of policy and reference, or `score` of it for
  another f-divergence.
- settings of the trainer's config, such as `beta`, and the recipe's `loss_args`.

In the formulas, r is the log-ratio and s the score of an answer (c: chosen, r: rejected), h = beta * (s_c - s_r), sigma is
the logistic function, and e is `label_smoothing`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlqwen.algorithms.losses.preference.answers import Answers


def score(answers: Answers, divergence: str, alpha: float) -> Tensor:
    """Return (B,) f'(t) of t = policy / reference, up to a constant (f-DPO, arXiv 2309.16240).

    reverse_kl: log t; forward_kl: 1 - 1/t; js_divergence: log(2t / (t + 1)); alpha_divergence:
    (t^(alpha - 1) - 1) / (alpha - 1), whose limit at alpha = 1 is log t.
    """
    log_t = answers.log_ratio_S
    if divergence == "forward_kl":
        return -torch.expm1(-log_t)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_t)
    power = alpha - 1
    if divergence == "alpha_divergence" and abs(power) >= 1e-6:
        # float32 overflows beyond exp(80).
        return torch.expm1((power * log_t).clamp(max=80.0)) / power
    return log_t


def sigmoid(chosen_score: Tensor, rejected_score: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return -log sigma(h) (DPO, arXiv 2305.18290); with label smoothing, conservative DPO (ericmitchell.ai/cdpo.pdf)."""
    return _logistic(beta * (chosen_score - rejected_score), label_smoothing)


def sigmoid_norm(
    chosen: Answers,
    rejected: Answers,
    chosen_score: Tensor,
    rejected_score: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Return DPO's loss of scores divided by the answers' lengths (Tulu 3, arXiv 2411.15124)."""
    gap = _per_token(chosen_score, chosen) - _per_token(rejected_score, rejected)
    return _logistic(beta * gap, label_smoothing)


def hinge(chosen_score: Tensor, rejected_score: Tensor, beta: float) -> Tensor:
    """Return max(0, 1 - h) (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return torch.relu(1 - beta * (chosen_score - rejected_score))


def ipo(chosen: Answers, rejected: Answers, chosen_score: Tensor, rejected_score: Tensor, beta: float) -> Tensor:
    """Return (difference of scores per token - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17; per token, as its authors mean)."""
    difference = _per_token(chosen_score, chosen) - _per_token(rejected_score, rejected)
    return (difference - 1 / (2 * beta)).square()


def robust(chosen_score: Tensor, rejected_score: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return a loss that is unbiased if labels are flipped with probability e (robust DPO, arXiv 2403.00409).

    (-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2e).
    """
    margin, flipped = beta * (chosen_score - rejected_score), label_smoothing
    return (flipped * F.logsigmoid(-margin) - (1 - flipped) * F.logsigmoid(margin)) / (1 - 2 * flipped)


def exo_pair(chosen_score: Tensor, rejected_score: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return KL((sigma(h), sigma(-h)) || (1 - e, e)) (EXO, arXiv 2402.00856, eq. 16)."""
    margin, flipped = beta * (chosen_score - rejected_score), label_smoothing
    win = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-flipped))
    return win + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(flipped))


def nca_pair(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """Return -log sigma(beta r_c) - (log sigma(-beta r_c) + log sigma(-beta r_r)) / 2 (NCA, arXiv 2402.05369)."""
    good, bad = beta * chosen.log_ratio_S, beta * rejected.log_ratio_S
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def bco_pair(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """Return -log sigma(beta r_c) - log sigma(-beta r_r) (BCO, arXiv 2404.04656, without its reward shift, as in TRL)."""
    return -F.logsigmoid(beta * chosen.log_ratio_S) - F.logsigmoid(-beta * rejected.log_ratio_S)


def sppo_hard(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """Return (r_c - 1 / (2 beta))^2 + (r_r + 1 / (2 beta))^2 (SPPO, arXiv 2405.00675, eq. 4.7 with certain wins)."""
    target = 0.5 / beta
    return (chosen.log_ratio_S - target).square() + (rejected.log_ratio_S + target).square()


def aot(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float) -> Tensor:
    """Return -log sigma(beta d), with d the sorted policy margins minus the sorted reference margins (AOT, arXiv 2406.05882).

    The loss asks for stochastic dominance of the policy's margins over the reference's, so it needs all pairs of the update.
    """
    ours = (chosen.logp_S - rejected.logp_S).sort().values
    theirs = (chosen.ref_logp_S - rejected.ref_logp_S).sort().values
    return _logistic(beta * (ours - theirs), label_smoothing)


def aot_unpaired(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float) -> Tensor:
    """Return -log sigma(beta d), with d the sorted r_c minus the sorted r_r (AOT unpaired, arXiv 2406.05882)."""
    return _logistic(beta * (chosen.log_ratio_S.sort().values - rejected.log_ratio_S.sort().values), label_smoothing)


def apo_zero(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """Return 1 - sigma(beta r_c) + sigma(beta r_r), for answers better than the model's own (APO, arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-beta * chosen.log_ratio_S) + torch.sigmoid(beta * rejected.log_ratio_S)


def apo_down(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """Return sigma(beta r_c) + 1 - sigma(beta (r_c - r_r)), for answers worse than the model's own (APO, eq. 8)."""
    difference = chosen.log_ratio_S - rejected.log_ratio_S
    return torch.sigmoid(beta * chosen.log_ratio_S) + torch.sigmoid(-beta * difference)


def discopop(chosen_score: Tensor, rejected_score: Tensor, beta: float, discopop_tau: float) -> Tensor:
    """Return -(1 - m) log sigma(h) + m exp(-h), m = sigma(h / tau) (DiscoPOP, arXiv 2406.08414, eq. 5)."""
    margin = beta * (chosen_score - rejected_score)
    mix = margin / discopop_tau
    # m exp(-h) is computed as one exponential, because exp(-h) alone can overflow.
    return -torch.sigmoid(-mix) * F.logsigmoid(margin) + torch.exp(F.logsigmoid(mix) - margin)


def simpo(chosen: Answers, rejected: Answers, beta: float, simpo_gamma: float, label_smoothing: float) -> Tensor:
    """Return -log sigma(beta (log-probability per token, chosen minus rejected) - gamma) (SimPO, arXiv 2405.14734)."""
    return _logistic(beta * (chosen.mean_logp_S - rejected.mean_logp_S) - simpo_gamma, label_smoothing)


def cpo(chosen: Answers, rejected: Answers, beta: float, label_smoothing: float) -> Tensor:
    """Return -log sigma(beta (log-probability, chosen minus rejected)) (CPO, arXiv 2401.08417).

    PreferenceLoss adds cpo_alpha times the negative log-likelihood of the chosen answers.
    """
    return _logistic(beta * (chosen.plain_logp_S - rejected.plain_logp_S), label_smoothing)


def orpo(chosen: Answers, rejected: Answers, beta: float) -> Tensor:
    """Return -beta log sigma(log-odds, chosen minus rejected) (ORPO, arXiv 2403.07691, eqs. 4 and 7).

    The odds are those of the geometric mean of an answer's token probabilities. PreferenceLoss adds the negative
    log-likelihood of the chosen answers.
    """
    return -beta * F.logsigmoid(_log_odds(chosen.mean_logp_S) - _log_odds(rejected.mean_logp_S))


def _per_token(score_B: Tensor, answers: Answers) -> Tensor:
    return score_B / answers.lengths_S.clamp(min=1)


def _logistic(margin: Tensor, flipped: float) -> Tensor:
    """Return -log sigma(margin), smoothed for a share `flipped` of wrong labels."""
    loss = -F.logsigmoid(margin)
    return loss if not flipped else (1 - flipped) * loss - flipped * F.logsigmoid(-margin)


def _log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of `logp` = log p."""
    logp = logp.clamp(max=-1e-7)  # the odds of p = 1 are infinite
    return logp - torch.where(logp > -math.log(2), (-torch.expm1(logp)).log(), torch.log1p(-logp.exp()))
