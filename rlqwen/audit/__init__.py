"""A close look at data: what is in it, what training would make of it, and the rows themselves with their masks."""

from rlqwen.audit.audit import DataAudit, PartAudit, audit_data
from rlqwen.audit.display import show_audit
from rlqwen.audit.rows import show_rows
from rlqwen.audit.subject import Subject, find_subject

__all__ = ["DataAudit", "PartAudit", "Subject", "audit_data", "find_subject", "show_audit", "show_rows"]
