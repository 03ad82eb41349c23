"""Configure Group Relative Policy Optimization and its relatives."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlqwen.config.online import COUNTED_BY, OnlineConfig
from rlqwen.config.reference import SyncedReference
from rlqwen.errors import ConfigError
from rlqwen.plugins.kinds import ADVANTAGES, LOSSES, NORMALIZERS

PRESETS: dict[str, tuple[str, str]] = {
    "grpo": ("clipped", "sequence_mean"),
    "dapo": ("clipped", "token_mean"),
    "bnpo": ("clipped", "token_mean"),
    "dr_grpo": ("clipped", "constant_length"),
    "cispo": ("cispo", "token_mean"),
}
"""TRL's names of losses -> surrogate and normalizer. Over a whole update, `bnpo` equals `dapo`."""


class GRPOConfig(OnlineConfig, SyncedReference):
    """Configure GRPOTrainer: compare each completion with its group (GRPO, arXiv 2402.03300, and its relatives).

    Names, meanings and defaults are TRL's unless a field says otherwise.
    """

    trainer: ClassVar[str] = "rlqwen.trainers.grpo:GRPOTrainer"

    num_generations: int = Field(default=8, ge=2)
    """G, the number of completions per prompt."""
    generation_batch_size: int | None = Field(default=None, ge=1)
    """Completions per rollout, on all ranks together. None: `per_device_train_batch_size` x `steps_per_generation` x
    ranks."""
    steps_per_generation: int | None = Field(default=None, ge=1)
    """Micro-batches per rollout. None: `gradient_accumulation_steps`, so that a rollout serves one update."""
    num_iterations: int = Field(default=1, ge=1)
    """Passes over each rollout (mu in the paper)."""

    loss_type: str = "dapo"
    """`grpo`, `dapo`, `bnpo`, `dr_grpo` or `cispo`, which name a surrogate and a normalizer; or a surrogate alone: a
    registered loss (`rlqwen losses`), `package.module:function` or `file.py:function`."""
    loss_normalizer: str | None = None
    """Ours: what the sum over tokens is divided by: `token_mean`, `sequence_mean`, `constant_length`, another
    registered normalizer (`rlqwen losses`), `package.module:function` or `file.py:function`. None: the normalizer of
    `loss_type`, or `token_mean` if that names a surrogate alone."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Ours: arguments of the surrogate that are not fields of this config."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """`token`: one probability ratio per token. `sequence` (GSPO): one per completion, the geometric mean of its
    tokens' ratios."""
    epsilon: float = Field(default=0.2, gt=0)
    """How far a probability ratio may fall below 1 before it is clipped; the upper limit is `epsilon_high`."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """How far a ratio may rise above 1 before it is clipped. None: `epsilon`. With `cispo` it caps the ratio itself:
    set it, usually to 5, because a cap below 1 only scales the loss down."""
    delta: float | None = Field(default=None, gt=1)
    """Cap of the ratio for negative advantages (dual clipping). None: no cap."""
    beta: float = Field(default=0.0, ge=0)
    """Coefficient of the KL to the reference, in the loss. At 0 no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Ours: estimator of the KL term (http://joschu.net/blog/kl-approx.html). TRL has k3."""
    use_bias_correction_kl: bool = True
    """Weight the KL term by the ratio, so that its gradient is unbiased off-policy (arXiv 2512.02556)."""
    advantage_estimator: str = "group"
    """Ours: `group`: the group's mean is the baseline. `rloo`: the mean of the other completions (arXiv 2402.14740).
    `reinforce_pp`: the group's mean, then whitening over the batch (REINFORCE++-baseline, arXiv 2501.03262). Or another
    registered one (`rlqwen advantages`), `package.module:function` or `file.py:function`."""
    advantage_args: dict[str, Any] = Field(default_factory=dict)
    """Ours: arguments of the estimator that are not fields of this config."""
    scale_rewards: Literal["group", "batch", "none"] | bool = "group"
    """Divide centered rewards by the standard deviation of the `group`, of the `batch`, or by nothing (`none`). True
    means `group`, False means `none`."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus per token."""
    mask_truncated_completions: bool = False
    """Compute no loss on truncated completions; they still count in their group's baseline."""
    soft_overlong_cache: int | None = Field(default=None, ge=1)
    """Ours: soft overlong punishment (DAPO, arXiv 2503.14476): over this many tokens before `max_completion_length`,
    the reward falls linearly by 1. None: no punishment."""
    dynamic_sampling: bool = False
    """Ours: sample more prompts until the batch is full of groups whose rewards differ (DAPO)."""
    max_sampling_rounds: int = Field(default=4, ge=1)
    """Ours: maximum number of rollouts for one batch under dynamic sampling; after that, groups with equal rewards fill
    it."""

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def surrogate(self) -> str:
        """Return the name of the per-token loss."""
        return PRESETS.get(self.loss_type, (self.loss_type, ""))[0]

    @property
    def normalizer(self) -> str:
        """Return the name of what the sum over tokens is divided by."""
        return self.loss_normalizer or PRESETS.get(self.loss_type, ("", "token_mean"))[1]

    @property
    def arrival_obstacle(self) -> str | None:
        if self.advantage_estimator not in ("group", "rloo"):
            return f"advantage_estimator {self.advantage_estimator!r} may compare the groups of a batch"
        if self.scale_rewards == "batch":
            return "scale_rewards 'batch' divides by the deviation of all rewards"
        if self.entropy_coef and COUNTED_BY.get(self.normalizer) != "tokens":
            return f"entropy_coef divides by tokens, and the normalizer {self.normalizer!r} does not"
        return super().arrival_obstacle

    @model_validator(mode="after")
    def _names_are_registered(self) -> "GRPOConfig":
        LOSSES.check_name(self.surrogate, "loss_type", PRESETS)
        NORMALIZERS.check_name(self.normalizer, "loss_normalizer")
        ADVANTAGES.check_name(self.advantage_estimator, "advantage_estimator")
        return self

    @model_validator(mode="after")
    def _divisible(self) -> "GRPOConfig":
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("give generation_batch_size or steps_per_generation, not both: one follows from the other")
        if self.soft_overlong_cache is not None and self.soft_overlong_cache >= self.max_completion_length:
            raise ValueError(
                f"soft_overlong_cache={self.soft_overlong_cache} must be below "
                f"max_completion_length={self.max_completion_length}"
            )
        if self.dynamic_sampling and self.rollout.max_staleness:
            raise ValueError(
                f"dynamic_sampling draws until the present policy's groups fill the batch, and "
                f"rollout.max_staleness={self.rollout.max_staleness} draws them before: leave one of them out"
            )
        return self

    def completions_per_rollout(self, num_ranks: int) -> int:
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.per_device_train_batch_size * steps * num_ranks

    def check_batch(self, num_ranks: int) -> None:
        """Raise ConfigError if the completions of a rollout do not make whole groups and whole updates."""
        super().check_batch(num_ranks)
        batch, update = self.completions_per_rollout(num_ranks), self.completions_per_update(num_ranks)
        if batch % update:
            ranks = f" x {num_ranks} ranks" if num_ranks > 1 else ""
            raise ConfigError(
                f"{batch} completions per rollout do not divide into updates of {update} (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps {self.gradient_accumulation_steps}"
                f"{ranks})"
            )

    def _rollout_terms(self, num_ranks: int) -> str:
        ranks = f" x {num_ranks} ranks" if num_ranks > 1 else ""
        return f"generation_batch_size, or per_device_train_batch_size x steps_per_generation{ranks}"

    @property
    def passes_per_rollout(self) -> int:
        return self.num_iterations
