"""Describe groups in numbers: rewards, lengths, and the age of the weights that sampled them."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from rlqwen.types import Group


def describe_groups(groups: Sequence[Group]) -> dict[str, float]:
    """Return means over the completions of `groups`: rewards, lengths, truncation, missing rewards, groups without signal."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    totals = [reward for group in groups for reward in group.total_rewards_G]
    present = [reward for reward in totals if reward is not None]
    metrics = {
        "reward/mean": _mean(present),
        "reward/std": statistics.pstdev(present) if present else math.nan,
        "reward/missing": (len(totals) - len(present)) / max(len(totals), 1),
        "completions/mean_length": _mean(lengths),
        "completions/max_length": float(max(lengths, default=0)),
        "completions/truncated": _mean([completion.is_truncated for completion in completions]),
        "tokens/generated": float(sum(lengths)),
    }
    for name in groups[0].rewards if groups else ():
        values = [reward for group in groups for reward in group.rewards[name] if reward is not None]
        metrics[f"reward/{name}/mean"] = _mean(values)
    return metrics


def describe_lag(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Return how many updates older than `version` the weights were: mean of the groups, by the oldest weights of each, and
    tokens by age. `groups`: sampled by an engine whose weights change in flight."""
    tokens: Counter[int] = Counter()
    for group in groups:
        for completion in group.completions:
            for sampled_by, count in completion.weight_versions or [(group.policy_version, len(completion.token_ids))]:
                tokens[version - sampled_by] += count
    return {
        "groups/staleness": _mean([version - group.policy_version for group in groups]),
        **{f"tokens/lag_{lag}": float(count) for lag, count in sorted(tokens.items())},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
