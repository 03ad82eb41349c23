"""Configure proximal policy optimization."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlqwen.config.base import ArgumentsConfig, PathText
from rlqwen.config.online import OnlineConfig
from rlqwen.plugins.kinds import LOSSES

# TRL's names for what every sampling trainer here calls by one name.
_TRL_NAMES = {"response_length": "max_completion_length", "local_rollout_forward_batch_size": None}


class CriticConfig(ArgumentsConfig):
    """Arguments of the value model."""

    kind: Literal["model", "head"] = "model"
    """`model`: a separate model. `head`: one matrix on top of the policy, with half the memory and compute."""
    path: PathText | None = None
    """Starting weights of a separate critic, such as a reward model. None: the policy's weights, with all values 0."""
    learning_rate: float | None = Field(default=None, ge=0)
    """Peak learning rate of the critic. None: the policy's."""
    train_trunk: bool = True
    """Whether the value loss of a `head` also trains the policy's layers, weighted by `vf_coef`."""
    warmup_rollouts: int = Field(default=0, ge=0)
    """Rollouts at the start in which the critic is trained and the policy is not."""


class PPOConfig(OnlineConfig):
    """Configure PPOTrainer: clipped policy gradients with a learned value model (PPO, arXiv 1707.06347).

    Names, meanings and defaults are those of TRL 1.9, the last version that had PPO, unless a field says otherwise.
    A rollout has per_device_train_batch_size x gradient_accumulation_steps x `num_mini_batches` completions, and gives
    `num_mini_batches` x `num_ppo_epochs` updates. `max_steps`, `save_steps` and the like count updates (TRL: rollouts).
    """

    trainer: ClassVar[str] = "rlqwen.trainers.ppo:PPOTrainer"

    refused: ClassVar[dict[str, str]] = OnlineConfig.refused | {
        "sft_model_path": "give the policy as `model`; its frozen copy is the reference",
        "reward_model_path": "give the reward model's path in reward_funcs, or under `rewards:` in a recipe",
        "stop_token": "completions end at the chat template's end of turn and at the EOS token; for more, give "
        "generation_kwargs stop or stop_token_ids",
        "stop_token_id": "completions end at the chat template's end of turn and at the EOS token; for more, give "
        "generation_kwargs stop_token_ids",
        "num_sample_generations": "leave it out: completions are always written to the run folder",
        "batch_size": "it follows: per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches",
        "mini_batch_size": "it follows: per_device_train_batch_size x gradient_accumulation_steps",
    }

    learning_rate: float = Field(default=3e-6, ge=0)
    """Peak learning rate of the policy."""
    temperature: float = Field(default=0.7, gt=0)
    """Sampling temperature."""
    num_generations: int = Field(default=1, ge=1)
    """Ours: completions per prompt, which share the prompt's forward pass."""
    total_episodes: int | None = Field(default=None, ge=1)
    """Completions to sample over the run, in place of `max_steps` or `num_train_epochs`. None: those decide."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Updates per pass over a rollout. The split is drawn once per rollout, and visited in a new order each pass."""
    num_ppo_epochs: int = Field(default=4, ge=1)
    """Passes over a rollout."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount factor per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation over the rollout."""
    whiten_advantages: bool = True
    """Ours: normalize advantages to mean 0 and standard deviation 1 over the rollout, as TRL always does."""
    missing_eos_penalty: float | None = Field(default=None, ge=0)
    """Subtracted from the reward of a completion that was cut off at `max_completion_length`. None: nothing."""

    kl_coef: float = Field(default=0.05, ge=0)
    """Weight of the KL to the reference. At 0 no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL; see http://joschu.net/blog/kl-approx.html."""
    kl_penalty: Literal["reward", "loss"] = "reward"
    """Ours: subtract the KL from each token's reward (`reward`), or add it to the loss (`loss`)."""
    kl_target: float | None = Field(default=None, gt=0)
    """Ours: adapt `kl_coef` so that the KL per completion, in nats, approaches this value (arXiv 1909.08593, section
    2.2). None: `kl_coef` stays constant."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Ours: number of completions over which the adaptive coefficient moves."""

    loss_type: str = "clipped"
    """Ours: the surrogate of the policy's loss: a registered loss (`rlqwen losses`), `package.module:function` or
    `file.py:function`. It gets `cliprange` as `epsilon`."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Ours: arguments of the surrogate that are not fields of this config."""
    cliprange: float = Field(default=0.2, gt=0)
    """How far a token's probability ratio may leave 1 before it is clipped."""
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    cliprange_value: float = Field(default=0.2, ge=0)
    """How far a value may move from its value before the update. 0 (ours): no limit."""
    entropy_coef: float = 0.0
    """Ours: weight of the entropy bonus per token."""
    critic: CriticConfig = Field(default_factory=CriticConfig)
    """The value model."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def arrival_obstacle(self) -> str | None:
        return "PPO draws mini-batches from a whole rollout, and normalizes advantages over it"

    @model_validator(mode="before")
    @classmethod
    def _accept_names_of_trl(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for theirs, ours in _TRL_NAMES.items():
            value = values.pop(theirs, None)
            if ours is not None and value is not None:
                values.setdefault(ours, value)
        return values

    @model_validator(mode="after")
    def _coherent_ppo(self) -> "PPOConfig":
        LOSSES.check_name(self.loss_type, "loss_type")
        if self.kl_estimator == "k1" and self.kl_penalty == "loss":
            raise ValueError("kl_penalty='loss' needs kl_estimator 'k2' or 'k3': the gradient of k1 is 0 on average")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target adapts kl_coef, which is 0: give it a start above 0, such as 0.05")
        if self.critic.kind == "head" and self.critic.path is not None:
            raise ValueError(
                "critic.path is for a separate critic (critic.kind='model'); a head has no weights to load"
            )
        return self

    def completions_per_rollout(self, num_ranks: int) -> int:
        return self.completions_per_update(num_ranks) * self.num_mini_batches

    def _rollout_terms(self, num_ranks: int) -> str:
        return f"{super()._rollout_terms(num_ranks)} x num_mini_batches"

    @property
    def passes_per_rollout(self) -> int:
        return self.num_ppo_epochs

    @property
    def total_completions(self) -> int | None:
        return self.total_episodes
