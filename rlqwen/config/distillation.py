"""Configure on-policy distillation: a student learns from a teacher on the student's own samples."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlqwen.config.base import PathText
from rlqwen.config.online import OnlineConfig
from rlqwen.plugins.kinds import LOSSES, NORMALIZERS


class DistillationConfig(OnlineConfig):
    """Configure DistillationTrainer: learn from a teacher on the student's own samples.

    Arguments of sampling are those of GRPO.
    """

    trainer: ClassVar[str] = "rlqwen.trainers.distillation:DistillationTrainer"
    rewards: ClassVar[Literal["required", "optional", "refused"]] = "optional"

    learning_rate: float = Field(default=1e-5, ge=0)
    """Peak learning rate."""
    teacher: PathText | None = None
    """Folder or hub id of the teacher (`owner/model@revision` pins it), which must have the student's tokenizer. None:
    the trainer gets it as `teacher_model`."""
    loss_type: str = "reverse_kl"
    """The loss of a token: `reverse_kl`, another registered loss (`rlqwen losses`), `package.module:function` or
    `file.py:function`."""
    loss_normalizer: str = "token_mean"
    """What the sum over tokens is divided by: `token_mean`, `sequence_mean`, `constant_length`, another registered
    normalizer (`rlqwen losses`), `package.module:function` or `file.py:function`."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the loss that are not fields of this config."""

    def other_models(self) -> dict[str, str]:
        return {} if self.teacher is None else {"teacher": self.teacher}

    @property
    def normalizer(self) -> str:
        return self.loss_normalizer

    @model_validator(mode="after")
    def _names_are_registered(self) -> "DistillationConfig":
        LOSSES.check_name(self.loss_type, "loss_type")
        NORMALIZERS.check_name(self.loss_normalizer, "loss_normalizer")
        return self
