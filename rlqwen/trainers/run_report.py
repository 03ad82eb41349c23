"""Tell the user what a run trains on, and write its results at the end."""

from collections.abc import Mapping
from typing import Any

from rlqwen.config.batch_plan import BatchPlan
from rlqwen.data import CleaningReport, DataReport
from rlqwen.models.hub import commits
from rlqwen.models.packed_model import PackedModel
from rlqwen.reporting import plot_curves, read_metrics, write_summary
from rlqwen.trainers.evaluator import Evaluator
from rlqwen.trainers.health_monitor import HealthMonitor
from rlqwen.trainers.run_context import RunContext
from rlqwen.trainers.run_history import RunHistory
from rlqwen.trainers.run_logger import Metrics


def note_start(
    run: RunContext,
    *,
    cleaning: CleaningReport | None,
    reports: Mapping[str, DataReport],
    plan: BatchPlan,
    model: PackedModel,
) -> None:
    """Note what became of the rows, how they become updates, and what of the model is trained."""
    if cleaning is not None:
        for line in (cleaning.summary(), *(f"warning: {warning}" for warning in cleaning.warnings)):
            run.logger.note(f"cleaning: {line}")
    for name, report in reports.items():
        source = [report.source] if report.source else []
        warnings = [f"warning: {warning}" for warning in report.warnings]
        for line in (report.summary(), *source, *warnings, *report.form, *report.notes):
            run.logger.note(f"{name}: {line}")
    of_model = (model.kept_note, model.frozen_note, *model.notes, model.routers.note)
    for note in (plan.text, run.args.parallel.unused_note(), *of_model):
        if note:
            run.logger.note(note)


def write_results(
    run: RunContext,
    *,
    algorithm: str,
    evaluator: Evaluator[Any],
    final: Metrics | None,
    history: RunHistory,
    monitor: HealthMonitor,
) -> None:
    """Write the curves and the summary; the summary comes last, and says that the run folder is complete."""
    if read_metrics(run.output_dir):  # none if a finished checkpoint was resumed into another folder
        plot_curves(run.output_dir)
    write_summary(
        run.output_dir,
        algorithm=algorithm,
        steps=run.state.global_step,
        wall_time_s=history.wall_time_s,
        initial_eval=evaluator.initial,
        final_eval=final,
        seed=run.args.seed,
        watch=monitor.summary(),
        hub_commits=commits(),
        **({"resumed": history.resumes} if history.resumes else {}),
    )
