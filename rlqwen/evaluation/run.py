"""Run one evaluation, from the config to the metrics."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlqwen.data import load_rows
from rlqwen.evaluation.eval_config import AGAINST_DATA, EvalConfig
from rlqwen.evaluation.eval_model import EvalModel, find_model
from rlqwen.evaluation.metrics.pass_at_k import reward_metrics
from rlqwen.evaluation.metrics.text_metrics import TextMeasure
from rlqwen.evaluation.perplexity import measure_perplexity
from rlqwen.evaluation.result import (
    AGAINST_FILE,
    COMPLETIONS_FILE,
    EvalResult,
    refuse_used_output,
    write_groups,
    write_result,
)
from rlqwen.evaluation.sampling import given_answers, own_answers, sample
from rlqwen.evaluation.win_rate import win_rates
from rlqwen.preflight.reward_check import check_reward_columns
from rlqwen.rewards import Scorer, build_rewards
from rlqwen.terminal import echo
from rlqwen.types import Group


def evaluate_model(config: EvalConfig) -> EvalResult:
    """Measure a model, and the one that it is compared with; progress goes to standard error.

    Raises InputError for a model, data or rewards that cannot be used, before anything is sampled. Models are loaded one
    after the other. The same config gives the same metrics.
    """
    refuse_used_output(config.output)
    rewards = build_rewards([spec.name for spec in config.rewards], [spec.args for spec in config.rewards])
    rows = load_rows(config.data, seed=config.seed)[: config.limit]
    for line in check_reward_columns(rewards, rows, "data"):
        echo(line, err=True)
    measure = None
    if config.text_metrics:
        measure = TextMeasure(config.text_metrics, rows, reference=config.reference, labels=config.labels)
    answers = own_answers(rows) if config.against == AGAINST_DATA else None
    weights = [spec.weight for spec in config.rewards]
    with tempfile.TemporaryDirectory() as scratch, Scorer(rewards, config.scoring, weights=weights) as scorer:
        names = [config.model] + ([config.against] if config.against not in (None, AGAINST_DATA) else [])
        models = [find_model(str(name), Path(scratch), config.sft.chat_template_path) for name in names]
        scorer.wait_until_ready()
        evaluation = _Evaluation(config, rows, scorer, measure)
        result, groups = evaluation.of_model(models[0], COMPLETIONS_FILE)
        if config.against is not None:
            if answers is not None:
                against, others = evaluation.of_data(models[0], answers)
            else:
                against, others = evaluation.of_model(models[1], AGAINST_FILE)
            result = replace(result, against=against, win_rates=win_rates(groups, others))
    if config.output is not None:
        write_result(config.output, result)
    return result


@dataclass(frozen=True)
class _Evaluation:
    """Hold what all models of an evaluation share, and measure each."""

    config: EvalConfig
    rows: Sequence[dict[str, Any]]
    scorer: Scorer
    measure: TextMeasure | None

    def of_model(self, model: EvalModel, file: str) -> tuple[EvalResult, list[Group]]:
        """Return the metrics of a model, and its completions."""
        started = time.monotonic()
        values: dict[str, float] = {}
        notes: dict[str, str] = {}
        if "perplexity" in self.config.metrics:
            settings = self.config.sft.model_copy(update={"chat_template_kwargs": self.config.chat_template_kwargs})
            likelihood = measure_perplexity(model, self.rows, settings)
            values |= likelihood.values
            notes["perplexity"] = likelihood.note
        groups: list[Group] = []
        if self.config.samples:
            with self._keeping(groups, file):
                sample(model, self.rows, self.config, self.scorer, groups)
        if self.measure is not None:
            found = self.measure.compute(groups)
            values |= found.values
            notes |= found.signatures
        return summarize(model.name, groups, self.config.num_samples, started, values, notes), groups

    def of_data(self, model: EvalModel, answers: Sequence[str]) -> tuple[EvalResult, list[Group]]:
        """Return the rewards of the answers that the rows hold, and these as completions."""
        started = time.monotonic()
        groups = given_answers(model, self.rows, self.config, self.scorer, answers)
        if self.config.output is not None:
            write_groups(self.config.output / AGAINST_FILE, groups, None)
        return summarize(AGAINST_DATA, groups, self.config.num_samples, started, {}, {}), groups

    @contextmanager
    def _keeping(self, groups: list[Group], file: str) -> Iterator[None]:
        """Write what `groups` holds in the end, even if a reward failed or the user stopped the evaluation."""
        try:
            yield
        finally:
            if self.config.output is not None and groups:
                write_groups(self.config.output / file, groups, self.measure.references if self.measure else None)


def summarize(
    model: str,
    groups: Sequence[Group],
    num_samples: int,
    started: float,
    metrics: dict[str, float],
    notes: dict[str, str],
) -> EvalResult:
    """Return the metrics of scored groups, together with `metrics`; `started`: on the monotonic clock."""
    completions = [completion for group in groups for completion in group.completions]
    count = len(completions)
    return EvalResult(
        model=model,
        num_prompts=len(groups),
        num_samples=num_samples,
        rewards={name: reward_metrics(groups, name) for name in (groups[0].rewards if groups else ())},
        mean_length=sum(len(completion.token_ids) for completion in completions) / count if count else None,
        truncated=sum(completion.is_truncated for completion in completions) / count if count else None,
        seconds=round(time.monotonic() - started, 2),
        metrics=metrics,
        notes=notes,
    )
