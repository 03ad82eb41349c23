"""Find rewards that fail, are always 0, or are equal within each group."""

from rlqwen.config import watch as limits
from rlqwen.monitoring.diagnosis import Diagnosis, ObservedStep


def zero_reward(config: limits.ZeroRewardConfig, step: ObservedStep) -> Diagnosis | None:
    """Find rewards of about 0 while most completions are truncated."""
    reward, truncated = step.get("reward/mean"), step.get("completions/truncated")
    if not (reward <= config.threshold and truncated >= config.truncated):
        return None
    return Diagnosis(
        reward,
        config.threshold,
        f"{truncated:.0%} of the completions are truncated before they reach an answer: the limit is too low, or the "
        "model never ends its turn (a base model, or another chat template's end of turn)",
        [step.longer_completions(), "model.path: -> a model that has learned to end its turn"],
    )


def no_signal(config: limits.NoSignalConfig, step: ObservedStep) -> Diagnosis | None:
    """Find groups in which all completions have the same reward."""
    share = step.get("groups/no_signal")
    if not share >= config.threshold:
        return None
    reward = step.get("reward/mean")
    if step.get("reward/missing") >= 1:
        cause = "no completion got any reward: every reward returned None or failed"
        advice = [
            "rewards: -> check the columns that they need and the call statuses (reward_failures/ in the run folder)"
        ]
    else:
        cause = f"all completions of every group got the same reward (mean {reward:.3g}): the prompts are too hard or"
        cause += " too easy, or the completions are too similar"
        advice = [
            step.change("train.num_generations", f"try {2 * step.args.num_generations}"),  # type: ignore[attr-defined]
            step.change("train.temperature", "try 1" if step.get("entropy") < 0.1 else "keep, and change the prompts"),
            *([step.change("train.dynamic_sampling", "try true")] if hasattr(step.args, "dynamic_sampling") else []),
        ]
    return Diagnosis(share, config.threshold, cause, advice)


def reward_failures(config: limits.RewardFailuresConfig, step: ObservedStep) -> Diagnosis | None:
    """Find rewards whose calls fail too often."""
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
                [step.change("scoring.timeout", "longer") if failed["timeout"] else f"rewards: -> fix {name}"],
            )
    return None
