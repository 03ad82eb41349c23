"""What the rewards of a completion add up to, and what it means that one of them is missing.

Two things look alike in `group.rewards`, where both are None, and are told apart by `group.outcomes`:

- A reward function returned None (outcome `ok`): it does not apply to this completion, and stays out of the weighted
  sum, as in TRL. Where no reward applies, the total is missing.
- The call failed (`timeout`, `error`, `invalid`): what it would have said is not known, so neither is the sum: the
  total is missing, whatever the other rewards said. A reward of weight 0 is only watched: its failures leave the total
  as it is, and it does not make a total of 0 where no other reward applies.

A completion whose total is missing is as if it had not been sampled: it enters no baseline (rlqwen.algorithms.advantages), no
loss and none of the counts that losses divide by, and no mean of the metrics; `reward/missing` says how many there are,
`reward/NAME/timeout`, `/error` and `/invalid` why.
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
        if weight and group.outcomes[name][sample] != "ok":
            return None
        value = group.rewards[name][sample]
        if value is not None and (weight or nothing_counts):
            applying.append(weight * value)
    return sum(applying) if applying else None
