"""The loop that every trainer shares: batches, schedule of evaluations and checkpoints, logging, the ends of a run.

A trainer supplies `step` (one batch of rows to one or more updates) and `evaluate`; everything else is here.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, set_seed

from rlqwen.checkpoint import is_storage_error, open_run_folder
from rlqwen.config import SyncedReference, TrainerConfig
from rlqwen.data import CleaningReport, DataReport
from rlqwen.data.streams import StreamedRows, as_stream
from rlqwen.distributed import MainRank, ParameterGroup, UpdateResult, build_optimizer_step, pick_device
from rlqwen.errors import NonFiniteError, RolloutError, SaveError
from rlqwen.models.hub import check_vocabulary, commits
from rlqwen.models.loading import (
    load_model,
    load_tokenizer,
    local_folder,
    split_builtin_arguments,
    take_eos_token,
    text_tokenizer,
)
from rlqwen.models.packed_model import PackedModel
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import resolve_model_path
from rlqwen.packing.batch import PackedBatch
from rlqwen.preflight import plan_batch, refuse_stream
from rlqwen.reporting import plot_curves, read_metrics, write_summary
from rlqwen.run_folder.layout import refuse_needed_inside
from rlqwen.run_folder.lock import lock_run_folder, unlock_run_folder
from rlqwen.trainers.best_checkpoint import BestMetric
from rlqwen.trainers.data_stream import RowStream
from rlqwen.trainers.evaluating import Evaluating
from rlqwen.trainers.item_stream import ItemStream
from rlqwen.trainers.micro_batching import count_tokens
from rlqwen.trainers.preemption import Preemption
from rlqwen.trainers.scheduling import Scheduling
from rlqwen.trainers.telling import Metrics
from rlqwen.trainers.watching import Watching

Row = TypeVar("Row")
Args = TypeVar("Args", bound=TrainerConfig)


class Trainer(Evaluating, Scheduling, Watching, Generic[Row, Args]):
    """See SFTTrainer and GRPOTrainer for what users call."""

    algorithm: ClassVar[str]
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
        super().__init__(args, callbacks)
        set_seed(args.seed)
        self.preemption = Preemption()
        config: Any = None if isinstance(model, str) else model.config
        model_name = model if isinstance(model, str) else config._name_or_path or type(model).__name__
        self.args: Args = args
        default_name = f"{self.algorithm}-{Path(model_name).name}"
        needed = {"model": model_name, "ref_model": getattr(args, "ref_model", None)}
        self.output_dir = MainRank(self.ranks).run(lambda: self._open_run_folder(default_name, needed))
        self.model_folder: str | None = None
        """Local folder of the model, where it was given by name."""
        if isinstance(model, str):
            shape, args = split_builtin_arguments(model, args)
            model_name = MainRank(self.ranks).run(
                lambda: resolve_model_path(model, self.output_dir / "base_model", **shape)
            )
            self.model_folder = local_folder(model_name, args.model_init_kwargs.get("revision"))
        self.args = args
        self.processing_class = text_tokenizer(processing_class) or load_tokenizer(model_name, args)
        take_eos_token(self.processing_class, getattr(args, "eos_token", None))
        self.policy = self.load_policy(
            model_name if isinstance(model, str) else model, peft_config=peft_config, reference=reference
        )
        self.policy.check_trainable()
        own = self.policy.base_model.config
        for config in (own, getattr(self.policy, "reference_config", own)):
            check_vocabulary(self.processing_class, config, f"model {config._name_or_path!r}")
        self._counted: Sequence[PackedBatch] | None = None
        """The micro-batches that `_tokens_per_update` is of."""
        self._tokens_per_update = 0.0
        self.main_rank = MainRank(self.ranks, self.policy)
        self.train_rows: Sequence[Row] = []
        self.new_stream: Callable[[], ItemStream[Row]] | None = None
        """Begins the training data where that is a stream; `train_rows` is empty then."""
        self.eval_rows: Sequence[Row] | None = None
        self.best = BestMetric(args, self.default_best_metric)
        self.reports: dict[str, DataReport] = {}
        """What tokenising the data did, by `train` and `eval`."""
        self.cleaning: CleaningReport | None = None
        """What cleaning did to the rows before that, where a recipe asked for it."""

    def _open_run_folder(self, default_name: str, needed: dict[str, Any]) -> Path:
        """Open the run folder for this process, or refuse it; `needed`: files that a cleared one must not hold."""
        if self.args.output_dir and self.args.overwrite_output_dir and not self.args.resume_from_checkpoint:
            names = {key: name for key, name in needed.items() if isinstance(name, str) and name}
            refuse_needed_inside(self.args.output_dir, names)
        folder = open_run_folder(
            self.args.output_dir,
            default_name,
            overwrite=self.args.overwrite_output_dir,
            resume=bool(self.args.resume_from_checkpoint),
        )
        lock_run_folder(folder)
        return folder

    def load_policy(self, model: str | nn.Module, *, peft_config: Any, reference: bool | nn.Module) -> PackedModel:
        """The model that is trained, from its folder or hub id or from what was given."""
        return Policy(
            load_model(model, self.args) if isinstance(model, str) else model,
            self.args,
            peft_config=peft_config,
            reference=reference,
            device=pick_device(self.args.use_cpu),
            sequence=self.ranks.sequence,
        )

    def read_training_data(self, dataset: Any) -> None:
        """Tokenise the training rows, or the first rows of a stream."""
        rows = as_stream(dataset)
        if rows is None:
            self.train_rows = self.prepare_rows(dataset, evaluation=False)
            return
        refuse_stream(self.args)
        self.new_stream = self.prepare_stream(rows)

    def prepare_stream(self, rows: StreamedRows) -> Callable[[], ItemStream[Row]]:
        """Return a function that begins the training data of a stream again."""
        raise NotImplementedError  # `refuse_stream` knows who has one

    # What a trainer supplies

    @abstractmethod
    def step(self, rows: list[Row]) -> Metrics:
        """Train on `rows`, with `plan.updates_per_step` calls of `update`."""

    def close(self) -> None:
        """Free what the trainer holds beside the model; may be called twice."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the updates change."""
        names = self.policy.trained_names
        return [
            ParameterGroup("policy", self.policy.trained_parameters, self.args.learning_rate, names, self.policy.root)
        ]

    # What users call

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainerState:
        """Train to the end, and complete the run folder. Return the state, including its `log_history`.

        `resume_from_checkpoint`: True goes on from the newest complete checkpoint of the run folder, a path from that
        one; None: as the config says. Raises Preempted, all saved, when SIGTERM, SIGUSR1 or SIGHUP came, and on Ctrl-C
        or a notebook's stop Interrupted, which is a KeyboardInterrupt too; a second Ctrl-C leaves at once.
        """
        self._started = self._last_save = time.monotonic()
        try:
            with self.preemption, self.watched():
                self._begin(resume_from_checkpoint)
                self._train_to_the_end()
                self._finish()
                # Else the next recipe of a pipeline would begin, on some ranks or on all.
                if any(self.ranks.gather(self.preemption.name is not None)):
                    raise self.preemption.ended("it came after the last update; the run is finished")
        except OSError as error:
            if isinstance(error, SaveError) or not is_storage_error(error):
                raise
            raise SaveError(f"the run folder {self.output_dir} cannot be written to: {error}") from error
        finally:
            self.close()
            self._close_logger()
            unlock_run_folder(self.output_dir)
        return self.state

    def _finish(self) -> None:
        """Leave the run folder complete; the summary comes last, and says that it is."""
        restored = self._go_back_to_best()
        final = self._final_evaluation(restored) if self.eval_rows else None
        if isinstance(self.stream, ItemStream):
            self._note(f"train: read of the stream: {self.stream.summary()}")
        self.save_model(self.output_dir / "final")
        self._notify("on_train_end")
        MainRank(self.ranks).run(lambda: self._write_results(final))  # what fails there must end the other ranks too

    def _write_results(self, final: Metrics | None) -> None:
        if read_metrics(self.output_dir):  # none if a finished checkpoint was resumed into another folder
            plot_curves(self.output_dir)
        write_summary(
            self.output_dir,
            algorithm=self.algorithm,
            steps=self.state.global_step,
            wall_time_s=self.wall_time_s,
            initial_eval=self._initial_eval,
            final_eval=final,
            seed=self.args.seed,
            watch=self.watch_summary(),
            hub_commits=commits(),
            **({"resumed": self._resumed} if self._resumed else {}),
        )

    # The loop

    def _begin(self, resume: bool | str | Path | None) -> None:
        MainRank(self.ranks).run(lambda: lock_run_folder(self.output_dir))
        checkpoint = MainRank(self.ranks).run(lambda: self._choose_checkpoint(resume))
        self.align_stop_tokens()
        self.origin()
        if checkpoint is not None:
            self._refuse_changes(checkpoint)
        num_rows = None if self.new_stream else len(self.train_rows)
        self.plan = plan_batch(self.args, num_rows, self.ranks.data_size)
        self.state.max_steps = self.plan.total_updates
        self.stream = (
            self.new_stream()
            if self.new_stream
            else RowStream(self.train_rows, seed=self.args.seed, shuffle=self.args.shuffle_dataset)
        )
        self.optimizer = build_optimizer_step(
            self.parameter_groups(), self.args, total_updates=self.state.max_steps, ranks=self.ranks
        )
        self._open_watch()
        if checkpoint is not None:
            self._restore(checkpoint)
        self._open_logger(self.state.max_steps)
        if self.cleaning and self.ranks.is_main:
            self.cleaning.write(self.output_dir)
        cleaning = {"cleaning": self.cleaning} if self.cleaning else {}
        for name, report in (cleaning | self.reports).items():
            self._note(f"{name}: {report.summary()}")
            if isinstance(report, DataReport) and report.source:
                self._note(f"{name}: {report.source}")
            for warning in report.warnings:
                self._note(f"{name}: warning: {warning}")
            for note in [*report.form, *report.notes] if isinstance(report, DataReport) else ():
                self._note(f"{name}: {note}")
        self._note(self.plan.text)
        if unused := self.args.parallel.unused_note():
            self._note(unused)
        for note in (self.policy.kept_note, self.policy.frozen_note, *self.policy.notes, self.policy.routers.note):
            if note:
                self._note(note)
        self._notify("on_train_begin")
        if checkpoint is not None:
            self._restore_random_state(checkpoint)

    def _train_to_the_end(self) -> None:
        if self.args.eval_on_start and self.eval_rows and not self._resumed:
            self._initial_eval = self.evaluate()
            self.best.find_key(self._initial_eval)  # sooner than after the first updates
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.preemption.listen()
            try:
                self._one_step()
            except RolloutError as error:
                # A scheduler's signal may reach the workers too, and end them before the update is done.
                if self.preemption.name is None:
                    raise
                raise self.preemption.ended("the update in progress was lost" + self._how_to_go_on) from error
            self.preemption.worth_saving = self._saved_step != self.state.global_step
            if any(self.ranks.gather(self.preemption.name is not None)):
                self.save_checkpoint()
                raise self.preemption.ended(f"saved after update {self.state.global_step}" + self._how_to_go_on)

    @property
    def _how_to_go_on(self) -> str:
        """Return how a script resumes; the command line prints its own command."""
        return "" if self.recipe is not None else "; go on with train(resume_from_checkpoint=True)"

    def _one_step(self) -> None:
        before = self.state.global_step
        started = time.monotonic()
        self._notify("on_step_begin")
        self.updates: list[UpdateResult] = []
        metrics = self.step(self.stream.take(self.plan.rows_per_step))
        self.state.epoch = self.stream.epoch
        metrics |= {
            "grad_norm": self.updates[-1].grad_norm,
            "learning_rate": self.updates[-1].lr,
            "updates/skipped": float(sum(update.skipped for update in self.updates)),
            "epoch": self.state.epoch,
            "time/step": time.monotonic() - started,
            **self.policy.routers.metrics(self.ranks.gather),
            **(self.policy.replay.metrics(self.ranks.gather) if self.policy.replay else {}),
        }
        metrics = self.ranks.from_main(metrics)
        self._notify("on_step_end")
        if self._due(self.args.logging_steps, before) or self.control.should_log:
            self._log(metrics)
        if self._watch(metrics):
            return  # the step is undone
        if self._scheduled(self.args.eval_strategy, self.args.eval_steps or self.args.logging_steps, before):
            self.control.should_evaluate = True
        if self._scheduled(self.args.save_strategy, self.args.save_steps, before) or self._minutes_have_passed():
            self.control.should_save = True
        self._agree()
        if self.control.should_evaluate and self.eval_rows:
            metrics = self.evaluate()
            if self.args.load_best_model_at_end or self.args.early_stopping_patience is not None:
                self._judge(metrics)
        if self.control.should_save:
            self.save_checkpoint()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def update(self, micro_batches: Sequence[PackedBatch]) -> UpdateResult:
        """Carry out the update whose gradient has been gathered; keeps the batch where it was not finite."""
        self.state.global_step += 1
        try:
            result = self.optimizer.step()
        except NonFiniteError:
            self._keep_nonfinite(micro_batches)
            raise
        self.updates.append(result)
        if result.skipped:
            self._keep_nonfinite(micro_batches)
        return result

    def router_loss(
        self, micro: PackedBatch, micro_batches: Sequence[PackedBatch], model: PackedModel | None = None
    ) -> Tensor | float:
        """Load-balancing loss of the experts in the forward just made on `micro`, 0 without any; `model` None: policy.

        Each micro-batch's loss counts by its share of the update's tokens. The load is the micro-batch's own, so unlike
        other losses this one depends on the split, as it does in TRL. `micro_batches`: this rank's of the update.
        """
        model = model or self.policy
        if not model.routers.coefficient:
            return 0.0
        return model.router_loss(self.token_share(micro, micro_batches))

    def token_share(self, micro: PackedBatch, micro_batches: Sequence[PackedBatch]) -> float:
        """What share of the tokens that the update has on all ranks, prefixes once each, the micro-batch has."""
        if self._counted is not micro_batches:
            self._counted = micro_batches
            self._tokens_per_update = self.ranks.sum({"tokens": count_tokens(micro_batches)})["tokens"]
        return count_tokens([micro]) / self._tokens_per_update

    def _keep_nonfinite(self, micro_batches: Sequence[PackedBatch]) -> None:
        folder = self.output_dir / "nonfinite"
        folder.mkdir(exist_ok=True)
        name = f"step-{self.state.global_step:06d}" + (f"-rank{self.ranks.rank}" if self.ranks.rank else "")
        for number, batch in enumerate(micro_batches):
            save_file(batch.tensors(), folder / f"{name}-{number}.safetensors")

    def refresh_reference(self, args: SyncedReference, before: int) -> None:
        """Mix the policy into the reference where that fell due since update `before`."""
        if args.sync_ref_model and self._scheduled("steps", args.ref_model_sync_steps, before):
            self.policy.refresh_reference(args.ref_model_mixup_alpha)
