"""The symptoms: each looks at a step's metrics, and says what is wrong, why it probably is, and what to change.

A symptom is a function of its own section of `watch` and of a `Step`; it returns a Diagnosis or None. None of them
counts steps: that a symptom must last is the guard's business.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlqwen.config import OnlineConfig, TrainerConfig
from rlqwen.config import watch as limits
from rlqwen.monitoring.history import History

_NO_VALUE_IS_HEALTHY = ("reward/", "completions/", "time/", "eval/")
"""Means over what may be empty: no reward was applicable, nothing was evaluated."""


@dataclass(slots=True, frozen=True)
class Diagnosis:
    """What a symptom says of a step."""

    value: float
    threshold: float
    cause: str
    advice: list[str]
    """Recipe lines to change: `train.beta: 0.0 -> try 0.04`."""


@dataclass(slots=True, frozen=True)
class Step:
    """What a symptom sees: the step's metrics, those before it, and the run's settings."""

    metrics: Mapping[str, float]
    history: History
    args: TrainerConfig

    @property
    def samples(self) -> bool:
        """Whether the run learns from completions of its own."""
        return isinstance(self.args, OnlineConfig)

    def get(self, key: str) -> float:
        """NaN where the step has no such metric, so that no comparison holds."""
        return self.metrics.get(key, math.nan)

    def change(self, key: str, proposal: str) -> str:
        """`key: present value -> proposal`, for a key as the recipe spells it."""
        value: Any = self.args
        for name in key.removeprefix("train.").split("."):
            value = getattr(value, name)
        return f"{key}: {f'{value:g}' if isinstance(value, float) else value} -> {proposal}"

    def slower(self) -> str:
        """The line that lowers the learning rate."""
        return self.change("train.learning_rate", f"try {self.args.learning_rate / 3:.2g}")

    def stronger_kl(self) -> str:
        """The line that holds the policy nearer to its reference."""
        key = "beta" if hasattr(self.args, "beta") else "kl_coef"
        now = getattr(self.args, key)
        return self.change(f"train.{key}", f"try {2 * now or 0.04:g}")


def nonfinite(config: limits.NonfiniteConfig, step: Step) -> Diagnosis | None:
    if step.metrics.get("updates/skipped"):
        return None
    bad = [
        key
        for key, value in step.metrics.items()
        if not math.isfinite(value) and not key.startswith(_NO_VALUE_IS_HEALTHY)
    ]
    if not bad:
        return None
    return Diagnosis(
        step.metrics[bad[0]],
        config.threshold,
        f"{', '.join(bad)} not finite although the update was made: the weights, or logprobs that were handed in, "
        "have left the range of their type",
        [step.slower(), step.change("train.bf16", "try true where the device has it")],
    )


def skipped(config: limits.SkippedConfig, step: Step) -> Diagnosis | None:
    count = step.get("updates/skipped")
    if not count > config.threshold:
        return None
    return Diagnosis(
        count,
        config.threshold,
        "loss or gradient was not finite, so the update was left out and no weight changed; the batch is kept under "
        "nonfinite/ in the run folder",
        [
            step.slower(),
            step.change("train.max_nonfinite_steps", "so many in a row stop the run"),
        ],
    )


def mismatch(config: limits.MismatchConfig, step: Step) -> Diagnosis | None:
    missing, gap = step.get("sampling/logp_missing"), step.get("sampling/logp_gap")
    if missing > 0:
        return Diagnosis(
            missing,
            0.0,
            f"{missing:.0%} of the trained tokens came without the sampler's logprobs, so nothing corrects for its "
            "distribution",
            [step.change("rollout.engine", "an engine that returns logprobs")],
        )
    if not gap > config.threshold:
        return None
    return Diagnosis(
        gap,
        config.threshold,
        "sampler and trainer disagree on the probability of the same tokens: other weights (a failed sync), another "
        "dtype, logprobs out of line with their tokens, or weights that are too old",
        [
            step.change("rollout.dtype", "the trainer's"),
            step.change("rollout.canary_tolerance", "lower, to find a failed sync at once"),
        ],
    )


def entropy(config: limits.EntropyConfig, step: Step) -> Diagnosis | None:
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
        "the policy has all but stopped to vary what it says, so groups will carry no signal: updates are too large, "
        "or one answer is rewarded whatever the prompt",
        [
            step.slower(),
            step.change("train.entropy_coef", f"try {2 * step.args.entropy_coef or 0.001:g}"),  # type: ignore[attr-defined]
            step.stronger_kl(),
        ],
    )


def kl(config: limits.KLConfig, step: Step) -> Diagnosis | None:
    value = step.get("kl")
    if not step.samples or not value > config.threshold:
        return None
    return Diagnosis(
        value,
        config.threshold,
        "the policy has left its reference far behind: updates are too large, or the reward is being exploited",
        [step.slower(), step.stronger_kl()],
    )


def grad_norm(config: limits.GradNormConfig, step: Step) -> Diagnosis | None:
    for key, value in gradient_norms(step.metrics).items():
        median = step.history.recent(key, config.min_steps)
        if median is not None and value > config.threshold * median:
            return Diagnosis(
                value / median,
                config.threshold,
                f"{key} is {value:.3g}, and was {median:.3g} before: an outlier in the data, or updates too large for "
                "where the weights now are",
                [step.slower(), step.change("train.max_grad_norm", f"try {4 * median:.2g}")],
            )
    return None


def zero_reward(config: limits.ZeroRewardConfig, step: Step) -> Diagnosis | None:
    reward, truncated = step.get("reward/mean"), step.get("completions/truncated")
    if not (reward <= config.threshold and truncated >= config.truncated):
        return None
    return Diagnosis(
        reward,
        config.threshold,
        f"{truncated:.0%} of the completions are cut off before they come to an answer: the limit is too low, or the "
        "model never ends its turn (a base model, or another chat template's end of turn)",
        [_more_tokens(step), "model.path: -> a model that has learned to end its turn"],
    )


def no_signal(config: limits.NoSignalConfig, step: Step) -> Diagnosis | None:
    share = step.get("groups/no_signal")
    if not share >= config.threshold:
        return None
    reward = step.get("reward/mean")
    if step.get("reward/missing") >= 1:
        cause = "no completion got any reward: every reward returned None or failed"
        advice = ["rewards: -> check the columns and outcomes that they need (reward_failures/ in the run folder)"]
    else:
        cause = f"all completions of every group got the same reward (mean {reward:.3g}): the prompts are too hard or"
        cause += " too easy, or the completions too much alike"
        advice = [
            step.change("train.num_generations", f"try {2 * step.args.num_generations}"),  # type: ignore[attr-defined]
            step.change("train.temperature", "try 1" if step.get("entropy") < 0.1 else "keep, and change the prompts"),
            *([step.change("train.dynamic_sampling", "try true")] if hasattr(step.args, "dynamic_sampling") else []),
        ]
    return Diagnosis(share, config.threshold, cause, advice)


def reward_failures(config: limits.RewardFailuresConfig, step: Step) -> Diagnosis | None:
    for key in step.metrics:
        if not key.endswith("/ok"):
            continue
        name = key.removesuffix("/ok")
        failed = {kind: step.metrics.get(f"{name}/{kind}", 0.0) for kind in ("timeout", "error", "invalid")}
        share = sum(failed.values()) / max(step.metrics[key] + sum(failed.values()), 1.0)
        if share > config.threshold:
            counts = ", ".join(f"{kind} {count:.0f}" for kind, count in failed.items() if count)
            return Diagnosis(
                share,
                config.threshold,
                f"reward {name.removeprefix('reward/')!r} failed on {share:.0%} of the completions ({counts}), which "
                "count as missing; their inputs are in reward_failures/ in the run folder",
                [step.change("scoring.timeout", "longer") if failed["timeout"] else f"rewards: -> mend {name}"],
            )
    return None


def runaway_length(config: limits.RunawayLengthConfig, step: Step) -> Diagnosis | None:
    length, start = step.get("completions/mean_length"), step.history.start("completions/mean_length")
    if start is None or not (
        length > config.threshold * start and step.get("completions/truncated") >= config.truncated
    ):
        return None
    return Diagnosis(
        length / max(start, 1.0),
        config.threshold,
        f"completions have grown from {start:.0f} to {length:.0f} tokens and run into the limit: length is rewarded, "
        "or the model has forgotten how to end",
        [_more_tokens(step), "rewards: -> add soft_overlong or length", step.slower()],
    )


def empty(config: limits.EmptyConfig, step: Step) -> Diagnosis | None:
    length = step.get("completions/mean_length")
    if not length <= config.threshold:
        return None
    return Diagnosis(
        length,
        config.threshold,
        "completions end as they begin: saying nothing is rewarded, or the chat template leads to the end of the turn",
        ["rewards: -> give nothing for an empty completion", step.slower()],
    )


def idle(config: limits.IdleConfig, step: Step) -> Diagnosis | None:
    norms = gradient_norms(step.metrics)
    rate = step.get("learning_rate")
    if step.get("groups/no_signal") >= 1 or tokens_trained(step.metrics) == 0:
        return None  # said by symptoms of their own
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
        advice = ["model.lora: -> adapters on layers that the loss sees", "train: -> a loss whose terms are not all 0"]
    else:
        return None
    return Diagnosis(
        rate if rate == 0 else max(norms.values()), config.threshold, f"nothing is learned: {cause}", advice
    )


def masked(config: limits.MaskedConfig, step: Step) -> Diagnosis | None:
    tokens = tokens_trained(step.metrics)
    if not tokens <= config.threshold or step.get("groups/no_signal") >= 1:
        return None
    truncated = step.get("completions/truncated")
    if step.samples:
        cause = f"no completion was trained on: all are masked or have no reward ({truncated:.0%} are cut off)"
        advice = [_more_tokens(step)]
        if getattr(step.args, "mask_truncated_completions", False):
            advice.append(step.change("train.mask_truncated_completions", "false"))
    else:
        cause = "no token of the batch is trained on: every label is masked"
        advice = ["data.train: -> rows whose answers fit train.max_length; see the notes on the data above"]
    return Diagnosis(tokens, config.threshold, cause, advice)


def gradient_norms(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each part's; finite ones only."""
    return {key: value for key, value in metrics.items() if key.endswith("grad_norm") and math.isfinite(value)}


def tokens_trained(metrics: Mapping[str, float]) -> float:
    """Tokens with a label where the trainer counts them, else all; NaN where it counts none."""
    return metrics.get("tokens/targets", metrics.get("tokens/trained", math.nan))


def _more_tokens(step: Step) -> str:
    return step.change("train.max_completion_length", f"try {2 * step.args.max_completion_length}")  # type: ignore[attr-defined]


SYMPTOMS: dict[str, Callable[[Any, Step], Diagnosis | None]] = {
    function.__name__: function
    for function in (
        nonfinite,
        skipped,
        mismatch,
        entropy,
        kl,
        grad_norm,
        zero_reward,
        no_signal,
        reward_failures,
        runaway_length,
        empty,
        idle,
        masked,
    )
}
"""By their names in `watch`."""
