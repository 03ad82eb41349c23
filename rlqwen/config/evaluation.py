"""Configure the evaluation of generated text."""

from typing import Literal

from pydantic import Field

from rlqwen.config.base import ArgumentsConfig

TextMetric = Literal["bleu", "chrf", "rouge", "exact_match", "label"]


class EvalGenerationConfig(ArgumentsConfig):
    """Evaluate SFT by the text that the model generates, sampled by transformers in the trainer's own process."""

    metrics: list[TextMetric] = Field(min_length=1)
    """Metrics that compare completions with the rows' right answers; see rlqwen.evaluation.metrics.text_metrics."""
    reference: str | None = None
    """Column of the right answer, or of a list of right answers; `completion` is the row's own answer, which may also
    be its last assistant message. None: `solution`, otherwise the row's own answer, otherwise `answer`."""
    labels: list[str] | None = Field(default=None, min_length=1)
    """For `label`: the labels to choose from. None: all values of the reference column."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature. 0: greedy."""
    limit: int | None = Field(default=100, ge=1)
    """Generate for the first rows of the evaluation set only, this many, because generation is slow. None: for all."""
    max_num_seqs: int = Field(default=32, ge=1)
    """Completions that are decoded at the same time."""
