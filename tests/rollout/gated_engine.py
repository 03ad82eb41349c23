"""A vLLM engine whose steps wait at given places for new weights, so that tests need not race with it."""

import time
from collections.abc import Iterable
from pathlib import Path

from rlqwen.rollout.engines.vllm import Vllm
from rlqwen.rollout.worker_protocol import EngineSettings, Sampled

GATES = (40, 120)
"""Steps that pass only after the first load, the second, and so on."""


def gate_file(folder: Path, steps: int) -> Path:
    """Return the file that an engine with the model of `folder` makes while it waits at a gate."""
    return folder.with_name(f"{folder.name}.at-{steps}")


def hold_file(folder: Path) -> Path:
    """Return the file that, while it exists, keeps an engine with the model of `folder` from loading weights."""
    return folder.with_name(f"{folder.name}.hold")


def loading_file(folder: Path) -> Path:
    """Return the file that an engine makes once it is kept from loading."""
    return folder.with_name(f"{folder.name}.loading")


class GatedVllm(Vllm):
    """vLLM that waits at the gates."""

    @classmethod
    def start(cls, settings: EngineSettings) -> "GatedEngine":  # type: ignore[override]  # it has the same methods
        return GatedEngine(super().start(settings), Path(settings.model_path))


class GatedEngine:
    """Count the steps of a vLLM engine, and the weights that it is told to make way for."""

    def __init__(self, engine: object, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._steps = self._loads = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def load(self, bundle: object) -> object:
        while hold_file(self._folder).exists():
            loading_file(self._folder).touch()
            time.sleep(0.01)
        report = self._engine.load(bundle)  # type: ignore[attr-defined]
        self._loads += 1
        return report

    def step(self) -> Iterable[tuple[str, Sampled]]:
        """Advance by one token, or not at all before a gate."""
        if self._steps in GATES[self._loads :]:
            gate_file(self._folder, self._steps).touch()
            time.sleep(0.01)
            return []
        self._steps += 1
        return self._engine.step()  # type: ignore[attr-defined,no-any-return]


class Plain(Vllm):
    """An engine that must drop what it samples before it gets other weights."""

    updates_in_flight = False
