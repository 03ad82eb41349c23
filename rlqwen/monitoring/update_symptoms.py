"""Find steps whose update is not finite, unusually large, or changes nothing."""

import math
from collections.abc import Mapping

from rlqwen.config import watch as limits
from rlqwen.monitoring.diagnosis import Diagnosis, ObservedStep

_MAY_BE_NAN = ("reward/", "completions/", "time/", "eval/")
"""Prefixes of metrics that are NaN in a healthy step: means over nothing, for example if no reward applied."""


def nonfinite(config: limits.NonfiniteConfig, step: ObservedStep) -> Diagnosis | None:
    """Find metrics that are not finite although the update was made."""
    if step.metrics.get("updates/skipped"):
        return None
    bad = [key for key, value in step.metrics.items() if not math.isfinite(value) and not key.startswith(_MAY_BE_NAN)]
    if not bad:
        return None
    return Diagnosis(
        step.metrics[bad[0]],
        config.threshold,
        f"{', '.join(bad)} not finite although the update was made: the weights, or the logprobs passed in, "
        "have left the range of their dtype",
        [step.lower_learning_rate(), step.change("train.bf16", "try true if the device supports it")],
    )


def skipped(config: limits.SkippedConfig, step: ObservedStep) -> Diagnosis | None:
    """Find updates that were skipped because loss or gradient was not finite."""
    count = step.get("updates/skipped")
    if not count > config.threshold:
        return None
    return Diagnosis(
        count,
        config.threshold,
        "loss or gradient was not finite, so the update was skipped and no weight changed; the batch is saved under "
        "nonfinite/ in the run folder",
        [
            step.lower_learning_rate(),
            step.change("train.max_nonfinite_steps", "the number in a row that stops the run"),
        ],
    )


def grad_norm(config: limits.GradNormConfig, step: ObservedStep) -> Diagnosis | None:
    """Find a gradient norm far above its recent median."""
    for key, value in gradient_norms(step.metrics).items():
        median = step.history.recent(key, config.min_steps)
        if median is not None and value > config.threshold * median:
            return Diagnosis(
                value / median,
                config.threshold,
                f"{key} is {value:.3g}, and was {median:.3g} before: an outlier in the data, or updates too large for "
                "the present weights",
                [step.lower_learning_rate(), step.change("train.max_grad_norm", f"try {4 * median:.2g}")],
            )
    return None


def idle(config: limits.IdleConfig, step: ObservedStep) -> Diagnosis | None:
    """Find steps that cannot change the weights: a learning rate or a gradient of 0."""
    norms = gradient_norms(step.metrics)
    rate = step.get("learning_rate")
    if step.get("groups/no_signal") >= 1 or tokens_trained(step.metrics) == 0:
        return None  # the symptoms no_signal and masked report these
    if rate == 0:
        cause, advice = (
            "the learning rate is 0",
            [
                step.change("train.learning_rate", "above 0"),
                step.change("train.lr_scheduler_type", "one that does not end at 0 so early"),
            ],
        )
    elif norms and max(norms.values()) <= config.threshold:
        cause = "every gradient is 0: the loss does not depend on what is trained"
        advice = [
            "model.lora: -> adapters on layers that the loss depends on",
            "train: -> a loss whose terms are not all 0",
        ]
    else:
        return None
    return Diagnosis(
        rate if rate == 0 else max(norms.values()), config.threshold, f"nothing is learned: {cause}", advice
    )


def masked(config: limits.MaskedConfig, step: ObservedStep) -> Diagnosis | None:
    """Find steps in which no token is trained on."""
    tokens = tokens_trained(step.metrics)
    if not tokens <= config.threshold or step.get("groups/no_signal") >= 1:
        return None
    truncated = step.get("completions/truncated")
    if step.samples:
        cause = f"no completion was trained on: all are masked or have no reward ({truncated:.0%} are truncated)"
        advice = [step.longer_completions()]
        if getattr(step.args, "mask_truncated_completions", False):
            advice.append(step.change("train.mask_truncated_completions", "false"))
    else:
        cause = "no token of the batch is trained on: every label is masked"
        advice = ["data.train: -> rows whose answers fit train.max_length; see the notes on the data above"]
    return Diagnosis(tokens, config.threshold, cause, advice)


def gradient_norms(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the finite gradient norms, one per parameter group."""
    return {key: value for key, value in metrics.items() if key.endswith("grad_norm") and math.isfinite(value)}


def tokens_trained(metrics: Mapping[str, float]) -> float:
    """Return the number of tokens with a label if the trainer counts them, else of all tokens; NaN without a count."""
    return metrics.get("tokens/targets", metrics.get("tokens/trained", math.nan))
