"""What a run reports: metric sinks, the display, completions, curves and the summary. No torch."""

from rlqwen.metrics.completions import CompletionLog, read_completions
from rlqwen.metrics.curves import plot_curves, plot_pipeline
from rlqwen.metrics.logger import MetricLogger
from rlqwen.metrics.run_folder import refuse_used_folder
from rlqwen.metrics.sinks import read_metrics
from rlqwen.metrics.summary import read_summary, write_pipeline_summary, write_summary

__all__ = [
    "CompletionLog",
    "MetricLogger",
    "plot_curves",
    "plot_pipeline",
    "read_completions",
    "read_metrics",
    "read_summary",
    "refuse_used_folder",
    "write_pipeline_summary",
    "write_summary",
]
