"""What a run keeps while it trains: its checkpoints, the best of them, and the model at its end."""

from dataclasses import asdict
from pathlib import Path

from rlqwen.checkpoint import drop_old_checkpoints, restore_weights, save_checkpoint, save_model
from rlqwen.trainers.best import BestMetric, Verdict
from rlqwen.trainers.telling import Metrics, Telling


class Saving(Telling):
    """The part of a trainer that writes models, and reads them back."""

    best: BestMetric

    def save_model(self, path: str | Path | None = None) -> Path:
        """Write model and tokenizer to `path` (None: `final/` of the run folder), ready for `from_pretrained`."""
        folder = Path(path or self.output_dir / "final")
        if self.ranks.is_main:
            save_model(folder, self.policy, self.processing_class)
        self.ranks.barrier()
        return folder

    def save_checkpoint(self, *, best: bool = False) -> None:
        """Write `checkpoints/step-NNNNNN`, and drop old ones beyond `save_total_limit`, never the best."""
        folder = self.output_dir / "checkpoints" / f"step-{self.state.global_step:06d}"
        if self.ranks.is_main and not folder.exists():
            save_checkpoint(folder, self.policy, self.processing_class, asdict(self.state), self.save_beside)
            self._notify("on_save")
        if best:
            self.state.best_model_checkpoint = str(folder)
        kept = self.state.best_model_checkpoint
        if self.ranks.is_main:
            drop_old_checkpoints(folder.parent, limit=self.args.save_total_limit, keep=Path(kept) if kept else None)
        self.ranks.barrier()

    def save_beside(self, folder: Path) -> None:
        """Write into a checkpoint's folder what the trainer trains beside the policy."""

    def after_restore(self) -> None:
        """Called when the weights have been replaced by a checkpoint's."""

    def _go_back_to_best(self) -> bool:
        """Load the best checkpoint where `load_best_model_at_end` asks for it; returns whether it did."""
        if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
            return False
        restore_weights(Path(self.state.best_model_checkpoint), self.policy)
        self.after_restore()
        return True

    def _judge(self, metrics: Metrics) -> None:
        """Keep the checkpoint of the best evaluation, and stop where there has been no better one for too long."""
        verdict = self.best.judge(metrics)
        if verdict is Verdict.BEST:
            self.state.best_metric, self.state.best_global_step = self.best.value, self.state.global_step
            if self.args.load_best_model_at_end:
                self.save_checkpoint(best=True)
        elif verdict is Verdict.STOP:
            self._note(f"stopped early at update {self.state.global_step}: {self.best}")
            self.control.should_training_stop = True
