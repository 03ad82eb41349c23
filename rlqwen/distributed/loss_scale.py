"""Scale the loss dynamically for float16, which keeps small gradients from underflowing."""

from collections.abc import Mapping
from typing import Any


class LossScale:
    """Double the scale after some updates without overflow, halve it on overflow (arXiv 1710.03740); 1 without fp16.

    Keys of `settings` are those of a ds_config's `fp16`: `loss_scale` (0: as above), `initial_scale_power`,
    `loss_scale_window`, `min_loss_scale`, `hysteresis` (overflows until it halves; 1 here, 2 in DeepSpeed),
    `consecutive_hysteresis` (whether each update without overflow resets that count; if not, only a doubling does).
    """

    def __init__(self, enabled: bool, settings: Mapping[str, Any] | None = None) -> None:
        settings = settings or {}
        fixed = float(settings.get("loss_scale", 0.0)) if enabled else 1.0
        self.is_dynamic = fixed == 0.0
        self.value = fixed or 2.0 ** settings.get("initial_scale_power", 16)
        self.window: int = settings.get("loss_scale_window", 1000)
        self.smallest = float(settings.get("min_loss_scale", 1.0))
        self.hysteresis: int = settings.get("hysteresis", 1)
        self.counts_in_a_row = bool(settings.get("consecutive_hysteresis", False))
        self._since = 0
        self._patience = self.hysteresis
        """Overflows left until the scale is halved."""

    @property
    def can_fall(self) -> bool:
        """Return whether a smaller scale may still avoid an overflow."""
        return self.is_dynamic and self.value > self.smallest

    def update(self, *, overflow: bool) -> None:
        """Adapt the scale after an update."""
        if not self.is_dynamic:
            return
        self._since = 0 if overflow else self._since + 1
        if overflow and self._patience <= 1:
            self.value = max(self.value / 2, self.smallest)
        elif overflow:
            self._patience -= 1
        elif self._since == self.window:
            self.value, self._since, self._patience = self.value * 2, 0, self.hysteresis
        elif self.counts_in_a_row:
            self._patience = self.hysteresis

    def state_dict(self) -> list[float]:
        """Return the scale, the updates since it changed, and the overflows that it still tolerates."""
        return [self.value, self._since, self._patience]

    def load_state_dict(self, state: list[float]) -> None:
        """Restore the state saved by `state_dict`."""
        if self.is_dynamic:
            self.value, self._since = state[0], int(state[1])
            self._patience = int(state[2]) if len(state) > 2 else self.hysteresis
