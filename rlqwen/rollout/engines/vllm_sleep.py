"""Put a vLLM engine to sleep while the policy trains on the same GPU, and wake it in the order that saves memory."""

from typing import Any

from rlqwen.errors import RolloutError


class SleepCycle:
    """Call an LLMEngine's `sleep` and `wake_up` in order: weights before they are loaded, the KV cache after.

    Level 1 keeps the weights in host memory, level 2 keeps nothing. Level 0 never sleeps. On a CPU vLLM only pauses.
    """

    def __init__(self, llm: Any, level: int) -> None:
        self._llm = llm
        self._level = level
        self._asleep: list[str] = []
        """What is still asleep, in the order of waking."""

    def sleep(self) -> None:
        """Free the engine's memory; it must have no requests."""
        if self._level and not self._asleep:
            self._llm.sleep(level=self._level)
            self._asleep = ["weights", "kv_cache"]

    def wake_weights(self) -> None:
        """Get memory for the weights back, before any is loaded."""
        if "weights" in self._asleep:
            self._llm.wake_up(["weights"])
            self._asleep.remove("weights")

    def wake(self) -> None:
        """Get all memory back; of weights with level 2 only the memory."""
        self.wake_weights()
        if self._asleep:
            self._llm.wake_up(["kv_cache"])
            self._asleep = []


def reset_prefix_cache(llm: Any) -> None:
    """Empty the prefix cache; raise RolloutError if vLLM keeps it, since it may be of other weights."""
    if not llm.reset_prefix_cache():
        raise RolloutError("vLLM did not empty its prefix cache: requests that it should not have hold blocks of it")
