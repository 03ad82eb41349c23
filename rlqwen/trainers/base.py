"""Train a model: the loop that every algorithm shares, and the parts that it is made of.

An algorithm supplies `step` (one batch of rows to one or more updates), `compute_evaluation` and `prepare_rows`. The
parts are the logger, the evaluator, the checkpointer, the health monitor, the schedule, the updates of a step and the
callbacks, each in its own file.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from rlqwen.checkpoint import explaining_storage_errors, save_model
from rlqwen.checkpoint.fingerprint import digest_rows
from rlqwen.config import Recipe, TrainerConfig
from rlqwen.config.batch_plan import plan_batch, refuse_stream
from rlqwen.data import CleaningReport, DataReport
from rlqwen.data.streams import StreamedRows, as_stream
from rlqwen.distributed import MainRank, ParameterGroup, UpdateResult, build_optimizer_step, pick_device
from rlqwen.errors import ConfigError
from rlqwen.models.loading import align_stop_tokens, check_same_tokens, load_with_reference, split_builtin_arguments
from rlqwen.models.packed_model import PackedModel
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import PackedBatch
from rlqwen.run_folder.lock import lock_run_folder, unlock_run_folder
from rlqwen.trainers.best_checkpoint import BestMetric
from rlqwen.trainers.checkpointer import Checkpointer, Saveable, Stateful
from rlqwen.trainers.data_stream import RowStream
from rlqwen.trainers.evaluator import Evaluator
from rlqwen.trainers.health_monitor import HealthMonitor
from rlqwen.trainers.item_stream import ItemStream
from rlqwen.trainers.loop import TrainingLoop
from rlqwen.trainers.model_source import check_policy, find_tokenizer, name_of, resolve_source, source_folder
from rlqwen.trainers.moving_reference import MovingReference
from rlqwen.trainers.resume import choose_checkpoint, refuse_changes
from rlqwen.trainers.router_loss import RouterLoss
from rlqwen.trainers.run_context import RunContext
from rlqwen.trainers.run_fingerprint import run_fingerprint
from rlqwen.trainers.run_history import RunHistory
from rlqwen.trainers.run_logger import Metrics
from rlqwen.trainers.run_report import note_start, write_results
from rlqwen.trainers.schedule import Schedule
from rlqwen.trainers.step_updates import StepUpdates

Row = TypeVar("Row")
Args = TypeVar("Args", bound=TrainerConfig)
Model = TypeVar("Model", bound=PackedModel)


class Trainer(ABC, Generic[Row, Args, Model]):
    """Hold the model, the data and the parts of a run, and run its loop; see SFTTrainer and GRPOTrainer."""

    algorithm: ClassVar[str]
    config_class: ClassVar[type[TrainerConfig]]
    """Class of `args`; read if a recipe's `algorithm` names the trainer itself."""
    default_best_metric: ClassVar[str]

    def __init__(
        self,
        model: str | nn.Module,
        args: Args,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        reference: bool | nn.Module = False,
    ) -> None:
        """Open the run folder, and load the tokenizer and the model.

        A subclass then reads the data by `load_data`. The arguments are those of the trainers for users; `reference`:
        whether the model needs a frozen copy of its start to compare with, or the model to compare with.
        """
        shape, args = split_builtin_arguments(model, args) if isinstance(model, str) else ({}, args)
        self.context = run = RunContext.open(
            args,
            algorithm=self.algorithm,
            model_name=name_of(model),
            callbacks=callbacks,
            callback_context=lambda: {"model": self.model, "processing_class": self.processing_class},
        )
        self.args: Args = cast(Args, run.args)
        self.output_dir, self.ranks, self.state = run.output_dir, run.ranks, run.state
        self.preemption, self.callbacks, self.logger = run.preemption, run.callbacks, run.logger
        source = resolve_source(model, shape, run)
        self.model_folder = source_folder(source, args)
        """Local folder of the model, if it was given by name."""
        self.processing_class = find_tokenizer(processing_class, source, args)
        self.policy = self.load_policy(source, peft_config=peft_config, reference=reference)
        check_policy(self.policy, self.processing_class)
        self.moving_reference = MovingReference.of(self.policy, self.args)
        self.main_rank = MainRank(self.ranks, self.policy)
        self.router_loss = RouterLoss(self.policy, self.ranks)
        self.train_rows: Sequence[Row] = []
        self.new_stream: Callable[[], ItemStream[Row]] | None = None
        """Start the training data again, if it is a stream; `train_rows` is empty then."""
        self.eval_rows: Sequence[Row] | None = None
        self.reports: dict[str, DataReport] = {}
        """What tokenizing did to the rows, by `train` and `eval`."""
        self.cleaning: CleaningReport | None = None
        """What cleaning did to the rows before that, if a recipe asked for it."""
        self.recipe: Recipe | None = None
        """The recipe that the trainer was built from, if any."""
        self.history = RunHistory()
        self.monitor = HealthMonitor(self.context)
        self.updates = StepUpdates(self.context)
        self._fingerprint: dict[str, Any] | None = None

    def note_other_tokens(self, other: Any, what: str) -> None:
        """Raise ModelError if a model that will read the policy's token ids has other ones; note tokens that it lacks."""
        if note := check_same_tokens(other, self.processing_class, what):
            self.logger.note(note)

    @property
    def model(self) -> nn.Module:
        """Return the transformers model that is trained, adapters included."""
        return cast(nn.Module, self.policy.model)

    # What a trainer supplies

    @abstractmethod
    def step(self, rows: list[Row]) -> Metrics:
        """Train on `rows`, with `plan.updates_per_step` calls of `update`, and return the metrics of the step."""

    @abstractmethod
    def compute_evaluation(self, rows: Sequence[Row]) -> Metrics:
        """Return metrics of the present model on `rows`, without the prefix `eval/`."""

    @abstractmethod
    def prepare_rows(self, dataset: Any, *, evaluation: bool) -> Sequence[Row]:
        """Tokenize a dataset, and keep the report in `reports`."""

    def prepare_stream(self, rows: StreamedRows) -> Callable[[], ItemStream[Row]]:
        """Return a function that starts the training data of a stream again; by default, refuse streams."""
        raise ConfigError(f"{type(self).__name__} cannot train on a stream: give it a dataset or a list of rows")

    def load_policy(self, model: str | nn.Module, *, peft_config: Any, reference: bool | nn.Module) -> Model:
        """Return the model to train, from its folder or hub id or from what was given: a policy, by default."""
        if isinstance(model, str):
            model, reference = load_with_reference(model, self.args, peft_config=peft_config, reference=reference)
        policy = Policy(
            model,
            self.args,
            peft_config=peft_config,
            reference=reference,
            device=pick_device(self.args.use_cpu),
            sequence=self.ranks.sequence,
        )
        return cast(Model, policy)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return what the updates change."""
        names, root = self.policy.trained_names, self.policy.root
        return [ParameterGroup("policy", self.policy.trained_parameters, self.args.learning_rate, names, root)]

    def saved_models(self) -> dict[str, Saveable]:
        """Return the models that a checkpoint holds, by subfolder; `""` is its own folder."""
        models: dict[str, Saveable] = {"": self.policy}
        if self.moving_reference is not None:
            models["reference"] = self.moving_reference
        return models

    def saved_parts(self) -> dict[str, Stateful]:
        """Return the algorithm's own parts whose state a checkpoint holds, by name."""
        return {}

    def fingerprint_entries(self) -> dict[str, Any]:
        """Return what the result depends on beyond model, data and config, by dotted name."""
        return {}

    def close(self) -> None:
        """Free what the trainer holds besides the model; may be called twice."""

    def load_data(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Tokenize the training rows (of a stream, the first ones) and the evaluation rows."""
        rows = as_stream(train_dataset)
        if rows is None:
            self.train_rows = self.prepare_rows(train_dataset, evaluation=False)
        else:
            refuse_stream(self.args)
            self.new_stream = self.prepare_stream(rows)
        if eval_dataset is not None:
            self.eval_rows = self.prepare_rows(eval_dataset, evaluation=True)
        self.evaluator = Evaluator(
            self.compute_evaluation,
            self.eval_rows,
            self.context,
            model=self.policy,
            best=BestMetric(self.args, self.default_best_metric),
        )

    # What users call

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainerState:
        """Train to the end, complete the run folder, and return the state, including its `log_history`.

        `resume_from_checkpoint`: True resumes from the newest complete checkpoint of the run folder, a path from that
        checkpoint; None: as the config says. Raises Preempted, with everything saved, on SIGTERM, SIGUSR1 or SIGHUP; on
        Ctrl-C or a notebook's stop button, Interrupted, which is also a KeyboardInterrupt. A second Ctrl-C leaves at once.
        """
        self.history.start()
        try:
            with explaining_storage_errors(self.output_dir), self.preemption, self.monitor.reporting_the_end():
                self._begin(resume_from_checkpoint)
                self._run_loop()
                self._finish()
                # Otherwise the next recipe of a pipeline would start, on some ranks or on all.
                if any(self.ranks.gather(self.preemption.name is not None)):
                    raise self.preemption.ended("it came after the last update; the run is finished")
        finally:
            self.close()
            self.logger.close()
            unlock_run_folder(self.output_dir)
        return self.state

    def evaluate(self, eval_dataset: Any = None) -> Metrics:
        """Return metrics on `eval_dataset` (None: on the eval set of the constructor), under keys that begin with `eval/`."""
        return self.evaluator.run(None if eval_dataset is None else self.prepare_rows(eval_dataset, evaluation=True))

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

    def fingerprint(self) -> dict[str, Any]:
        """Return what the result depends on; of the weights, as they were when this was first called."""
        if self._fingerprint is None:
            self._fingerprint = run_fingerprint(
                self.algorithm,
                self.args,
                model=self.policy,
                processing_class=self.processing_class,
                train_digest=self.new_stream().digest if self.new_stream else digest_rows(self.train_rows),
                eval_rows=self.eval_rows,
                ranks=self.ranks,
                recipe=self.recipe,
                more=self.fingerprint_entries(),
            )
        return self._fingerprint

    # The run

    def _begin(self, resume: bool | str | Path | None) -> None:
        """Build the parts that need the data, and restore them if the run resumes."""
        main_rank = MainRank(self.ranks)
        main_rank.run(lambda: lock_run_folder(self.output_dir))
        checkpoint = main_rank.run(lambda: choose_checkpoint(resume, self.args, self.output_dir, self.logger.note))
        self.align_stop_tokens()
        fingerprint = self.fingerprint()
        changes: list[str] = []
        if checkpoint is not None:
            allowed = self.args.resume_allow_changes
            changes = refuse_changes(checkpoint, fingerprint, allowed=allowed, note=self.logger.note)
        self.plan = plan_batch(self.args, None if self.new_stream else len(self.train_rows), self.ranks.data_size)
        self.state.max_steps = self.plan.total_updates
        self.stream: RowStream[Row] | ItemStream[Row] = (
            self.new_stream()
            if self.new_stream
            else RowStream(self.train_rows, seed=self.args.seed, shuffle=self.args.shuffle_dataset)
        )
        self.schedule = Schedule(self.context, self.stream, rows_per_step=self.plan.rows_per_step)
        self.optimizer = build_optimizer_step(
            self.parameter_groups(), self.args, total_updates=self.state.max_steps, ranks=self.ranks
        )
        self.monitor.start()
        self.checkpointer = self._build_checkpointer(fingerprint)
        if checkpoint is not None:
            self._resume(checkpoint, changes)
        self.logger.open()
        if self.cleaning and self.ranks.is_main:
            self.cleaning.write(self.output_dir)
        note_start(self.context, cleaning=self.cleaning, reports=self.reports, plan=self.plan, model=self.policy)
        self.callbacks.notify("on_train_begin")
        if checkpoint is not None:
            self.checkpointer.restore_rng_state(checkpoint)

    def _build_checkpointer(self, fingerprint: dict[str, Any]) -> Checkpointer:
        return Checkpointer(
            self.context,
            models=self.saved_models(),
            optimizer=self.optimizer,
            parts={
                "stream": self.stream,
                "evaluator": self.evaluator,
                "callbacks": self.callbacks,
                "history": self.history,
                "logger": self.logger,
                "monitor": self.monitor,
                **self.saved_parts(),
            },
            processing_class=self.processing_class,
            fingerprint=fingerprint,
            recipe=self.recipe,
        )

    def _resume(self, checkpoint: Path, changes: list[str]) -> None:
        self.checkpointer.restore(checkpoint)
        step = self.state.global_step
        entry = {"from": str(checkpoint), "step": step, "changes": changes}
        self.history.resumes = [*self.history.resumes, entry]
        self.logger.note(f"going on after update {step}, from {checkpoint}")
        self.checkpointer.truncate_run_folder(checkpoint)

    def _run_loop(self) -> None:
        if self.args.eval_on_start and self.eval_rows and not self.history.resumes:
            self.evaluator.run_initial()
        TrainingLoop(
            self._train_on_next_rows,
            self.context,
            schedule=self.schedule,
            evaluator=self.evaluator,
            checkpointer=self.checkpointer,
            monitor=self.monitor,
            # The command line prints its own command.
            how_to_resume="" if self.recipe is not None else "; go on with train(resume_from_checkpoint=True)",
        ).run()

    def _train_on_next_rows(self) -> Metrics:
        """Run the algorithm's step on the next rows, and return its metrics with those of the updates."""
        started = time.monotonic()
        self.callbacks.notify("on_step_begin")
        self.updates.start_step()
        before = self.state.global_step
        metrics = self.step(self.stream.take(self.plan.rows_per_step))
        if self.moving_reference is not None:
            self.moving_reference.refresh(self.schedule, before)
        self.state.epoch = self.stream.epoch
        metrics |= {
            "epoch": self.state.epoch,
            **self.updates.metrics(metrics, seconds=time.monotonic() - started),
            **self.policy.routers.metrics(self.ranks.gather),
            **(self.policy.replay.metrics(self.ranks.gather) if self.policy.replay else {}),
        }
        metrics = self.ranks.from_main(metrics)
        self.callbacks.notify("on_step_end")
        return metrics

    def _finish(self) -> None:
        """Complete the run folder; the summary comes last, and says that it is complete."""
        replaced = self.args.load_best_model_at_end and self.checkpointer.load_best(self.policy)
        final = self.evaluator.run_final(model_replaced=replaced)
        if isinstance(self.stream, ItemStream):
            self.logger.note(f"train: read of the stream: {self.stream.summary()}")
        self.save_model(self.output_dir / "final")
        self.callbacks.notify("on_train_end")

        def write() -> None:
            write_results(
                self.context,
                algorithm=self.algorithm,
                evaluator=self.evaluator,
                final=final,
                history=self.history,
                monitor=self.monitor,
            )

        MainRank(self.ranks).run(write)  # an error there must end the other ranks too

    # What a step calls

    def update(self, micro_batches: Sequence[PackedBatch], *, rescale: float = 1.0) -> UpdateResult:
        """Apply the gathered gradient times `rescale`; keep the batch on disk if it was not finite."""
        result = self.updates.apply(self.optimizer, micro_batches, rescale=rescale)
        self.policy.version += 1
        return result
