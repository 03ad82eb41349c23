"""A stranger's package adds a loss, an advantage estimator, a trainer and rollout engines, and touches no file of rlqwen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PLUGIN = Path(__file__).parent / "plugins" / "rlqwen-example-algorithms"
SCRIPT = """
import json, sys
from rlqwen.cli import main
for name in sys.argv[1:]:
    code = main(["run", name])
    if code:
        sys.exit(f"{name}: {code}")
for kind in ("losses", "advantages", "trainers", "engines"):
    main([kind])
"""
PROMPTS = {"generator": "arithmetic", "args": {"kind": "prompts", "size": 16}}
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no", "max_completion_length": 8}
SAY = {"token_ids": [40, 41, 42]}


def recipes(model: Path, teacher: Path) -> dict[str, dict[str, Any]]:
    online = {
        "model": {"path": str(model)},
        "data": {"train": PROMPTS},
        "rewards": [{"name": "length", "args": {"budget": 8}}],
    }
    return {
        "loss_and_advantage": online
        | {
            "algorithm": "grpo",
            "rollout": {"engine": "scripted", "engine_args": SAY},
            "train": TRAIN | {"loss_type": "soft_clip", "advantage_estimator": "rank", "num_generations": 4},
        },
        "worker": online
        | {
            "algorithm": "grpo",
            "rollout": {"engine": "scripted_worker", "engine_args": SAY, "num_cpus_per_worker": 0.5},
            "train": TRAIN | {"num_generations": 4},
        },
        "trainer": {
            "algorithm": "sampled_distillation",
            "model": {"path": str(model)},
            "data": {"train": PROMPTS},
            "rollout": {"engine": "transformers"},
            "teacher": {"path": str(teacher), "strength": 0.5},
            "train": TRAIN | {"learning_rate": 1e-2, "max_steps": 20, "per_device_train_batch_size": 32},
        },
        "pairs": {
            "algorithm": "dpo",
            "model": {"path": str(model)},
            "data": {"train": {"path": "builtin:pairs"}},
            "train": {
                "loss_type": ["nearer"], "loss_args": {"nearer": {"target": 0.5}}, "max_steps": 1, "max_length": 256,
                "per_device_train_batch_size": 2, "save_strategy": "no",
            },
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> tuple[Path, str]:
    """Run every recipe with the package installed beside rlqwen; return the folder, and what was printed."""
    from rlqwen.models.tiny import build_tiny_qwen3

    folder = tmp_path_factory.mktemp("plugin")
    teacher = build_tiny_qwen3(folder / "teacher", hidden_size=64, seed=1)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(folder / "site"), str(PLUGIN)], check=True)
    path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
    names = []
    for name, recipe in recipes(tiny_model_path, teacher).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": name}))
        names.append(f"{name}.yaml")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "RLQWEN_DISPLAY": "plain", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, done.stdout


def logged(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_a_loss_and_an_estimator_train_on_what_a_scripted_engine_says(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    metrics = logged(folder, "loss_and_advantage")
    assert all(line["example/ratio_max"] >= line["example/ratio"] > 0 for line in metrics)
    lines = (folder / "loss_and_advantage/completions/step-000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {round(row["advantage"], 3) for row in rows} <= {-1.0, -0.333, 0.333, 1.0}
    assert {row["completion"] for row in rows} <= {str([token + shift for token in (40, 41, 42)]) for shift in range(5)}


def test_an_engine_runs_in_ray_workers(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    assert len(logged(folder, "worker")) == 2


def test_a_trainer_with_a_section_of_its_own_learns(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    gaps = [line["teacher/gap"] for line in logged(folder, "trainer")]
    assert gaps[0] < 0
    assert sum(gaps[-3:]) / 3 > sum(gaps[:3]) / 6  # at least half of the way to the teacher
    resolved = yaml.safe_load((folder / "trainer" / "recipe.yaml").read_text())
    assert resolved["teacher"]["strength"] == 0.5


def test_a_loss_of_pairs_trains(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    assert logged(folder, "pairs")[0]["loss"] == pytest.approx(0.25, abs=1e-4)  # margins of 0, a target of 0.5


@pytest.mark.parametrize("name", ["soft_clip", "nearer", "rank", "sampled_distillation", "scripted_worker"])
def test_the_package_is_listed_with_its_origin(ran: tuple[Path, str], name: str) -> None:
    _, printed = ran
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
    assert "rlqwen-example-algorithms 0.3.0" in line
