"""A run whose rollouts fail saves the beginning of the step that failed, and resumes from there to the bit."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import Recipe
from rlqwen.errors import RolloutError
from rlqwen.rollout.engines.transformers import TransformersEngine
from rlqwen.runs.verification import compare_runs
from rlqwen.trainers.factory import build_trainer
from rlqwen.types import Group, GroupRequest


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.fault("rollouts fail in the middle of a step", "the last update is saved, and resumes to the bit")
def test_a_run_whose_rollouts_fail_saves_the_last_update(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    def recipe(name: str) -> Recipe:
        train: dict[str, Any] = {"per_device_train_batch_size": 16, "max_completion_length": 8, "max_steps": 5}
        train |= {"learning_rate": 1e-3, "save_steps": 500}
        if algorithm == "grpo":
            train |= {"num_generations": 8}
        return Recipe.parse(
            {
                "algorithm": algorithm,
                "model": {"path": str(tiny_model_path)},
                "data": {"train": {"generator": "arithmetic", "args": {"kind": "prompts", "size": 32}}},
                "rewards": [{"name": "length", "args": {"budget": 6}}],
                "rollout": {"engine": "transformers"},
                "train": train,
                "output_dir": str(tmp_path / name),
            }
        )

    build_trainer(recipe("straight")).train()
    generate, calls = TransformersEngine.generate, 0

    def failing(engine: TransformersEngine, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        nonlocal calls
        calls += 1
        for place, group in enumerate(generate(engine, requests)):
            if calls == 2 and place == 1:
                raise RolloutError("no worker can be reached")
            yield group

    monkeypatch.setattr(TransformersEngine, "generate", failing)
    with pytest.raises(RolloutError, match=r"no worker can be reached\nsaved after update [1-4]"):
        build_trainer(recipe("run")).train()
    trainer = build_trainer(recipe("run"))
    trainer.train(resume_from_checkpoint=True)
    comparison = compare_runs(tmp_path / "straight", tmp_path / "run")
    assert comparison.is_exact, str(comparison)
