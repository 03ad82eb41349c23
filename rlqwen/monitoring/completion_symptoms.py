"""Find completions that are empty or grow without bound."""

from rlqwen.config import watch as limits
from rlqwen.monitoring.diagnosis import Diagnosis, ObservedStep


def runaway_length(config: limits.RunawayLengthConfig, step: ObservedStep) -> Diagnosis | None:
    """Find completions that have grown until they are truncated."""
    length, start = step.get("completions/mean_length"), step.history.start("completions/mean_length")
    if start is None or not (
        length > config.threshold * start and step.get("completions/truncated") >= config.truncated
    ):
        return None
    return Diagnosis(
        length / max(start, 1.0),
        config.threshold,
        f"completions have grown from {start:.0f} to {length:.0f} tokens and reach the limit: length is rewarded, "
        "or the model has forgotten how to end",
        [step.longer_completions(), "rewards: -> add soft_overlong or length", step.lower_learning_rate()],
    )


def empty(config: limits.EmptyConfig, step: ObservedStep) -> Diagnosis | None:
    """Find completions without content."""
    length = step.get("completions/mean_length")
    if not length <= config.threshold:
        return None
    return Diagnosis(
        length,
        config.threshold,
        "completions end where they begin: empty answers are rewarded, or the chat template leads to the end of the turn",
        ["rewards: -> give no reward for an empty completion", step.lower_learning_rate()],
    )
