"""Compare worker and trainer after each weight sync, by a tolerance that the first sync measures.

At the first sync both sides hold the weights that the workers started with, so their gap is what dtype and kernels alone
make. A later gap of more than twice that means other weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, Tree, pack
from rlqwen.types import Canary

TEXT_LENGTH = 64
"""Tokens of the canary."""
FIRST_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""Largest gap of the first sync, in nats per token."""
MIN_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.02}
"""Smallest calibrated tolerance: a measured gap may be 0, and rounding changes as weights do."""
FACTOR = 2.0
"""Tolerance as a multiple of the gap of the first sync."""


class SyncCheck:
    """Make the canaries of a run: the same tokens at every sync, so that their gaps can be compared."""

    def __init__(self, policy: Policy, *, dtype: str, tolerance: float | None, max_length: int) -> None:
        """Check syncs of `policy`.

        Args:
            dtype: the one that the engine computes in.
            tolerance: `rollout.canary_tolerance`; None: calibrate.
            max_length: tokens of a canary that the engine's context has room for.
        """
        self._policy = policy
        self._dtype = dtype
        self._tolerance = tolerance
        self._max_length = max_length
        self._token_ids: list[int] = []
        self._floor: float | None = None
        """Gap of the first sync; None before it."""

    @property
    def tolerance(self) -> float:
        """Largest gap that the next sync may have."""
        if self._tolerance is not None:
            return self._tolerance
        if self._floor is None:
            return FIRST_TOLERANCES[self._dtype]
        return max(FACTOR * self._floor, MIN_TOLERANCES[self._dtype])

    def canary(self, prompt_ids: Sequence[int]) -> Canary:
        """Return the trainer's present logprobs of the canary.

        Its text is the start of the first prompt that it was called with, repeated so that a prompt of one token is enough.
        """
        if not self._token_ids:
            self._token_ids = (list(prompt_ids) * 2)[: min(TEXT_LENGTH, self._max_length)]
        batch = pack([Tree([], [Branch(self._token_ids)])])
        with self._policy.inference():
            logp_N, _ = self._policy.logprobs(batch.to(self._policy.device))
        return Canary(tuple(self._token_ids), tuple(logp_N.tolist()), self.tolerance)

    def calibrate(self, metrics: Mapping[str, float]) -> None:
        """Remember the gap of the first sync that measured one; `metrics`: those of a sync that was accepted."""
        if self._floor is None:
            self._floor = metrics.get("sync/canary_gap")

    def state_dict(self) -> dict[str, Any]:
        """Return text and gap of the first sync."""
        return {"token_ids": self._token_ids, "floor": self._floor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`: a resumed run starts with trained weights, and cannot calibrate."""
        self._token_ids, self._floor = state["token_ids"], state["floor"]
