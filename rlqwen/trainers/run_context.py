"""Open a run, and hold what all parts of a trainer share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, set_seed

from rlqwen.config import TrainerConfig
from rlqwen.distributed import MainRank, Ranks
from rlqwen.run_folder.lifecycle import open_locked_folder
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

    @classmethod
    def open(
        cls,
        args: TrainerConfig,
        *,
        algorithm: str,
        model_name: str,
        callbacks: Sequence[TrainerCallback] | None,
        callback_context: Callable[[], dict[str, Any]],
    ) -> "RunContext":
        """Divide the batch among the ranks, set the seed, open and lock the run folder, and build what the parts share."""
        ranks = Ranks(args.parallel)
        args = args.for_ranks(ranks.data_size)
        state = TrainerState(is_world_process_zero=ranks.is_main, is_local_process_zero=ranks.local_rank == 0)
        set_seed(args.seed)
        preemption = Preemption()
        needed = {"model": model_name, **args.other_models()}
        default_folder = f"{algorithm}-{Path(model_name).name}"
        output_dir = MainRank(ranks).run(lambda: open_locked_folder(args, default_folder, needed))
        called = Callbacks(callbacks, args, state, callback_context)
        logger = RunLogger(output_dir, args, algorithm=algorithm, state=state, callbacks=called, is_main=ranks.is_main)
        return cls(output_dir, args, ranks, state, preemption, called, logger)
