"""Add up the rewards of a completion, and define when the total is missing.

Two cases look alike in `group.rewards`, where both are None. `group.call_statuses` tells them apart:

- The reward function returned None (status `ok`): it does not apply to this completion and is left out of the weighted
  sum, as in TRL. If no reward applies, the total is missing.
- The call failed (status `timeout`, `error` or `invalid`): its value is unknown, so the total is missing, whatever the
  other rewards are. A reward of weight 0 is only monitored: if it fails, the total stays as it is, and it does not make
  a total of 0 if no other reward applies.

A completion whose total is missing is treated as if it had not been sampled: it enters no baseline
(rlqwen.algorithms.advantages), no loss, none of the counts that losses divide by, and no mean of the metrics.
`reward/missing` is the share of such completions; `reward/NAME/timeout`, `/error` and `/invalid` say why.
"""

from collections.abc import Mapping

from rlqwen.types import Group


def total_rewards(group: Group, weights: Mapping[str, float]) -> list[float | None]:
    """Add up the weighted rewards of each completion; None if the total is missing.

    `weights`: reward name -> weight, for every reward of the group.
    """
    return [_total(group, sample, weights) for sample in range(len(group))]


def _total(group: Group, sample: int, weights: Mapping[str, float]) -> float | None:
    applying = []
    nothing_counts = not any(weights.values())
    for name, weight in weights.items():
        if weight and group.call_statuses[name][sample] != "ok":
            return None
        value = group.rewards[name][sample]
        if value is not None and (weight or nothing_counts):
            applying.append(weight * value)
    return sum(applying) if applying else None
