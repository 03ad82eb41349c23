"""Engines that answer every prompt with the same tokens: one in the trainer's process, one in Ray workers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlqwen.models.policy import Policy
from rlqwen.rollout import Engine
from rlqwen.rollout.weight_sync import LoadReport, WeightBundle
from rlqwen.rollout.worker_protocol import EngineSettings
from rlqwen.types import Canary, Completion, Group, GroupRequest, Sampling


class ScriptedEngine:
    """Say `token_ids` to every prompt, shifted by the seed so that completions differ."""

    def __init__(self, token_ids: list[int]) -> None:
        self.version = 0
        self._token_ids = list(token_ids)

    def said(self, seed: int) -> list[Any]:
        return [token + seed % 5 for token in self._token_ids]

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        for request in requests:
            answers = [self.said(seed) for seed in request.seeds]
            completions = [Completion(ids, [-1.0] * len(ids), "stop", str(ids)) for ids in answers]
            yield Group(request.prompt, completions, self.version)

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        self.version = version
        return {"sync/bytes": 0.0}

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


class Scripted(Engine):
    """Answer with a script in the trainer's process."""

    title = "script"
    takes_arguments = True

    @classmethod
    def build(
        cls, config: Any, *, policy: Policy, tokenizer: PreTrainedTokenizerBase, max_model_length: int
    ) -> ScriptedEngine:
        return ScriptedEngine(**config.engine_args)


class ScriptedInWorker:
    """The same in a Ray worker."""

    def __init__(self, token_ids: list[int]) -> None:
        self._script = ScriptedEngine(token_ids)
        self._waiting: list[Any] = []

    def add(self, request_id: str, token_ids: list[int], seed: int, sampling: Sampling) -> None:
        self._waiting.append((request_id, seed))

    def step(self) -> Any:
        done, self._waiting = self._waiting, []
        return [
            (request_id, (ids := self._script.said(seed), [-1.0] * len(ids), "stop", None)) for request_id, seed in done
        ]

    def abort(self, request_ids: list[str]) -> None:
        self._waiting = [one for one in self._waiting if one[0] not in request_ids]

    def forget_prompts(self) -> None:
        pass

    def load(self, bundle: WeightBundle) -> LoadReport:
        from rlqwen.rollout.weight_sync import LoadReport

        return LoadReport(bundle.version, canary_gap=None, rebuilt=False, seconds=0.0)


class ScriptedWorker(Engine):
    """Answer with a script in Ray workers."""

    title = "script"
    in_workers = True
    takes_arguments = True

    @classmethod
    def start(cls, settings: EngineSettings) -> ScriptedInWorker:
        return ScriptedInWorker(**settings.arguments)
