"""Clean training rows: mask, filter and deduplicate them, count each step, and cache the outcome."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlqwen.config.cleaning import CleaningConfig
from rlqwen.data.cleaning.cache import cache_folder, load_outcome, store_outcome
from rlqwen.data.cleaning.cleaning_report import CleaningReport, make_report
from rlqwen.data.cleaning.outcome import Outcome
from rlqwen.data.cleaning.steps import find_outcome
from rlqwen.data.cleaning.texts import Row
from rlqwen.data.views import Selected, View
from rlqwen.errors import DataError
from rlqwen.terminal import get_logger

logger = get_logger(__name__)

__all__ = ["CleanedRows", "CleaningReport", "clean_rows"]


@dataclass(slots=True)
class CleanedRows:
    """Hold the cleaned rows and the report."""

    train: Sequence[Row]
    eval: Sequence[Row] | None
    report: CleaningReport


def clean_rows(rows: Sequence[Row], config: CleaningConfig, eval_rows: Sequence[Row] | None = None) -> CleanedRows:
    """Clean normalized training rows and mask the eval rows, with the steps of CleaningConfig in their order.

    The same rows and config give the same result, which is read from the cache if it is there. The given rows are not
    changed. Raises ConfigError for a filter that applies to no row, and DataError if no row is left.
    """
    folder = cache_folder(rows, eval_rows, config)
    outcome = load_outcome(folder)
    from_cache = outcome is not None
    if outcome is None:
        outcome = find_outcome(rows, eval_rows, config)
    masked = outcome.apply(rows, "train")
    report = make_report(outcome, masked, eval_rows, folder=folder, from_cache=from_cache)
    if not from_cache:
        _store(folder, outcome, report)
    if not report.num_kept:
        reasons = ", ".join(f"{count} by {reason}" for reason, count in report.dropped.items())
        raise DataError(
            f"data.cleaning left none of {len(rows)} training rows: {reasons}; loosen these keys, or look at what they "
            f"dropped in {report.folder or 'the data'}"
        )
    kept = Selected(masked, array("q", outcome.survivors(len(rows))))
    return CleanedRows(
        train=kept if isinstance(rows, View) else list(kept),
        eval=None if eval_rows is None else outcome.apply(eval_rows, "eval"),
        report=report,
    )


def _store(folder: Path, outcome: Outcome, report: CleaningReport) -> None:
    """Store the outcome in the cache; only log a failure, because the cache just saves time."""
    try:
        store_outcome(folder, outcome)
        report.write(folder)
    except OSError as error:
        report.folder = None
        logger.warning(
            "the outcome of cleaning cannot be cached in %s (%s); set data.cleaning.cache_dir or the environment "
            "variable RLQWEN_CACHE to a folder that can be written to",
            folder.parent,
            error.strerror,
        )
