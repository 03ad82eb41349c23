"""Find a policy that collapses, drifts from its reference, or differs from the sampler's."""

import math

from rlqwen.config import watch as limits
from rlqwen.monitoring.diagnosis import Diagnosis, ObservedStep

_KL_COEFFICIENTS = ("beta", "kl_coef")
"""What weighs the KL divergence from the reference, in GRPO and in PPO."""


def mismatch(config: limits.MismatchConfig, step: ObservedStep) -> Diagnosis | None:
    """Find logprobs of the sampler that are missing or differ from those of the trainer."""
    missing, gap = step.get("sampling/logp_missing"), step.get("sampling/logp_gap")
    if missing > 0:
        return Diagnosis(
            missing,
            0.0,
            f"{missing:.0%} of the trained tokens came without the sampler's logprobs, so nothing corrects for the "
            "sampler's distribution",
            [step.change("rollout.engine", "an engine that returns logprobs")],
        )
    if not gap > config.threshold:
        return None
    return Diagnosis(
        gap,
        config.threshold,
        "sampler and trainer disagree on the probability of the same tokens: other weights (a failed sync), another "
        "dtype, logprobs that are shifted against their tokens, or weights that are too old",
        [
            step.change("rollout.dtype", "the trainer's"),
            step.change("rollout.canary_tolerance", "lower, to find a failed sync at once"),
        ],
    )


def entropy(config: limits.EntropyConfig, step: ObservedStep) -> Diagnosis | None:
    """Find an entropy below the threshold, or below a share of its start."""
    value = step.get("entropy")
    if not step.samples or not math.isfinite(value):
        return None
    start = step.history.start("entropy")
    floor = max(config.threshold, 0.0 if start is None else config.share_of_start * start)
    if not value < floor:
        return None
    return Diagnosis(
        value,
        floor,
        "the policy samples almost the same tokens every time, so groups will carry no signal: updates are too large, "
        "or one answer is rewarded whatever the prompt is",
        [
            step.lower_learning_rate(),
            *step.raise_coefficient("entropy_coef", start=0.001),
            *step.raise_coefficient(*_KL_COEFFICIENTS, start=0.04),
        ],
    )


def kl(config: limits.KLConfig, step: ObservedStep) -> Diagnosis | None:
    """Find a KL divergence from the reference above the threshold.

    Where no coefficient keeps the policy close to a reference, as in distillation, `kl` is what is being lowered.
    """
    value, advice = step.get("kl"), step.raise_coefficient(*_KL_COEFFICIENTS, start=0.04)
    if not step.samples or not advice or not value > config.threshold:
        return None
    return Diagnosis(
        value,
        config.threshold,
        "the policy has moved far from its reference: updates are too large, or the reward is being exploited",
        [step.lower_learning_rate(), *advice],
    )
