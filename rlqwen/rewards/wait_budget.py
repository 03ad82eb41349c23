"""Limit the time that a run spends waiting for rewards that hang."""

import time
from collections import Counter
from collections.abc import Mapping

from rlqwen.config import ScoringConfig
from rlqwen.errors import RewardFailure
from rlqwen.terminal import get_logger

logger = get_logger(__name__)


class WaitBudget:
    """Warn of rewards that hang, and stop the run if they cost too much time.

    A reward hangs if its calls run into their deadline; a slow reward that answers in time does not hang. A step is the
    time from the end of one wait to the end of the next.

    Warns if more than `scoring.max_wait_share` of a step is spent waiting for such a reward, and stops the run once that
    has cost `scoring.max_wait_seconds` over steps in a row.
    """

    def __init__(self, config: ScoringConfig) -> None:
        self._config = config
        self._began = time.monotonic()
        self._lost: Counter[str] = Counter()
        """Reward -> seconds waited for it in the previous steps, since the last step below the share."""
        self._warned: set[str] = set()

    def check(self, hanging: Mapping[str, float]) -> None:
        """Warn of rewards above the share in this step. Raise RewardFailure if the total time lost is too large.

        `hanging`: reward whose calls ran into their deadline in this step -> seconds waited for it in this step.
        """
        for name, seconds in self._above(hanging).items():
            lost = self._lost[name] + seconds
            if lost > self._config.max_wait_seconds:
                raise RewardFailure(
                    f"reward {name!r} hangs: the run waited {lost:.0f} s for calls that run into "
                    f"scoring.timeout={self._config.timeout:g}, more than scoring.max_wait_seconds="
                    f"{self._config.max_wait_seconds:g} allows. {_ADVICE}"
                )
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "reward %r hangs: %.0f s of the %.0f s of this step were spent waiting for calls that run into "
                    "scoring.timeout=%g. %s. The run stops once this has cost scoring.max_wait_seconds=%g s",
                    name,
                    seconds,
                    time.monotonic() - self._began,
                    self._config.timeout,
                    _ADVICE,
                    self._config.max_wait_seconds,
                )

    def end_step(self, hanging: Mapping[str, float]) -> None:
        """End a step: add the time lost to rewards above the share, and reset the others."""
        above = self._above(hanging)
        self._lost = Counter({name: self._lost[name] + seconds for name, seconds in above.items()})
        self._began = time.monotonic()

    def _above(self, hanging: Mapping[str, float]) -> dict[str, float]:
        allowed = self._config.max_wait_share * (time.monotonic() - self._began)
        return {name: seconds for name, seconds in hanging.items() if seconds > allowed}


_ADVICE = "Fix the reward, lower scoring.timeout, or raise scoring.num_workers; scoring.max_wait_share: 1 waits without a limit"
