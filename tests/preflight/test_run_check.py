"""Test what a check finds about the run itself, without a model, data or a device."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import Recipe
from rlqwen.errors import ConfigError
from rlqwen.preflight import check_before_run, check_recipe
from rlqwen.preflight.run_check import check_best_metric, metric_names, run_checks
from rlqwen.rewards import build_rewards
from rlqwen.run_folder.layout import find_run_files, is_inside, move_run_aside
from rlqwen.runs.pipeline import run_recipe


def recipe(folder: Path, algorithm: str = "sft", **train: Any) -> Recipe:
    values = {
        "algorithm": algorithm,
        "model": {"path": "builtin:tiny-qwen3"},
        "data": {"train": {"generator": "arithmetic", "args": {"kind": "sft", "size": 8}}},
        "train": {"max_steps": 4, "use_cpu": True, **train},
        "output_dir": str(folder / "run"),
    }
    return Recipe.parse(values | ({"rewards": ["accuracy"]} if algorithm in ("grpo", "ppo") else {}))


def faults(given: Recipe) -> str:
    found = []
    for check in run_checks(given):
        try:
            check()
        except ConfigError as error:
            found.append(str(error))
    return "\n".join(found)


@pytest.mark.parametrize(
    ("train", "found"),
    [
        ({"lr_scheduler_type": "cosin"}, "train.lr_scheduler_type: unknown schedule 'cosin'; known: constant, "),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "train.lr_scheduler_type: unknown schedule 'reduce_lr_on_plateau'",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "train.lr_scheduler_type='cosine_with_min_lr': One of min_lr"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "train.lr_scheduler_type='linear': get_linear_schedule_with_warmup"),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "x"}},
            "train.lr_scheduler_type='cosine_with_restarts': ",
        ),
        ({"report_to": ["mlflow"]}, "train.report_to: unknown metric sink 'mlflow'; known: tensorboard, wandb"),
        ({"report_to": "trackio"}, "train.report_to: 'trackio' is not installed"),
        ({"resume_from_checkpoint": "nowhere/step-1"}, "train.resume_from_checkpoint: there is no checkpoint 'nowhere"),
        ({"resume_from_checkpoint": True}, "train: there is no complete checkpoint in "),
    ],
)
def test_settings_of_the_run_are_checked(tmp_path: Path, train: dict[str, Any], found: str) -> None:
    assert faults(recipe(tmp_path)) == ""
    wrong = recipe(tmp_path, **train)
    assert faults(wrong).startswith(found)
    assert "\n" not in faults(wrong)
    with pytest.raises(ConfigError) as caught:
        check_before_run([wrong])
    assert str(caught.value).startswith(found)


def test_check_names_all_faults_of_the_run_at_once(tmp_path: Path) -> None:
    wrong = recipe(
        tmp_path, lr_scheduler_type="x", report_to="y", resume_from_checkpoint="z", metric_for_best_model="accuracy"
    )
    found = "\n".join(map(str, check_recipe(wrong).faults))
    for part in ("unknown schedule 'x'", "sink 'y'", "no checkpoint 'z'", "metric_for_best_model='accuracy'"):
        assert part in found


@pytest.mark.parametrize("cause", ["file", "file above", "link to nothing", "checkpoints link to nothing", "read-only"])
def test_folders_that_cannot_be_written_are_refused(tmp_path: Path, cause: str) -> None:
    given = recipe(tmp_path)
    folder = tmp_path / "run"
    if cause == "file":
        folder.touch()
    elif cause == "file above":
        (tmp_path / "a").touch()
        given = given.model_copy(update={"output_dir": str(tmp_path / "a" / "b" / "run")})
    elif cause == "link to nothing":
        folder.symlink_to(tmp_path / "nothing")
    elif cause == "checkpoints link to nothing":
        folder.mkdir()
        (folder / "checkpoints").symlink_to(tmp_path / "nothing")
    else:
        given = given.model_copy(update={"output_dir": "/proc/self/run"})
    assert faults(given).startswith("output_dir")
    assert list(tmp_path.rglob(".rlqwen-check-*")) == []


def metrics_of(folder: Path) -> set[str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key.removeprefix("eval/") for line in lines for key in line if key.startswith("eval/")}


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "grpo"])
def test_the_known_metrics_are_those_of_an_evaluation(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    source: dict[str, Any] = {"path": "builtin:pairs", "limit": 4}
    if algorithm in ("sft", "grpo"):
        source = {"generator": "arithmetic", "args": {"kind": "sft" if algorithm == "sft" else "prompts", "size": 8}}
    online = {"max_completion_length": 4} if algorithm == "grpo" else {}
    train = {"max_steps": 1, "eval_on_start": True, "eval_strategy": "steps", "use_cpu": True, "save_strategy": "no"}
    values: dict[str, Any] = {
        "algorithm": algorithm, "model": {"path": "builtin:tiny-qwen3"}, "data": {"train": source, "eval": source},
        "train": train | online, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    if algorithm == "grpo":
        values |= {"rewards": ["accuracy"], "rollout": {"engine": "transformers"}}
    given = Recipe.parse(values)
    rewards = build_rewards(["accuracy"], [{}]) if algorithm == "grpo" else []
    run_recipe(given, print)
    known, is_all = metric_names(given, rewards)
    found = metrics_of(tmp_path / "run")
    assert is_all
    assert found <= set(known)
    assert set(known) - found <= {"kl"}  # of some losses only
    for name in found:
        better = given.train.model_copy(update={"metric_for_best_model": f"eval/{name}"})
        assert check_best_metric(given.model_copy(update={"train": better}), rewards) is None


def test_a_metric_that_nobody_computes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.metric_for_best_model='reward/acuracy/mean'.*did you mean"):
        check_best_metric(
            recipe(tmp_path, "grpo", metric_for_best_model="reward/acuracy/mean"), build_rewards(["accuracy"], [{}])
        )
    note = check_best_metric(recipe(tmp_path, "grpo", metric_for_best_model="mine"), None)
    assert note is not None
    assert "is not among the metrics that are known before an evaluation" in note


def test_checkpoints_may_be_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run saves, is gone on from, is moved aside and run again with `checkpoints` as a link."""
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    run, disk = tmp_path / "run", tmp_path / "disk" / "mine"
    disk.mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to(os.path.relpath(disk, run))
    once = recipe(tmp_path, save_steps=2, max_steps=2, save_strategy="steps")
    assert faults(once) == ""
    check_before_run([once])
    run_recipe(once, print)
    assert [folder.name for folder in disk.iterdir()] == ["step-000002"]
    assert is_inside(run / "checkpoints" / "step-000002", run)
    more: dict[str, Any] = {"max_steps": 4, "resume_from_checkpoint": True, "resume_allow_changes": True}
    longer = recipe(tmp_path, save_steps=2, save_strategy="steps", **more)
    check_before_run([longer])
    run_recipe(longer, print)
    assert sorted(folder.name for folder in disk.iterdir()) == ["step-000002", "step-000004"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert steps == sorted(set(steps))
    again = recipe(tmp_path, save_steps=2, max_steps=2, save_strategy="steps", overwrite_output_dir=True)
    check_before_run([again])
    run_recipe(again, print)
    assert (run / "checkpoints").is_symlink()
    assert sorted(folder.name for folder in disk.iterdir()) == ["previous-1", "step-000002"]
    assert (run / "previous-1" / "checkpoints" / "step-000004" / "model.safetensors").is_file()
    assert "checkpoints" in find_run_files(run / "previous-1")


def test_an_empty_checkpoints_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "previous-1").mkdir(parents=True)
    assert find_run_files(tmp_path) == []
    assert move_run_aside(tmp_path) is None
