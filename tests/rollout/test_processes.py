"""Test that no process of Ray or vLLM outlives the trainer, however it ends (test_pool.py tests a normal end)."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.rollout import ray_reaper as guard
from tests.narrowing import present
from tests.patience import PATIENCE_S, wait_until

MARK = "RLQWEN_TEST_MARK"
TRAINER = """
import sys
from transformers import AutoTokenizer
from rlqwen.config import RolloutConfig
from rlqwen.rollout import build_engine
from rlqwen.types import GroupRequest, Prompt, Sampling

folder = sys.argv[1]
engine = build_engine(
    RolloutConfig(engine="vllm", num_cpus_per_worker=0.5), model_path=folder,
    tokenizer=AutoTokenizer.from_pretrained(folder), compute_dtype="float32", max_model_length=512, seed=0,
)
requests = [GroupRequest(Prompt(i, [1, 2, 3], ""), tuple(range(8)), Sampling(400)) for i in range(1000)]
stream = engine.generate(requests)
next(stream)
print("sampling", flush=True)
list(stream)
"""
ENDINGS = ("interrupt", "kill")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(
        tmp_path_factory.mktemp("model") / "tiny", hidden_size=64, num_layers=2, intermediate_size=128, num_heads=2,
        num_kv_heads=1,
    )  # fmt: skip


@dataclass
class Trainer:
    process: subprocess.Popen[str]
    mark: str
    """Value in the environment that all descendants of the trainer inherit."""
    log: Path


@pytest.fixture(scope="module")
def trainers(folder: Path) -> Iterator[dict[str, Trainer]]:
    """Start one trainer per kind of ending, at the same time; kill remaining descendants at the end."""
    started = {ending: start(folder, ending) for ending in ENDINGS}
    yield started
    for trainer in started.values():
        for pid in family(trainer.mark):
            os.kill(pid, signal.SIGKILL)
        trainer.process.wait()
        present(trainer.process.stdout).close()


def start(folder: Path, ending: str) -> Trainer:
    mark, log = uuid.uuid4().hex, folder.parent / f"{ending}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(folder)],
            env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    return Trainer(process, mark, log)


def environment(pid: int) -> dict[str, str]:
    """Return the environment of a process; empty if the process has ended."""
    try:
        return dict(psutil.Process(pid).environ())
    except psutil.Error:
        return {}


def family(mark: str) -> list[int]:
    """Return the running processes whose environment contains `mark`."""
    return [pid for pid in psutil.pids() if environment(pid).get(MARK) == mark]


@pytest.mark.fault("Ctrl-C, or SIGKILL of the trainer, while workers sample", "no process of Ray or vLLM outlives it")
@pytest.mark.parametrize("ending", ENDINGS)
def test_no_process_outlives_the_trainer(trainers: dict[str, Trainer], ending: str) -> None:
    trainer = trainers[ending]
    assert present(trainer.process.stdout).readline() == "sampling\n", trainer.log.read_text()
    (folder,) = {value for pid in family(trainer.mark) if (value := environment(pid).get(guard.MARK))}
    assert Path(folder).is_dir()
    if ending == "kill":
        # At least the trainer, Ray's two servers and a worker.
        assert len(family(trainer.mark)) >= 4
        trainer.process.kill()
    elif ending == "interrupt":
        # Ctrl-C in a terminal reaches the whole process group.
        os.killpg(trainer.process.pid, signal.SIGINT)
    assert trainer.process.wait(PATIENCE_S) != 0
    wait_until(lambda: not family(trainer.mark), "its family is gone")
    wait_until(lambda: not Path(folder).exists(), "its folder is gone")
    log = trainer.log.read_text()
    if ending == "interrupt":
        assert "KeyboardInterrupt" in log
    # Progress output of vLLM and Ray does not reach the terminal.
    assert [line for line in log.splitlines() if "INFO" in line or "(raylet)" in line] == []
