"""Decide where each reward is called: in a worker, in an isolated worker, or in the trainer's process."""

from collections import Counter
from collections.abc import Sequence

from rlqwen.config import ScoringConfig
from rlqwen.errors import ConfigError, RewardSpecError
from rlqwen.rewards.pickling import describe_state, pickle_function
from rlqwen.rewards.registry import Reward
from rlqwen.rewards.reward_model import RewardModel
from rlqwen.terminal import warn


def check_arguments(rewards: Sequence[Reward], weights: Sequence[float], config: ScoringConfig) -> None:
    """Raise RewardSpecError or ConfigError for rewards, weights and settings that do not fit together."""
    names = [reward.name for reward in rewards]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise RewardSpecError(f"two rewards of this run are called {repeated[0]!r}; give each a name of its own")
    if len(weights) != len(rewards):
        raise ConfigError(f"reward_weights has {len(weights)} values for {len(rewards)} rewards: {', '.join(names)}")
    for key in ("in_process", "isolated"):
        for name in getattr(config, key):
            if name not in names:
                raise ConfigError(f"scoring.{key} names {name!r}, which is no reward of this run: {', '.join(names)}")
    for reward in rewards:
        if not must_isolate(reward, config):
            continue
        if reward.name in config.in_process:
            raise ConfigError(
                f"scoring.in_process names {reward.name!r}, which must run isolated: remove it there, or set "
                "scoring.isolation: off"
            )
        if isinstance(reward.function, RewardModel):
            raise ConfigError(
                f"scoring.isolated names {reward.name!r}, a reward model; reward models run in the trainer's process"
            )


def must_isolate(reward: Reward, config: ScoringConfig) -> bool:
    """Return whether a reward is called in isolated workers only."""
    return config.isolation == "required" and (reward.isolated or reward.name in config.isolated)


def pickle_rewards(rewards: Sequence[Reward], config: ScoringConfig) -> dict[int, bytes]:
    """Pickle the rewards that workers call: index of the reward -> pickled function.

    Warns of each reward that is called in the trainer's process although `scoring.in_process` does not name it. Raises
    RewardSpecError if such a reward must run isolated.
    """
    pickled = {}
    for index, reward in enumerate(rewards):
        if reward.name in config.in_process or isinstance(reward.function, RewardModel):
            continue
        reason = describe_state(reward.function)
        if reason is None:
            try:
                pickled[index] = pickle_function(reward.function)
                continue
            except Exception as error:  # noqa: BLE001  picklers raise anything
                reason = f"it cannot be pickled: {type(error).__name__}: {error}"
        if must_isolate(reward, config):
            raise RewardSpecError(
                f"reward {reward.name!r} must run isolated, and cannot go to a worker process, because {reason}"
            )
        warn(
            f"reward {reward.name!r} is called in the trainer's process, without a deadline, because {reason}; "
            f"make it a plain function, or accept this by scoring.in_process=[{reward.name!r}]",
            stacklevel=3,
        )
    return pickled
