"""Configure the monitor of a run: the symptoms it looks for, their thresholds, and the actions it takes."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, field_validator

from rlqwen.config.base import ArgumentsConfig, Config

Action = Literal["warn", "stop", "rollback"]


class SymptomConfig(Config):
    """What all symptoms have; `off` in place of the section switches one off, a number alone sets its threshold."""

    threshold: float
    steps: int = Field(default=1, ge=1)
    """Steps in a row that must show the symptom before it counts."""
    action: Action | None = None
    """None: as `watch.action` says."""


class NonfiniteConfig(SymptomConfig):
    """A metric is NaN or infinite although the update was made. (Skipped ones: `skipped`.)"""

    threshold: Literal[0] = 0
    action: Action | None = "stop"


class SkippedConfig(SymptomConfig):
    """Share of a step's updates that were skipped for a loss or gradient that is not finite."""

    threshold: float = Field(default=0.0, ge=0, lt=1)


class MismatchConfig(SymptomConfig):
    """Mean gap in nats a token between the sampler's logprobs and the trainer's (`sampling/logp_gap`), or no such
    logprobs at all."""

    threshold: float = Field(default=0.2, gt=0)


class EntropyConfig(SymptomConfig):
    """Entropy a token below `threshold` nats, or below a share of what the run began with."""

    threshold: float = Field(default=0.001, ge=0)
    share_of_start: float = Field(default=0.03, ge=0, lt=1)
    """0: only the absolute threshold counts."""
    steps: int = Field(default=3, ge=1)


class KLConfig(SymptomConfig):
    """KL from the reference, nats a token (`kl`; while training samples of its own)."""

    threshold: float = Field(default=1.0, gt=0)
    steps: int = Field(default=2, ge=1)


class GradNormConfig(SymptomConfig):
    """Gradient norm, in medians of the last `window` steps."""

    threshold: float = Field(default=50.0, gt=1)
    window: int = Field(default=50, ge=5)
    min_steps: int = Field(default=10, ge=2)
    """Steps before there is a median to speak of."""


class ZeroRewardConfig(SymptomConfig):
    """Mean reward not above `threshold` while at least `truncated` of the completions are cut off."""

    threshold: float = 0.0
    truncated: float = Field(default=0.95, ge=0, le=1)
    steps: int = Field(default=3, ge=1)


class NoSignalConfig(SymptomConfig):
    """Share of groups whose completions all got the same reward."""

    threshold: float = Field(default=1.0, gt=0, le=1)
    steps: int = Field(default=5, ge=1)


class RewardFailuresConfig(SymptomConfig):
    """Share of its calls in which a reward failed; `scoring.max_failure_share` is where the run stops in any case."""

    threshold: float = Field(default=0.1, ge=0, lt=1)


class RunawayLengthConfig(SymptomConfig):
    """Mean length, in lengths of the run's start, while at least `truncated` of the completions are cut off."""

    threshold: float = Field(default=2.0, gt=1)
    truncated: float = Field(default=0.5, ge=0, le=1)
    steps: int = Field(default=3, ge=1)


class EmptyConfig(SymptomConfig):
    """Mean length of completions at most this many tokens, the one that ends them included."""

    threshold: float = Field(default=1.0, ge=0)
    steps: int = Field(default=2, ge=1)


class IdleConfig(SymptomConfig):
    """Gradient norm not above `threshold`, or learning rate 0: the run learns nothing and does not say so."""

    threshold: float = Field(default=0.0, ge=0)
    steps: int = Field(default=5, ge=1)


class MaskedConfig(SymptomConfig):
    """Tokens that a step trained on, at most: a batch whose every label is masked has 0."""

    threshold: float = Field(default=0.0, ge=0)


def _read_shorthand(value: Any) -> Any:
    if value is False or value == "off":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"threshold": value}
    return value


_Shorthand = BeforeValidator(_read_shorthand)


class WatchConfig(ArgumentsConfig):
    """Configure the monitor. Each symptom is a section with a threshold, a number that sets the threshold, or `off`."""

    enabled: bool = True
    action: Action = "warn"
    """What a symptom does whose own `action` is not set: warn; save a checkpoint and stop; or go back to the last
    checkpoint and on with the data after the bad batch."""
    max_rollbacks: int = Field(default=2, ge=0)
    """Further ones stop the run."""
    clear_steps: int = Field(default=5, ge=1)
    """A symptom is told once, and anew only after so many steps in a row without it."""
    start_steps: int = Field(default=5, ge=1)
    """Steps whose median stands for the run's start."""
    webhook: str | None = None
    """URL that gets a POST of JSON at each alert and at the run's end. `$NAME` takes it from the environment; a URL that is
    written out is left out of the run folder's recipe."""
    webhook_timeout: float = Field(default=5.0, gt=0, le=60)
    """Seconds for one call; a failing hook never harms the run."""

    nonfinite: Annotated[NonfiniteConfig | None, _Shorthand] = Field(default_factory=NonfiniteConfig)
    skipped: Annotated[SkippedConfig | None, _Shorthand] = Field(default_factory=SkippedConfig)
    mismatch: Annotated[MismatchConfig | None, _Shorthand] = Field(default_factory=MismatchConfig)
    entropy: Annotated[EntropyConfig | None, _Shorthand] = Field(default_factory=EntropyConfig)
    kl: Annotated[KLConfig | None, _Shorthand] = Field(default_factory=KLConfig)
    grad_norm: Annotated[GradNormConfig | None, _Shorthand] = Field(default_factory=GradNormConfig)
    zero_reward: Annotated[ZeroRewardConfig | None, _Shorthand] = Field(default_factory=ZeroRewardConfig)
    no_signal: Annotated[NoSignalConfig | None, _Shorthand] = Field(default_factory=NoSignalConfig)
    reward_failures: Annotated[RewardFailuresConfig | None, _Shorthand] = Field(default_factory=RewardFailuresConfig)
    runaway_length: Annotated[RunawayLengthConfig | None, _Shorthand] = Field(default_factory=RunawayLengthConfig)
    empty: Annotated[EmptyConfig | None, _Shorthand] = Field(default_factory=EmptyConfig)
    idle: Annotated[IdleConfig | None, _Shorthand] = Field(default_factory=IdleConfig)
    masked: Annotated[MaskedConfig | None, _Shorthand] = Field(default_factory=MaskedConfig)

    @field_validator("webhook")
    @classmethod
    def _usable_hook(cls, value: str | None) -> str | None:
        # Without the value: a webhook's address is often a secret.
        if value is not None and not re.match(r"https?://[^/]|\$[A-Za-z_]\w*$", value):
            raise ValueError("must be a URL that begins with http:// or https://, or $NAME of an environment variable")
        return value

    @field_serializer("webhook")
    def _withhold_secret(self, value: str | None) -> str | None:
        return value if value is None or value.startswith("$") else None


def read_watch(value: Any) -> Any:
    """`train.watch: off` switches all of it off."""
    return {"enabled": False} if value is False or value == "off" else value
