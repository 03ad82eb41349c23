"""A close look at data: what is in it, what training would make of it, and the rows themselves with their masks."""

from rlqwen.preflight.dataset.check_display import show_audit
from rlqwen.preflight.dataset.dataset_check import DataAudit, PartAudit, audit_data
from rlqwen.preflight.dataset.row_display import show_rows
from rlqwen.preflight.dataset.subject import Subject, find_subject

__all__ = ["DataAudit", "PartAudit", "Subject", "audit_data", "find_subject", "show_audit", "show_rows"]
