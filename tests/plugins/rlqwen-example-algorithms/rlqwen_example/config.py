"""The config of the trainer: light, because a recipe is read before torch is imported."""

from typing import ClassVar, Literal

from pydantic import Field

from rlqwen.config import OnlineConfig
from rlqwen.config.base import Section


class TeacherConfig(Section):
    """The teacher of a distillation."""

    path: str
    strength: float = Field(default=1.0, gt=0)


class SampledDistillationConfig(OnlineConfig):
    """Distill on policy from the teacher's probability of each sampled token."""

    trainer: ClassVar[str] = "rlqwen_example.trainer:SampledDistillationTrainer"
    rewards: ClassVar[Literal["required", "optional", "refused"]] = "optional"

    teacher: TeacherConfig

    def other_models(self) -> dict[str, str]:
        return {"teacher.path": self.teacher.path}
