"""Configure the monitor of a run: the symptoms it watches for, their thresholds, and what it does about them."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, field_validator

from rlqwen.config.base import ArgumentsConfig, Config

Action = Literal["warn", "stop", "rollback"]


class SymptomConfig(Config):
    """Hold what all symptoms have. `off` instead of a section turns a symptom off; a number alone sets its threshold."""

    threshold: float
    """Value beyond which a step shows the symptom."""
    steps: int = Field(default=1, ge=1)
    """Consecutive steps that must show the symptom before it counts."""
    action: Action | None = None
    """What to do about the symptom. None: as `watch.action` says."""


class NonfiniteConfig(SymptomConfig):
    """A metric is NaN or infinite although the update was made. (`skipped` counts updates that were not made.)"""

    threshold: Literal[0] = 0
    """Always 0."""
    action: Action | None = "stop"
    """What to do about the symptom. None: as `watch.action` says."""


class SkippedConfig(SymptomConfig):
    """Updates were skipped because a loss or gradient was not finite."""

    threshold: float = Field(default=0.0, ge=0, lt=1)
    """Share of a step's updates, above which skipped ones are a symptom."""


class MismatchConfig(SymptomConfig):
    """The sampler's logprobs differ from the trainer's (`sampling/logp_gap`), or are missing."""

    threshold: float = Field(default=0.2, gt=0)
    """Largest mean gap per token, in nats."""


class EntropyConfig(SymptomConfig):
    """The policy's entropy is very low."""

    threshold: float = Field(default=0.001, ge=0)
    """Lowest entropy per token, in nats."""
    share_of_start: float = Field(default=0.03, ge=0, lt=1)
    """Lowest entropy as a share of the entropy at the start of the run. 0: only `threshold` counts."""
    steps: int = Field(default=3, ge=1)
    """Consecutive steps that must show the symptom before it counts."""


class KLConfig(SymptomConfig):
    """The policy is far from the reference (`kl`, on samples of its own while it trains)."""

    threshold: float = Field(default=1.0, gt=0)
    """Largest KL per token, in nats."""
    steps: int = Field(default=2, ge=1)
    """Consecutive steps that must show the symptom before it counts."""


class GradNormConfig(SymptomConfig):
    """The gradient norm is much larger than usual."""

    threshold: float = Field(default=50.0, gt=1)
    """Largest gradient norm, as a multiple of the median over the last `window` steps."""
    window: int = Field(default=50, ge=5)
    """Steps that the median is taken over."""
    min_steps: int = Field(default=10, ge=2)
    """Steps before the median is used."""


class ZeroRewardConfig(SymptomConfig):
    """The mean reward is very low while most completions are truncated."""

    threshold: float = 0.0
    """Mean reward, at or below which this is a symptom."""
    truncated: float = Field(default=0.95, ge=0, le=1)
    """Smallest share of completions that are truncated."""
    steps: int = Field(default=3, ge=1)
    """Consecutive steps that must show the symptom before it counts."""


class NoSignalConfig(SymptomConfig):
    """All completions of a group got the same reward, in most groups."""

    threshold: float = Field(default=1.0, gt=0, le=1)
    """Share of such groups, at or above which this is a symptom."""
    steps: int = Field(default=5, ge=1)
    """Consecutive steps that must show the symptom before it counts."""


class RewardFailuresConfig(SymptomConfig):
    """A reward often fails. Above `scoring.max_failure_share` the run stops in any case."""

    threshold: float = Field(default=0.1, ge=0, lt=1)
    """Largest share of a reward's calls that may fail."""


class RunawayLengthConfig(SymptomConfig):
    """Completions became much longer than at the start of the run, and many are truncated."""

    threshold: float = Field(default=2.0, gt=1)
    """Largest mean length, as a multiple of the mean length at the start of the run."""
    truncated: float = Field(default=0.5, ge=0, le=1)
    """Smallest share of completions that are truncated."""
    steps: int = Field(default=3, ge=1)
    """Consecutive steps that must show the symptom before it counts."""


class EmptyConfig(SymptomConfig):
    """Completions are almost empty."""

    threshold: float = Field(default=1.0, ge=0)
    """Mean length in tokens, the one that ends a completion included, at or below which this is a symptom."""
    steps: int = Field(default=2, ge=1)
    """Consecutive steps that must show the symptom before it counts."""


class IdleConfig(SymptomConfig):
    """The run learns nothing and does not say so: the gradient is 0, or the learning rate is."""

    threshold: float = Field(default=0.0, ge=0)
    """Gradient norm, at or below which this is a symptom."""
    steps: int = Field(default=5, ge=1)
    """Consecutive steps that must show the symptom before it counts."""


class MaskedConfig(SymptomConfig):
    """A step trained on hardly any tokens; a batch whose labels are all masked has 0."""

    threshold: float = Field(default=0.0, ge=0)
    """Trained tokens per step, at or below which this is a symptom."""


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
    """False: watch for nothing."""
    action: Action = "warn"
    """What to do about a symptom without an `action` of its own: `warn`; `stop`, after saving a checkpoint; or
    `rollback` to the last checkpoint, and continue with the data after the bad batch."""
    max_rollbacks: int = Field(default=2, ge=0)
    """Rollbacks per run; the next one stops the run instead."""
    clear_steps: int = Field(default=5, ge=1)
    """A symptom is reported once, and again only after this many consecutive steps without it."""
    start_steps: int = Field(default=5, ge=1)
    """Steps whose median stands for the start of the run."""
    webhook: str | None = None
    """URL that gets a POST of JSON at each alert and at the end of the run. `$NAME` reads it from the environment; a
    URL that is written out is not copied to the run folder's recipe. None: no webhook."""
    webhook_timeout: float = Field(default=5.0, gt=0, le=60)
    """Seconds for one call; a failing webhook does not affect the run."""

    nonfinite: Annotated[NonfiniteConfig | None, _Shorthand] = Field(default_factory=NonfiniteConfig)
    """NaN or infinite metrics. None or `off`: not watched."""
    skipped: Annotated[SkippedConfig | None, _Shorthand] = Field(default_factory=SkippedConfig)
    """Skipped updates. None or `off`: not watched."""
    mismatch: Annotated[MismatchConfig | None, _Shorthand] = Field(default_factory=MismatchConfig)
    """Logprobs of sampler and trainer that differ. None or `off`: not watched."""
    entropy: Annotated[EntropyConfig | None, _Shorthand] = Field(default_factory=EntropyConfig)
    """Very low entropy. None or `off`: not watched."""
    kl: Annotated[KLConfig | None, _Shorthand] = Field(default_factory=KLConfig)
    """A large KL to the reference. None or `off`: not watched."""
    grad_norm: Annotated[GradNormConfig | None, _Shorthand] = Field(default_factory=GradNormConfig)
    """A large gradient norm. None or `off`: not watched."""
    zero_reward: Annotated[ZeroRewardConfig | None, _Shorthand] = Field(default_factory=ZeroRewardConfig)
    """Low rewards of truncated completions. None or `off`: not watched."""
    no_signal: Annotated[NoSignalConfig | None, _Shorthand] = Field(default_factory=NoSignalConfig)
    """Groups without a difference in reward. None or `off`: not watched."""
    reward_failures: Annotated[RewardFailuresConfig | None, _Shorthand] = Field(default_factory=RewardFailuresConfig)
    """Rewards that fail. None or `off`: not watched."""
    runaway_length: Annotated[RunawayLengthConfig | None, _Shorthand] = Field(default_factory=RunawayLengthConfig)
    """Completions that grow. None or `off`: not watched."""
    empty: Annotated[EmptyConfig | None, _Shorthand] = Field(default_factory=EmptyConfig)
    """Empty completions. None or `off`: not watched."""
    idle: Annotated[IdleConfig | None, _Shorthand] = Field(default_factory=IdleConfig)
    """Updates that change nothing. None or `off`: not watched."""
    masked: Annotated[MaskedConfig | None, _Shorthand] = Field(default_factory=MaskedConfig)
    """Batches without trained tokens. None or `off`: not watched."""

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
    """Read `off` in place of the section as a config that watches for nothing."""
    return {"enabled": False} if value is False or value == "off" else value
