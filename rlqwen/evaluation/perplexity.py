"""Measure the perplexity of given answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import track

from rlqwen.config import SFTConfig
from rlqwen.data import tokenize_sft
from rlqwen.evaluation.eval_model import EvalModel, policy_of
from rlqwen.evaluation.likelihood import measure_likelihood, sequence_tree
from rlqwen.packing.batch import pack, split_trees
from rlqwen.reporting.console import TerminalConsole


@dataclass(frozen=True)
class PerplexityMetrics:
    """Metrics of all counted tokens together."""

    values: dict[str, float]
    note: str
    """Which tokens were counted."""


def measure_perplexity(model: EvalModel, rows: Sequence[dict[str, Any]], config: SFTConfig) -> PerplexityMetrics:
    """Measure the perplexity of the tokens that SFT with `config` would learn.

    Sequences are cut at the model's context, if not before. Raises DataError for rows that hold no answer.
    """
    context = model.facts.context
    length = context if config.max_length is None else min(config.max_length, context)
    tokenized, report = tokenize_sft(rows, model.facts.tokenizer, config.model_copy(update={"max_length": length}))
    trees = map(sequence_tree, tokenized)
    batches = [pack(part) for part in split_trees(trees, max_branches=config.per_device_eval_batch_size)]
    console = TerminalConsole(stderr=True)
    shown = track(batches, "perplexity", console=console, disable=not console.is_terminal, transient=True)
    with policy_of(model.folder) as policy:
        likelihood = measure_likelihood(policy, shown)
    return PerplexityMetrics(
        {"perplexity": likelihood.perplexity, "nats_per_token": likelihood.loss, "tokens": float(likelihood.tokens)},
        report.summary(),
    )
