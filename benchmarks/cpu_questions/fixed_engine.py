"""Return completions that were drawn before the run, as a rollout engine of rlqwen and as a rollout function of TRL."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlqwen.config import RolloutConfig
from rlqwen.rollout.engine import Engine
from rlqwen.types import Canary, Completion, Group, GroupRequest


def draw_completions(path: Path, count: int, group: int, limit: int, mean_length: int | None) -> list[list[list[int]]]:
    """Write and return the token ids of `group` completions for each of `count` prompts.

    Args:
        limit: largest length in tokens.
        mean_length: 1 / the probability that a token is the last; None: all completions have the largest length.
    """
    rng = random.Random(7)

    def draw() -> list[int]:
        ids = [rng.randrange(200)]
        while len(ids) < limit and (mean_length is None or rng.random() >= 1 / mean_length):
            ids.append(rng.randrange(200))
        return ids

    drawn = [[draw() for _ in range(group)] for _ in range(count)]
    path.write_text(json.dumps(drawn), "utf-8")
    return drawn


class FixedEngine(Engine):
    """Name the engine for `rollout.engine`; `engine_args.path` is a file that `draw_completions` wrote."""

    title = "fixed completions"
    takes_arguments = True

    @classmethod
    def build(cls, config: RolloutConfig, *, policy: Any, tokenizer: Any, max_model_length: int) -> "FixedCompletions":
        return FixedCompletions(json.loads(Path(config.engine_args["path"]).read_text("utf-8")))


class FixedCompletions:
    """Yield the drawn completions of each prompt, without logprobs, so that no correction for the sampler applies."""

    def __init__(self, drawn: list[list[list[int]]]) -> None:
        self.version = 0
        self._drawn = drawn

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        for request in requests:
            rows = self._drawn[request.prompt.index]
            unknown: Any = None  # logprobs, which plug-in engines may leave out
            yield Group(request.prompt, [Completion(row, unknown, "length", "") for row in rows], self.version)

    def load_weights(self, version: int, weights: Iterable[Any], canary: Canary | None) -> dict[str, float]:
        self.version = version
        return {}

    def cancel(self) -> None:
        """Nothing runs in another thread."""

    def close(self) -> None:
        """Nothing to end."""


class FixedRollouts:
    """Return the drawn completions to TRL, as its `rollout_func`."""

    def __init__(self, texts: Sequence[str], drawn: list[list[list[int]]]) -> None:
        self._place = {text: place for place, text in enumerate(texts)}
        self._drawn = drawn

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        seen: dict[str, int] = {}
        completions = []
        for prompt in prompts:
            number = seen[prompt] = seen.get(prompt, -1) + 1
            completions.append(self._drawn[self._place[prompt]][number])
        prompt_ids = trainer.processing_class(prompts).input_ids
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}
