"""Hold the groups that are scored together, and the reward calls that this takes."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

from rlqwen.rewards.call_counts import CallCounts
from rlqwen.types import Group

if TYPE_CHECKING:
    from rlqwen.rewards.hang_search import HangSearch


@dataclass(slots=True, eq=False)
class ScoringBatch:
    """Hold groups that the trainer waits for together."""

    state: SimpleNamespace
    """The trainer's state as the rewards of this batch see it."""
    counts: CallCounts = field(default_factory=CallCounts)
    local_jobs: "deque[ScoringJob]" = field(default_factory=deque)
    """Calls that the trainer's own process makes in `Scorer.wait`."""
    is_open: bool = True
    """Whether results are still recorded: False once the batch is scored or given up."""
    groups: list[Group] = field(default_factory=list)
    num_samples: int = 0
    num_open_jobs: int = 0
    open_jobs: Counter[int] = field(default_factory=Counter)
    """id of a group -> its calls that are not recorded yet."""
    scored: deque[Group] = field(default_factory=deque)
    """Groups whose calls are all recorded, and that `Scorer.take_scored` has not returned yet."""
    running: Counter[int] = field(default_factory=Counter)
    """Index of a reward -> number of its calls that are running now."""
    waiting_since: float | None = None
    """When the trainer began to wait, or when `ResultRecorder.add_waiting` last ran; seconds on the monotonic clock.
    None: the trainer does not wait."""
    hanging: set[int] = field(default_factory=set)
    """Indices of rewards of which a call ran into its deadline."""
    failures: dict[int, Counter[str]] = field(default_factory=dict)
    """Index of a reward -> call status -> number of failed samples."""
    traces: dict[int, str] = field(default_factory=dict)
    """Index of a reward -> its first traceback."""


@dataclass(slots=True, frozen=True)
class ScoringJob:
    """Name one call: one reward on some samples of a group.

    `batch` lets the recorder drop results of a batch that was given up.
    """

    batch: ScoringBatch
    reward: int
    """Index of the reward in `Scorer.rewards`."""
    group: Group
    samples: Sequence[int]
    """Indices of the completions in `group.completions`."""
    seconds: float | None = None
    """Deadline of the call; None: what `group_timeout` gives its number of samples."""
    search: "HangSearch | None" = None
    """The search that this call is part of."""
