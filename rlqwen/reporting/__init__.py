"""Report on runs: metric sinks, the display, completions, curves and the summary. Imports no torch."""

from rlqwen.reporting.completions import CompletionLog, read_completions
from rlqwen.reporting.curves import plot_curves, plot_pipeline
from rlqwen.reporting.logger import MetricLogger
from rlqwen.reporting.sinks import read_metrics
from rlqwen.reporting.summary import read_summary, write_pipeline_summary, write_summary

__all__ = [
    "CompletionLog",
    "MetricLogger",
    "plot_curves",
    "plot_pipeline",
    "read_completions",
    "read_metrics",
    "read_summary",
    "write_pipeline_summary",
    "write_summary",
]
