"""Inject faults into the environment of whole runs: what a shell, a container or a machine may lack or set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlqwen.checkpoint.atomic_folder import find_fault
from rlqwen.cli import main
from rlqwen.reporting import read_metrics, read_summary
from rlqwen.runs.verification import compare_runs
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
WITH_RAY = ("rollout.engine=vllm", "rollout.num_cpus_per_worker=0.5")
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


def start_run(work: Path, tiny_model_path: Path, *words: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a run with Ray and vLLM in a new folder."""
    work.mkdir()
    (work / "reward.py").write_text(REWARD)
    (work / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_path))
    return subprocess.Popen(
        [sys.executable, "-m", "rlqwen", "run", "recipe.yaml", *WITH_RAY, *words],
        cwd=work,
        env=os.environ | {"RLQWEN_DISPLAY": "plain", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow_fault
@pytest.mark.parametrize("address", ["192.0.2.1:6379", "auto", "ray://127.0.0.1:1", "no address"])
@pytest.mark.fault(
    "RAY_ADDRESS names a cluster that is not there",
    "the run starts its own Ray, because only rollout.ray_address counts",
)
def test_an_address_of_ray_in_the_environment(tmp_path: Path, tiny_model_path: Path, address: str) -> None:
    run = start_run(tmp_path / "work", tiny_model_path, RAY_ADDRESS=address)
    _, error = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, error
    assert read_summary(tmp_path / "work" / "run")["steps"] == 3


@pytest.mark.slow_fault
@pytest.mark.fault("two runs with rollouts at once on one machine", "both end as alone, to the bit")
def test_two_runs_at_once(tmp_path: Path, tiny_model_path: Path) -> None:
    runs = [start_run(tmp_path / name, tiny_model_path) for name in ("one", "other")]
    for run in runs:
        _, error = run.communicate(timeout=PATIENCE_S)
        assert run.returncode == 0, error
    comparison = compare_runs(tmp_path / "one" / "run", tmp_path / "other" / "run")
    assert comparison.is_exact, str(comparison)


@pytest.mark.fault(
    "links of a run folder that form a loop, adapters and recipes that name each other", "one message, exit code 2"
)
@pytest.mark.parametrize(
    "words",
    [
        ["run", "recipe.yaml", "output_dir=a"],
        ["run", "recipe.yaml", "output_dir=a", "--resume"],
        ["check", "recipe.yaml", "output_dir=a"],
        ["run", "recipe.yaml", "output_dir=c"],
        ["run", "recipe.yaml", "output_dir=c", "train.overwrite_output_dir=true"],
        ["run", "recipe.yaml", "output_dir=c", "resume=auto"],
        ["run", "recipe.yaml", "train.resume_from_checkpoint=d/checkpoints/step-000001"],
        ["run", "recipe.yaml", "model.path=x"],
        ["export", "x", "out"],
        ["run", "one.yaml", "two.yaml"],
    ],
    ids=" ".join,
)
def test_what_names_each_other(
    tmp_path: Path,
    tiny_model_path: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    for one, other in (("c", "d"), ("d", "c")):
        Path(one).mkdir()
        (Path(one) / "checkpoints").symlink_to(f"../{other}/checkpoints")
    for one, other in (("x", "y"), ("y", "x")):
        Path(one).mkdir()
        (Path(one) / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / other)}))
    Path("reward.py").write_text(REWARD)
    text = RECIPE.format(model=tiny_model_path)
    Path("recipe.yaml").write_text(text)
    for one, other in (("one", "two"), ("two", "one")):
        Path(f"{one}.yaml").write_text(
            text.replace(str(tiny_model_path), f"./{other}/final").replace("output_dir: run", f"output_dir: {one}")
        )
    assert main(words) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "loading torch" not in line]
    assert len(errors) <= 2, errors
