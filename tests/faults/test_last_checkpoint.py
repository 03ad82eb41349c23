"""A run whose rollouts fail saves the beginning of the step that failed, and resumes from there to the bit."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlqwen import GRPOConfig, GRPOTrainer
from rlqwen.config import Recipe
from rlqwen.errors import MainRankFailed, RolloutError
from rlqwen.rollout.engines.transformers import TransformersEngine
from rlqwen.runs.verification import compare_runs
from rlqwen.trainers.factory import build_trainer
from rlqwen.types import Group, GroupRequest
from tests.forked_ranks import run_ranks
from tests.ranked import SUMS, prefers_even


def recipe_of(model: Path, folder: Path, algorithm: str = "grpo", **changes: Any) -> Recipe:
    train: dict[str, Any] = {"per_device_train_batch_size": 16, "max_completion_length": 8, "max_steps": 5}
    train |= {"learning_rate": 1e-3, "save_steps": 500}
    if algorithm == "grpo":
        train |= {"num_generations": 8}
    return Recipe.parse(
        {
            "algorithm": algorithm,
            "model": {"path": str(model)},
            "data": {"train": {"generator": "arithmetic", "args": {"kind": "prompts", "size": 64}}},
            "rewards": [{"name": "length", "args": {"budget": 6}}],
            "rollout": {"engine": "transformers"},
            "train": train | changes,
            "output_dir": str(folder),
        }
    )


def fail_at(patch: pytest.MonkeyPatch, failing_call: int) -> None:
    """Have a call of the engine fail after its first group."""
    generate, calls = TransformersEngine.generate, 0

    def failing(engine: TransformersEngine, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        nonlocal calls
        calls += 1
        for place, group in enumerate(generate(engine, requests)):
            if calls == failing_call and place == 1:
                raise RolloutError("no worker can be reached")
            yield group

    patch.setattr(TransformersEngine, "generate", failing)


@pytest.mark.parametrize(("algorithm", "ranks"), [("grpo", 1), ("ppo", 1), ("grpo", 2)])
@pytest.mark.fault(
    "rollouts fail in the middle of a step, on one rank and on two", "the last update is saved, and resumes to the bit"
)
def test_a_run_whose_rollouts_fail_saves_the_last_update(
    tiny_model_path: Path, tmp_path: Path, algorithm: str, ranks: int
) -> None:
    def train(name: str, *, failing_call: int = 0, resume: bool | None = None) -> str:
        """Return the error of this rank, if any."""
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, failing_call)
            trainer = build_trainer(recipe_of(tiny_model_path, tmp_path / name, algorithm))
            try:
                trainer.train(resume_from_checkpoint=resume)
            except (RolloutError, MainRankFailed) as error:
                return f"{type(error).__name__}: {error}"
            return ""

    def on_ranks(function: Callable[[], str]) -> list[str]:
        return [function()] if ranks == 1 else run_ranks(function, world_size=ranks)

    assert on_ranks(lambda: train("straight")) == [""] * ranks
    main, *others = on_ranks(lambda: train("run", failing_call=2))
    assert re.fullmatch(r"RolloutError: no worker can be reached\nsaved after update [1-4]", main), main
    assert all(error.startswith("MainRankFailed") for error in others)
    assert on_ranks(lambda: train("run", resume=True)) == [""] * ranks
    comparison = compare_runs(tmp_path / "straight", tmp_path / "run")
    assert comparison.is_exact, str(comparison)


@pytest.mark.parametrize(
    ("changes", "failing_call", "why"),
    [
        ({}, 1, "no checkpoint is made, because no update was made yet"),
        # Two draws belong to a step: its own, and that of its evaluation.
        (
            {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1},
            4,
            "no checkpoint is made after that of update 1, because the step had begun to change the weights, by update 2",
        ),
    ],
    ids=["first-step", "evaluation"],
)
@pytest.mark.fault("rollouts fail where no checkpoint can be made", "the message says why, and names the last one")
def test_a_message_says_why_no_checkpoint_is_made(
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    failing_call: int,
    why: str,
) -> None:
    fail_at(monkeypatch, failing_call)
    settings: dict[str, Any] = {"save_strategy": "steps", "per_device_train_batch_size": 16, "num_generations": 8}
    settings |= {"max_completion_length": 8, "rollout": {"engine": "transformers"}, "eval_strategy": "no"} | changes
    config = GRPOConfig(output_dir=str(tmp_path / "run"), scoring={"in_process": ["prefers_even"]}, **settings)
    trainer = GRPOTrainer(str(tiny_model_path), prefers_even, config, SUMS, SUMS[:2])
    with pytest.raises(RolloutError, match=rf"reached\n{why}"):
        trainer.train()
