"""Configure reward modeling."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlqwen.config.preference import PreferenceConfig
from rlqwen.plugins.kinds import LOSSES


class RewardConfig(PreferenceConfig):
    """Configure RewardTrainer: learn a reward model from chosen and rejected answers.

    Names, meanings and defaults are TRL's unless a field says otherwise.
    """

    trainer: ClassVar[str] = "rlqwen.trainers.reward:RewardTrainer"
    trains_scalar_model: ClassVar[bool] = True
    next_command: ClassVar[str] = (
        "rlqwen eval MODEL --data PROMPTS --rewards {final}     (in a PPO or GRPO recipe: rewards: [{{name: {final}}}])"
    )

    learning_rate: float = Field(default=1e-4, ge=0)
    """Peak learning rate."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "drop"
    """What happens to a pair longer than `max_length`. As in TRL it is left out, because an answer without its end is a
    different answer."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=0)
    """Must stay empty, because whoever uses the reward model renders conversations without them."""
    center_rewards_coefficient: float | None = Field(default=None, ge=0)
    """Weight of a penalty on (r_chosen + r_rejected)^2 that keeps rewards around 0 (arXiv 2312.09244, eq. 2)."""
    loss_type: str = "bradley_terry"
    """Ours: the loss of a pair: `bradley_terry`, another registered loss (`rlqwen losses`), `package.module:function`
    or `file.py:function`."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Ours: arguments of the loss that are not fields of this config."""

    @model_validator(mode="after")
    def _loss_is_registered(self) -> "RewardConfig":
        LOSSES.check_name(self.loss_type, "loss_type")
        return self
