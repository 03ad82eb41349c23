"""The scale of the loss in float16, whose small gradients would else be 0."""

from collections.abc import Mapping
from typing import Any


class LossScale:
    """Dynamic loss scale: doubles after a while without overflow, halves on one (arXiv 1710.03740); 1 without fp16.

    Keys of `settings` are those of a ds_config's `fp16`: `loss_scale` (0: as above), `initial_scale_power`,
    `loss_scale_window`, `min_loss_scale`, `hysteresis` (overflows until it halves; 1 here, 2 in DeepSpeed),
    `consecutive_hysteresis` (whether every update without one counts them anew, and not only a doubling).
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
        """Overflows that it takes to halve."""

    @property
    def can_fall(self) -> bool:
        """Whether an overflow may still be the scale's fault."""
        return self.is_dynamic and self.value > self.smallest

    def update(self, *, overflow: bool) -> None:
        """After every update."""
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

    def progress(self) -> list[float]:
        """What `restore` takes."""
        return [self.value, self._since, self._patience]

    def restore(self, progress: list[float]) -> None:
        """Go on from there."""
        if self.is_dynamic:
            self.value, self._since = progress[0], int(progress[1])
            self._patience = int(progress[2]) if len(progress) > 2 else self.hysteresis
