"""`rlqwen eval`: measure a model by rewards, by comparison with right answers, by perplexity, or against another."""

from rlqwen.evaluation.config import EvalConfig, evaluation_config
from rlqwen.evaluation.result import EvalResult
from rlqwen.evaluation.run import evaluate_model
from rlqwen.evaluation.show import show_evaluation

__all__ = ["EvalConfig", "EvalResult", "evaluate_model", "evaluation_config", "show_evaluation"]
