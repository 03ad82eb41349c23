"""Call transformers' callbacks at the events of a run, and follow what they ask for."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from rlqwen.config import TrainerConfig
from rlqwen.distributed import Ranks

_REQUESTS = ("should_evaluate", "should_save", "should_training_stop")


class Callbacks(list[TrainerCallback]):
    """The callbacks of a trainer, in the order in which they are called."""

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback] | None,
        args: TrainerConfig,
        state: TrainerState,
        context: Callable[[], dict[str, Any]],
    ) -> None:
        """Take `callbacks`; `context` returns the keyword arguments that every callback gets, such as the model."""
        super().__init__(callbacks or ())
        self.control = TrainerControl()
        """What callbacks, and the trainer itself, ask the loop to do next."""
        self._args = args
        self._state = state
        self._context = context

    def notify(self, event: str, **kwargs: Any) -> None:
        """Call every callback's method `event`."""
        for callback in self:
            answer = getattr(callback, event)(self._args, self._state, self.control, **self._context(), **kwargs)
            self.control = answer or self.control

    def agree(self, ranks: Ranks) -> None:
        """Make all ranks do what a callback asked for on one of them."""
        asked = ranks.gather([getattr(self.control, name) for name in _REQUESTS])
        for name, values in zip(_REQUESTS, zip(*asked, strict=True), strict=True):
            setattr(self.control, name, any(values))

    def state_dict(self) -> dict[str, Any]:
        """Return whether training is to stop, and the state of every callback that transformers can export."""
        exported = {type(one).__name__: one.state() for one in self if isinstance(one, ExportableState)}
        return {"should_training_stop": self.control.should_training_stop, "exported": exported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`; callbacks that it does not hold keep theirs."""
        self.control.should_training_stop = state["should_training_stop"]
        for callback in self:
            saved = state["exported"].get(type(callback).__name__)
            if saved and isinstance(callback, ExportableState):
                for name, value in saved["attributes"].items():
                    setattr(callback, name, value)
