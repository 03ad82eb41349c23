"""What an evaluation found, and where it is written."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlqwen.errors import ConfigError
from rlqwen.evaluation.metrics.pass_at_k import RewardFigures
from rlqwen.evaluation.win_rate import WinRate
from rlqwen.reporting.completions import completion_rows
from rlqwen.secrets import redact_values
from rlqwen.types import Group

RESULT_FILE = "eval.json"
COMPLETIONS_FILE = "completions.jsonl"
AGAINST_FILE = "completions-against.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """Figures of one evaluation."""

    model: str
    num_prompts: int
    """Prompts sampled from; 0 where nothing was sampled."""
    num_samples: int
    rewards: dict[str, RewardFigures]
    mean_length: float | None
    """Tokens a completion."""
    truncated: float | None
    """Share of completions cut off at the token limit."""
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    """Perplexity and comparisons with right answers."""
    notes: dict[str, str] = field(default_factory=dict)
    """How a metric was computed: signatures, and what of the data it is over."""
    against: "EvalResult | None" = None
    """The other model's figures."""
    win_rates: dict[str, WinRate] = field(default_factory=dict)
    """By reward: how often this model's completion gets the higher one."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def refuse_used_output(folder: Path | None) -> None:
    """Raise ConfigError where an earlier evaluation would be overwritten."""
    if folder is not None and (folder / RESULT_FILE).exists():
        raise ConfigError(f"--output {str(folder)!r} holds an evaluation already ({RESULT_FILE}); give another folder")


def write_groups(path: Path, groups: Sequence[Group], references: Sequence[Sequence[str]] | None) -> None:
    """One line a completion; `references`: the right answers by row number, where they were compared with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            compared = {} if references is None else {"references": references[group.prompt.index]}
            for row in completion_rows(group):
                file.write(json.dumps(redact_values(row | compared), ensure_ascii=False) + "\n")


def write_result(folder: Path, result: EvalResult) -> None:
    """Write `eval.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(redact_values(result.as_dict()), ensure_ascii=False, indent=2)
    (folder / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
