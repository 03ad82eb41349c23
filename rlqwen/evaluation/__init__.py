"""Measure a model, as `rlqwen eval` does: by rewards, by comparison with right answers, by perplexity, or against another."""

from rlqwen.evaluation.eval_config import EvalConfig, evaluation_config
from rlqwen.evaluation.eval_tables import show_evaluation
from rlqwen.evaluation.result import EvalResult
from rlqwen.evaluation.run import evaluate_model

__all__ = ["EvalConfig", "EvalResult", "evaluate_model", "evaluation_config", "show_evaluation"]
