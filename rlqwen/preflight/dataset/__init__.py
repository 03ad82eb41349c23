"""Check a data set before training: what is in it, what training would make of it, and its rows with their loss
masks."""

from rlqwen.preflight.dataset.check_target import CheckTarget, find_target
from rlqwen.preflight.dataset.dataset_check import DatasetCheck, PartCheck, check_dataset
from rlqwen.preflight.dataset.dataset_report import show_dataset_check
from rlqwen.preflight.dataset.row_display import show_rows

__all__ = [
    "CheckTarget",
    "DatasetCheck",
    "PartCheck",
    "check_dataset",
    "find_target",
    "show_dataset_check",
    "show_rows",
]
