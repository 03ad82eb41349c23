"""Say how many tokens an update of a recipe has, and how many updates a run."""

import math
from dataclasses import dataclass, replace

from rlqwen.config import OnlineConfig, PPOConfig, PreferenceConfig, Recipe, SFTConfig
from rlqwen.preflight.parallel_layout import ParallelLayout

PROMPT = 512
"""Tokens of a prompt where the recipe sets no limit. An assumption."""


@dataclass(frozen=True)
class Workload:
    """Tokens of one update on all ranks together, which do not depend on the layout."""

    sequences: int
    """Sequences, or packed rows: what a micro-batch is made of."""
    tokens: float
    """Packed tokens."""
    targets: float
    """Tokens whose logits are needed."""
    length: float
    """Tokens of one sequence, prompt included, which attention sees."""
    forwards: float
    """Further forward passes without gradients: of a reference, and of the policy before several updates."""
    updates_per_step: int = 1
    num_steps: int | None = None
    """Steps of the run; None: unknown, because the rows were not counted."""
    prompt: float = 0.0
    completion: float = 0.0
    longest_completion: float = 0.0
    completions_per_step: int = 0
    """Completions that are sampled per step; 0 without sampling."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        context: int,
        layout: ParallelLayout,
        *,
        num_rows: int | None = None,
        mean: float | None = None,
    ) -> "Workload":
        """Read a recipe whose batch is dealt out to the ranks of `layout`.

        `num_rows`: rows of the data, or packed rows; None: unknown. `mean`: mean tokens of a row, or of a completion;
        None: the most that the config allows.
        """
        train = recipe.train.for_ranks(layout.data_ranks)
        sequences = train.per_device_train_batch_size * train.gradient_accumulation_steps * layout.data_ranks
        made = _online if isinstance(train, OnlineConfig) else _offline
        work = made(recipe, sequences, context, mean)
        if isinstance(train, OnlineConfig):
            per_step = train.completions_per_rollout(layout.data_ranks)
            updates = per_step // train.completions_per_update(layout.data_ranks) * train.passes_per_rollout
            rows = per_step / train.num_generations
            work = replace(
                work, completions_per_step=per_step, updates_per_step=updates,
                forwards=work.forwards + (1 / train.passes_per_rollout if updates > 1 else 0),
            )  # fmt: skip
        else:
            rows = float(sequences)
        return replace(work, num_steps=_steps(recipe, rows, work.updates_per_step, num_rows))

    def micro_batches(self, layout: ParallelLayout, most_tokens: float) -> int:
        """Return the micro-batches of each data rank, of at most `most_tokens`; a rank may have fewer sequences."""
        sequences = math.ceil(self.sequences / layout.data_ranks)
        each = self.tokens / self.sequences
        together = max(1, int(most_tokens // each + 1e-6))
        return math.ceil(sequences / together)


def _offline(recipe: Recipe, sequences: int, context: int, mean: float | None) -> Workload:
    train = recipe.train
    limit = float(min(getattr(train, "max_length", None) or context, context))
    length = min(mean or limit, limit)
    is_packed = isinstance(train, SFTConfig) and train.packing
    each = limit if is_packed else length * (2 if isinstance(train, PreferenceConfig) else 1)
    precomputed = bool(getattr(train, "precompute_ref_log_probs", False))
    forwards = 1.0 if train.needs_reference and not precomputed else 0.0
    return Workload(sequences, sequences * each, sequences * each, length, forwards)


def _online(recipe: Recipe, sequences: int, context: int, mean: float | None) -> Workload:
    train = recipe.train
    assert isinstance(train, OnlineConfig)
    longest = float(train.max_completion_length)
    completion = min(mean or longest, longest)
    prompt = float(min(train.max_prompt_length or PROMPT, max(context - train.max_completion_length, 1)))
    prompts = -(-sequences // train.num_generations)
    tokens = sequences * completion + prompts * prompt
    # A critic of its own forwards and trains on the same tokens, which counts as three forwards more.
    has_critic = isinstance(train, PPOConfig) and train.critic.kind == "model"
    forwards = (1.0 if train.needs_reference else 0.0) + (3.0 if has_critic else 0.0)
    return Workload(
        sequences, tokens, sequences * completion, prompt + completion, forwards,
        prompt=prompt, completion=completion, longest_completion=longest,
    )  # fmt: skip


def _steps(recipe: Recipe, rows_per_step: float, updates: int, num_rows: int | None) -> int | None:
    train = recipe.train
    if train.max_steps > 0:
        return math.ceil(train.max_steps / updates)
    if isinstance(train, OnlineConfig) and train.total_completions is not None:
        return math.ceil(train.total_completions / train.num_generations / rows_per_step)
    return None if num_rows is None else math.ceil(train.num_train_epochs * num_rows / rows_per_step)
