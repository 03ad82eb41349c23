"""Keep the weights of an engine those of the policy: choose what is sent, count versions, and send when they differ."""

import time
from collections.abc import Sequence
from typing import Any

from rlqwen.config import RolloutConfig
from rlqwen.errors import ConfigError
from rlqwen.models.policy import Policy
from rlqwen.rollout import RolloutEngine
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.pool import RolloutPool
from rlqwen.rollout.resources import samples_on_gpu
from rlqwen.rollout.sync_check import SyncCheck
from rlqwen.rollout.weight_delivery import ExportedWeights


class PolicySync:
    """Count the versions of a policy's weights that were sampled from, and send an engine the present one."""

    def __init__(
        self, policy: Policy, *, lora_rank: int | None, dtype: str, tolerance: float | None, max_length: int
    ) -> None:
        """Start with weights that the engine lacks.

        Args:
            lora_rank: rank of the adapters that the engine is sent; None: it is sent whole weights.
            dtype, tolerance, max_length: see SyncCheck.
        """
        self._policy = policy
        self.lora_rank = lora_rank
        self.version = 1
        """How many weights were sampled from, or are about to be: grows at a draw, if the policy has changed."""
        self._seen_version = policy.version
        self._sent_version = 0
        self._check = SyncCheck(policy, dtype=dtype, tolerance=tolerance, max_length=max_length)

    def notice_changes(self) -> None:
        """Count a change of the policy's weights since the last draw as one version more."""
        if self._policy.version != self._seen_version:
            self.version, self._seen_version = self.version + 1, self._policy.version

    def send(self, engine: RolloutEngine, prompt_ids: Sequence[int]) -> dict[str, float]:
        """Send `engine` the present version unless it has it, and return the metrics.

        `prompt_ids`: text of the canary, if this is the first sync.
        """
        asleep = isinstance(engine, RolloutPool) and engine.is_asleep
        if self._sent_version == self.version and not asleep:
            return {"time/sync": 0.0}
        started = time.monotonic()
        export = self._policy.export_weights if self.lora_rank is None else self._policy.export_adapter
        weights = ExportedWeights(export, getattr(self._policy, "send_by_all_ranks", None))
        metrics = engine.load_weights(self.version, weights, self._check.canary(prompt_ids))
        self._check.calibrate(metrics)
        self._sent_version = self.version
        return metrics | {"time/sync": time.monotonic() - started}

    def state_dict(self) -> dict[str, Any]:
        """Return the version of the weights, whether the engine has them, and what the first sync measured."""
        return {
            "version": self.version,
            "synced": self._sent_version == self.version,
            "sync_check": self._check.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state saved by `state_dict`; the engine lacks the weights, whatever it had."""
        self.version, self._seen_version = state["version"], self._policy.version
        self._check.load_state_dict(state["sync_check"])


def choose_sync(policy: Policy, config: RolloutConfig) -> tuple[int | None, str | None]:
    """Return the rank of the adapters that workers are sent (None: whole weights are sent), and a note for the user.

    ConfigError if `rollout.lora` asks for what vLLM cannot do.
    """
    if (not policy.has_adapter and not config.lora) or not engine_class(config).in_workers:
        return None, None
    obstacle = policy.lora_obstacle
    if config.in_flight_updates:
        obstacle = obstacle or "with rollout.in_flight_updates, completions in flight keep the adapter they began with"
    on_gpu = samples_on_gpu(config)
    if config.lora and obstacle:
        raise ConfigError(
            f"rollout.lora is true, but the workers cannot apply the policy's adapter: {obstacle}; leave rollout.lora "
            "out to send weights with the adapter merged"
        )
    if obstacle is None and (on_gpu if config.lora is None else config.lora):
        return policy.lora_rank, f"rollout workers are sent the adapter alone, of rank {policy.lora_rank}"
    reason = obstacle or ("rollout.lora is false" if config.lora is False else "with it apart, vLLM on CPU is slower")
    return None, f"rollout workers are sent weights with the adapter merged: {reason}"


def add_sync(metrics: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Return `metrics` with `more`, of which each may have the time of a sync."""
    return metrics | more | {"time/sync": metrics.get("time/sync", 0.0) + more.get("time/sync", 0.0)}
