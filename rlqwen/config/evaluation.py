"""Evaluation of generated text."""

from typing import Literal

from pydantic import Field

from rlqwen.config.base import ArgumentsConfig

TextMetric = Literal["bleu", "chrf", "rouge", "exact_match", "label"]


class EvalGenerationConfig(ArgumentsConfig):
    """Evaluation of SFT by what the model writes: sampled in the trainer's own process, by transformers."""

    metrics: list[TextMetric] = Field(min_length=1)
    """Figures of completions against the rows' right answers; see rlqwen.evaluation.metrics.text_metrics."""
    reference: str | None = None
    """Column of the right answer, or of a list of them; `completion` is the row's own answer, which may also be its last
    assistant turn. None: `solution`, else the row's own answer, else `answer`."""
    labels: list[str] | None = Field(default=None, min_length=1)
    """For `label`: what there is to choose from. None: all values of the reference column."""
    max_tokens: int = Field(default=256, ge=1)
    """Of one completion."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy."""
    limit: int | None = Field(default=100, ge=1)
    """Write for the first so many rows of the eval set only, because it is slow. None: for all."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Completions decoded at the same time."""
