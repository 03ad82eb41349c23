"""What a run tells while it trains: metrics to the logger, notes for people, events to callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from rlqwen.config import TrainerConfig
from rlqwen.distributed import Ranks
from rlqwen.reporting import MetricLogger

Metrics = dict[str, float]


class Telling:
    """The part of a trainer that reports."""

    algorithm: ClassVar[str]
    args: TrainerConfig
    output_dir: Path
    policy: Any
    """A Policy, or the ScalarModel of a reward trainer."""
    ranks: Ranks
    processing_class: PreTrainedTokenizerBase

    def __init__(self, args: TrainerConfig, callbacks: Sequence[TrainerCallback] | None) -> None:
        self.callbacks = list(callbacks or ())
        self.ranks = Ranks(args.parallel)
        self.state = TrainerState(
            is_world_process_zero=self.ranks.is_main, is_local_process_zero=self.ranks.local_rank == 0
        )
        self.control = TrainerControl()
        self.logger: MetricLogger | None = None
        """Open while training."""
        self._held_notes: list[str] = []
        """Notes from before the logger was open."""

    @property
    def model(self) -> nn.Module:
        return self.policy.model  # type: ignore[no-any-return]

    def _open_logger(self, total_steps: int) -> None:
        if not self.ranks.is_main:
            return
        self.logger = MetricLogger(
            self.output_dir,
            report_to=self.args.report_to,
            run_name=self.args.run_name,
            display=False if self.args.disable_tqdm else None,
            total_steps=total_steps,
            algorithm=self.algorithm,
            resumed_at=self.state.global_step or None,
        )
        for text in self._held_notes:
            self.logger.note(text)
        self._held_notes.clear()

    def _close_logger(self) -> None:
        if self.logger is not None:
            self.logger.close()
            self.logger = None

    def _log(self, metrics: Metrics) -> None:
        if self.logger is not None:
            self.logger.log(self.state.global_step, metrics)
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        self._notify("on_log", logs=metrics)

    def _note(self, text: str) -> None:
        if not self.ranks.is_main:
            return
        if self.logger is None:
            self._held_notes.append(text)
        else:
            self.logger.note(text)

    def _notify(self, event: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            answer = getattr(callback, event)(
                self.args,
                self.state,
                self.control,
                model=self.model,
                processing_class=self.processing_class,
                **kwargs,
            )
            self.control = answer or self.control
