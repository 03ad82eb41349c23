"""Hold the result of an evaluation, and write it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlqwen.errors import ConfigError
from rlqwen.evaluation.metrics.pass_at_k import RewardMetrics
from rlqwen.evaluation.win_rate import WinRate
from rlqwen.reporting.completions import completion_rows
from rlqwen.secrets import redact_values
from rlqwen.terminal import json_text
from rlqwen.types import Group

RESULT_FILE = "eval.json"
COMPLETIONS_FILE = "completions.jsonl"
AGAINST_FILE = "completions-against.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """The metrics of one evaluation."""

    model: str
    num_prompts: int
    """Prompts that were sampled; 0 if none were."""
    num_samples: int
    rewards: dict[str, RewardMetrics]
    mean_length: float | None
    """Tokens per completion."""
    truncated: float | None
    """Share of completions cut off at the token limit."""
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    """Perplexity and comparisons with right answers."""
    notes: dict[str, str] = field(default_factory=dict)
    """How a metric was computed: signatures, and which part of the data it covers."""
    against: "EvalResult | None" = None
    """The result of the other model."""
    win_rates: dict[str, WinRate] = field(default_factory=dict)
    """By reward: how often this model's completion gets the higher one."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def refuse_used_output(folder: Path | None) -> None:
    """Raise ConfigError if an earlier evaluation would be overwritten."""
    if folder is not None and (folder / RESULT_FILE).exists():
        raise ConfigError(f"--output {str(folder)!r} holds an evaluation already ({RESULT_FILE}); give another folder")


def write_groups(path: Path, groups: Sequence[Group], references: Sequence[Sequence[str]] | None) -> None:
    """Write one line per completion; `references`: the right answers by row number, if there was a comparison."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            compared = {} if references is None else {"references": references[group.prompt.index]}
            for row in completion_rows(group):
                file.write(json_text(redact_values(row | compared)) + "\n")


def write_result(folder: Path, result: EvalResult) -> None:
    """Write `eval.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json_text(redact_values(result.as_dict()), indent=2)
    (folder / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
