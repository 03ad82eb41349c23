"""Hold what all parts of a trainer share."""

from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState

from rlqwen.config import TrainerConfig
from rlqwen.distributed import Ranks
from rlqwen.trainers.callbacks import Callbacks
from rlqwen.trainers.preemption import Preemption
from rlqwen.trainers.run_logger import RunLogger


@dataclass(frozen=True, slots=True)
class RunContext:
    """The run that a part belongs to; a part takes of it what it needs."""

    output_dir: Path
    """The run folder."""
    args: TrainerConfig
    ranks: Ranks
    state: TrainerState
    preemption: Preemption
    callbacks: Callbacks
    logger: RunLogger
