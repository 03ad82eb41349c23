"""Inject faults into the environment of whole runs: what a shell, a container or a machine may lack or set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlqwen.checkpoint.atomic_folder import find_fault
from rlqwen.reporting import read_metrics, read_summary
from tests.patience import PATIENCE_S

RECIPE = """\
algorithm: grpo
model: {{path: {model}}}
data: {{train: {{generator: arithmetic, args: {{size: 16}}}}}}
rewards: ["reward.py:score"]
rollout: {{engine: transformers}}
train: {{max_steps: 3, per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 4, save_steps: 2}}
output_dir: run
"""
REWARD = """\
def score(completions, **kwargs):
    return [float(len(str(completion)) % 3) for completion in completions]
"""
JUMPING_CLOCK = """\
import itertools, time
real, jumps = time.time, itertools.cycle([0.0, 86400.0, -86400.0, 1e9, 0.0])
time.time = lambda: real() + next(jumps)
"""


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    ("setup", "folder"),
    [
        pytest.param(setup, folder, id=what, marks=pytest.mark.fault(f"a run with {what}", "it ends as any other run"))
        for what, setup, folder in (
            ("no HOME", "unset HOME", "work"),
            ("a HOME that does not exist", "export HOME=/nonexistent", "work"),
            ("256 open files at most", "ulimit -n 256", "work"),
            ("umask 077", "umask 077", "work"),
            ("a path with spaces, quotes and Chinese characters", ":", "我的 run's $x [a] 文件夹"),
            ("a clock that jumps", "export PYTHONPATH=$PWD/clock:$PYTHONPATH", "work"),
        )
    ],
)
def test_an_environment(tmp_path: Path, tiny_model_path: Path, setup: str, folder: str) -> None:
    work = tmp_path / folder
    (work / "clock").mkdir(parents=True)
    (work / "clock" / "sitecustomize.py").write_text(JUMPING_CLOCK)
    (work / "reward.py").write_text(REWARD)
    (work / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_path))
    command = (
        f"{setup}; {sys.executable} -m rlqwen run recipe.yaml && {sys.executable} -m rlqwen run recipe.yaml --resume"
    )
    ended = subprocess.run(
        ["sh", "-c", command],
        cwd=work,
        env=os.environ | {"RLQWEN_DISPLAY": "plain", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    summary = read_summary(work / "run")
    assert summary["steps"] == 3
    assert 0 < summary["wall_time_s"] < PATIENCE_S
    assert all(line["time/step"] > 0 for line in read_metrics(work / "run") if "time/step" in line)
    (checkpoint,) = (work / "run" / "checkpoints").glob("step-*")
    assert find_fault(checkpoint) is None
