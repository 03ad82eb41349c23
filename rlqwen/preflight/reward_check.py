"""Check that a recipe's rewards can be loaded, and that the data has the columns they need."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlqwen.config import RewardSpec, ScoringConfig
from rlqwen.data.formats import to_prompt_row
from rlqwen.errors import RewardSpecError
from rlqwen.preflight.check_report import CheckReport
from rlqwen.rewards import build_rewards
from rlqwen.rewards.placement import must_isolate
from rlqwen.rewards.registry import Reward, check_rows, taken_columns
from rlqwen.rewards.sandbox.sandbox import unavailable_message, unavailable_reason

Row = dict[str, Any]


def resolve_rewards(specs: Sequence[RewardSpec]) -> list[Reward]:
    """Import and return the rewards."""
    return build_rewards([spec.name for spec in specs], [spec.args for spec in specs])


def check_reward_columns(rewards: Sequence[Reward], rows: Sequence[Row], where: str) -> list[str]:
    """Return what rlqwen.rewards.registry.check_rows finds in rows whose prompts are not tokenized yet."""
    if not rewards or not rows:
        return []
    written: dict[frozenset[str], frozenset[str]] = {}
    """Columns of a row -> those that its rewards see."""
    for number, row in enumerate(rows):
        if frozenset(row) not in written:
            seen = to_prompt_row(row, f"{where}, row {number}")
            written[frozenset(row)] = frozenset(seen) - {"prompt"}
    # A column that a row does not have was made from its answer.
    columns = ({name: row.get(name, "") for name in written[frozenset(row)]} for row in rows)
    return check_rows(rewards, columns, where)[1]


def check_rewards(
    report: CheckReport,
    specs: Sequence[RewardSpec],
    parts: Mapping[str, Sequence[Row] | None],
    *,
    to_train: Collection[str],
    scoring: ScoringConfig,
) -> tuple[set[str] | None, list[Reward] | None]:
    """Check the rewards of a recipe; those named in `to_train` are models that an earlier recipe will train.

    Returns the columns that they take (None for all columns, or if a reward cannot be loaded), and the rewards, if all are
    there and can be loaded.
    """
    there = [spec for spec in specs if spec.name not in to_train]
    with report.collecting():
        rewards = resolve_rewards(there)
        named = [
            f"{reward.name} x {spec.weight:g} ({reward.origin})" for reward, spec in zip(rewards, there, strict=True)
        ]
        named += [f"{spec.name} x {spec.weight:g} (to be trained)" for spec in specs if spec.name in to_train]
        report.facts.append(("rewards", ", ".join(named)))
        to_isolate = [repr(reward.name) for reward in rewards if must_isolate(reward, scoring)]
        reason = unavailable_reason() if to_isolate else None
        if reason is not None:
            raise RewardSpecError(unavailable_message(to_isolate, reason))
        for reward in rewards:
            for where, rows in parts.items():
                with report.collecting():
                    report.warnings += check_reward_columns([reward], rows or [], where)
        return taken_columns(rewards), rewards if len(there) == len(specs) else None
    return None, None
