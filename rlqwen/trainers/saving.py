"""What a run keeps while it trains: its checkpoints, the best of them, and the model at its end."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_callback import ExportableState

from rlqwen.checkpoint import (
    Retention,
    checkpoint_folder,
    find_fault,
    random_state,
    restore_weights,
    same_random_state,
    save_model,
    sync_file,
    write_checkpoint,
    write_values,
)
from rlqwen.checkpoint.fingerprint import (
    config_origin,
    digest_rows,
    digest_tokenizer,
    flatten,
    package_origin,
    reward_origin,
)
from rlqwen.config import Recipe
from rlqwen.config.recipe_yaml import write_resolved
from rlqwen.data import DataReport
from rlqwen.distributed import OptimizerStep, Ranks
from rlqwen.models.carried_weights import carried_by
from rlqwen.models.loading import align_stop_tokens
from rlqwen.models.reference_cache import digest_config, digest_weights
from rlqwen.rewards.registry import Reward
from rlqwen.run_folder.layout import METRICS_FILE, RECIPE_FILE
from rlqwen.secrets import redact_values
from rlqwen.trainers.best_checkpoint import BestMetric, Verdict
from rlqwen.trainers.data_stream import RowStream
from rlqwen.trainers.item_stream import ItemStream
from rlqwen.trainers.telling import Metrics, Telling

STATE_FILE = "trainer_state.json"
PROGRESS = "progress"
ORIGIN = "origin"
RANDOM = "random"


class Saving(Telling):
    """The part of a trainer that writes models and checkpoints."""

    best: BestMetric
    ranks: Ranks
    stream: RowStream[Any] | ItemStream[Any]
    new_stream: Callable[[], ItemStream[Any]] | None
    train_rows: Sequence[Any]
    eval_rows: Sequence[Any] | None
    optimizer: OptimizerStep
    reports: dict[str, DataReport]
    rewards: list[Reward] = []  # noqa: RUF012 - trainers without rewards have none
    recipe: Recipe | None = None
    """What the trainer was built from, where that was a recipe."""

    _origin: dict[str, Any] | None = None
    _saved_step = -1
    _initial_eval: Metrics | None = None
    _resumed: list[dict[str, Any]] = []  # noqa: RUF012 - replaced, never changed
    _earlier_s = 0.0
    """Seconds that the run took before it went on from a checkpoint."""
    _started = _last_save = 0.0

    def save_model(self, path: str | Path | None = None) -> Path:
        """Write model and tokenizer to `path` (None: `final/` of the run folder), ready for `from_pretrained`."""
        folder = Path(path or self.output_dir / "final")
        self.align_stop_tokens()
        save_model(folder, self.policy, self.processing_class, write=self.ranks.is_main)
        self.ranks.barrier()
        return folder

    def align_stop_tokens(self) -> None:
        """Write the tokens at which the model learns to stop to the model's configs."""
        report = self.reports.get("train")
        align_stop_tokens(self.policy.base_model, self.processing_class, report.end_of_turn if report else None)

    def save_checkpoint(self, *, best: bool = False) -> None:
        """Write `checkpoints/step-NNNNNN`, and drop old ones as `save_total_limit` says, never the best."""
        folder = checkpoint_folder(self.output_dir, self.state.global_step)
        if best:
            self.state.best_model_checkpoint = str(folder)
        if self._saved_step != self.state.global_step:
            if self.ranks.is_main:
                sync_file(self.output_dir / METRICS_FILE)  # the checkpoint counts on it, after a power cut too
            with same_random_state():
                write_checkpoint(folder, self._fill, self.ranks)
            self._saved_step = self.state.global_step
            self._last_save = time.monotonic()
            self._notify("on_save")
        if self.ranks.is_main:
            kept = self.state.best_model_checkpoint
            retention = Retention(self.args.save_total_limit, self.args.save_keep_every)
            retention.drop_old(folder.parent, best=Path(kept) if kept else None)

    def _fill(self, folder: Path) -> None:
        """Write the files of a checkpoint; on every rank, each file by one."""
        self.policy.save_trained(folder, write=self.ranks.is_main)
        self.save_beside(folder)
        if self.ranks.is_main:
            self.processing_class.save_pretrained(folder)
            self.state.stateful_callbacks = {  # type: ignore[assignment]  # what it becomes, as transformers writes it
                type(callback).__name__: callback.state()
                for callback in self.callbacks
                if isinstance(callback, ExportableState)
            }
            (folder / STATE_FILE).write_text(json.dumps(asdict(self.state), indent=1) + "\n", "utf-8")
            if self.recipe is not None:
                write_resolved(self.recipe, folder / RECIPE_FILE)
        if self.args.save_only_model or self.args.parallel.autotp_size > 1:
            return
        if self.ranks.is_main:
            write_values(folder, PROGRESS, self.progress())
            write_values(folder, ORIGIN, self.origin())
        self.optimizer.save(folder)
        write_values(folder, f"{RANDOM}-{self.ranks.rank}", random_state())

    def save_beside(self, folder: Path) -> None:
        """Write into a checkpoint's folder what the trainer keeps beside the policy: files and folders of its own; on
        every rank, the main one writing."""
        if getattr(self.args, "sync_ref_model", False) and self.ranks.is_main:
            self.policy.save_reference(folder)

    def restore_beside(self, folder: Path) -> None:
        """Read back what `save_beside` wrote."""
        if getattr(self.args, "sync_ref_model", False):
            self.policy.restore_reference(folder)

    def after_restore(self) -> None:
        """Called when the weights have been replaced by a checkpoint's."""

    def progress(self) -> dict[str, Any]:
        """How far the run has come, as plain values and tensors; what `restore_progress` takes."""
        metrics = self.output_dir / METRICS_FILE
        return {
            "stream": self.stream.progress(),
            "best": self.best.progress(),
            "should_training_stop": self.control.should_training_stop,
            "initial_eval": self._initial_eval,
            "wall_time_s": self.wall_time_s,
            "resumed": self._resumed,
            "metrics_bytes": metrics.stat().st_size if metrics.is_file() else 0,
        }

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Go on from there."""
        self.stream.restore_progress(progress["stream"])
        self.best.restore_progress(progress["best"])
        self.control.should_training_stop = progress["should_training_stop"]
        self._initial_eval = progress["initial_eval"]
        self._earlier_s = progress["wall_time_s"]
        self._resumed = progress["resumed"]

    @property
    def wall_time_s(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._earlier_s + time.monotonic() - self._started

    def origin(self) -> dict[str, Any]:
        """What the result depends on; of the weights, as they are when this is called first."""
        if self._origin is None:
            policy = self.policy
            self._origin = {
                "algorithm": self.algorithm,
                "world_size": self.ranks.world_size,
                "device": policy.device.type,
                **package_origin(),
                "model.weights": digest_weights(policy.model.state_dict()),
                "model.config": digest_config(policy.base_model.config),
                "model.dtype": f"{policy.original_dtype}, computing in {policy.compute_dtype}",
                "tokenizer": digest_tokenizer(self.processing_class),
                "data.train": self.new_stream().digest if self.new_stream else digest_rows(self.train_rows),
                "data.eval": digest_rows(self.eval_rows) if self.eval_rows else None,
                **reward_origin(self.rewards),
                **config_origin(self.args.model_dump(mode="json")),
            }
            carried = carried_by(policy.base_model)
            if carried and carried.weights:
                self._origin["model.carried"] = carried.digest()
            if self.recipe is not None:
                self._origin |= flatten([spec.model_dump(mode="json") for spec in self.recipe.rewards], "rewards")
            if isinstance(policy.model, PeftModel):
                for name, config in policy.model.peft_config.items():
                    self._origin |= flatten(config.to_dict(), f"adapter.{name}")
            self._origin = redact_values(self._origin)  # a recipe may quote one to a reward
            if getattr(policy, "has_reference", False) and not policy.has_adapter:
                self._origin["reference.weights"] = digest_weights(policy.reference_weights())
        return self._origin

    def _go_back_to_best(self) -> bool:
        """Load the best checkpoint where `load_best_model_at_end` asks for it; returns whether it did."""
        if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
            return False
        folder = Path(self.state.best_model_checkpoint)
        fault = find_fault(folder)
        if fault is not None:
            self._note(f"the best checkpoint {folder} cannot be gone back to, and the last weights are kept: {fault}")
            return False
        restore_weights(folder, self.policy)
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
