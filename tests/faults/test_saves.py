"""Inject faults into saving: the run folder always holds the complete old or new checkpoint, and the run resumes."""

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from transformers import TrainerCallback

from rlqwen import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from rlqwen.checkpoint import complete_checkpoints, find_fault
from rlqwen.config import Recipe
from rlqwen.errors import ConfigError, SaveError
from rlqwen.runs.verification import compare_runs, verify_resume
from tests.forked import run_forked
from tests.patience import wait_until

ROWS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}" * 3}]}
    for i in range(11)
]
_CHANGING = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def make(model: Path, folder: Path, **options: Any) -> SFTTrainer:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    return SFTTrainer(str(model), SFTConfig(output_dir=str(folder), **defaults | options), ROWS)


@pytest.fixture(scope="module")
def run(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a trainer after its fourth update, whose folder holds the checkpoint of the second."""
    folder = tmp_path_factory.mktemp("saves") / "run"
    trainer = make(tiny_model_path, folder, max_steps=3, lr_scheduler_type="constant")
    pytest.MonkeyPatch().setattr(trainer, "close", lambda: None)
    trainer.train()
    for name in ("final", "summary.json"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return trainer


def copy_of(run: Any, folder: Path) -> Path:
    shutil.copytree(run.output_dir, folder)
    return folder


def resume(model: Path, folder: Path, **options: Any) -> Any:
    """Resume to the fourth update, and return the checkpoint from which the run resumed."""
    trainer = make(model, folder, max_steps=4, lr_scheduler_type="constant", resume_allow_changes=True, **options)
    trainer.train(resume_from_checkpoint=True)
    assert (folder / "final" / "model.safetensors").is_file()
    return json.loads((folder / "summary.json").read_text())["resumed"][0]["step"]


def kill_at(operation: int) -> list[str]:
    """Kill this process before its file operation with this number (-1: never); return the names of operations."""
    names: list[str] = []

    def happens(name: str) -> None:
        if len(names) == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        names.append(name)

    def audit(event: str, arguments: Any) -> None:
        writes = event == "open" and (set(str(arguments[1])) & set("wax+") or arguments[2] & os.O_CREAT)
        if writes or event in _CHANGING:
            happens(f"{event} {arguments[0]}")

    fsync, serialize = os.fsync, safetensors.torch.serialize_file

    def watched_fsync(descriptor: int) -> None:
        happens("fsync")
        fsync(descriptor)

    def watched_serialize(*given: Any, **named: Any) -> None:
        happens("serialize_file")
        serialize(*given, **named)

    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", watched_fsync)
    patch.setattr(safetensors.torch, "serialize_file", watched_serialize)
    sys.addaudithook(audit)  # sees only operations of Python; safetensors writes from Rust
    return names


def save_in(run: Any, folder: Path, operation: int, log: Path) -> int:
    """Save the trainer's current state in `folder`, killed at an operation; return the exit code."""

    def child() -> None:
        run.checkpointer.output_dir, run.checkpointer.saved_step = folder, -1
        names = kill_at(operation)
        run.checkpointer.save()
        log.write_text("\n".join(names))

    return run_forked(child)


@pytest.mark.fault(
    "SIGKILL of the trainer at each file operation of a save",
    "the folder holds the old or the new checkpoint, whole; the run goes on from it",
)
@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow_fault, id="each"), pytest.param(9, id="some")]
)
def test_killed_at_each_file_operation_of_a_save(run: Any, tiny_model_path: Path, tmp_path: Path, every: int) -> None:
    log = tmp_path / "operations"
    assert save_in(run, copy_of(run, tmp_path / "whole"), -1, log) == 0
    operations = log.read_text().splitlines()
    assert {"fsync", "serialize_file"} <= set(operations)
    assert len(operations) > 40
    # The last two operations: rename the new checkpoint, and remove the older one.
    renames = [number for number, name in enumerate(operations) if name.startswith("os.rename")][-2:]
    found = []
    for number in sorted({*range(0, len(operations), every), *renames, renames[0] + 1}):
        folder = copy_of(run, tmp_path / "killed")
        assert save_in(run, folder, number, log) == -signal.SIGKILL
        newest = next(complete_checkpoints(folder, lambda note: None), None)
        assert newest is not None, f"killed before {operations[number]}, operation {number}"
        found.append(int(newest.name[5:]))
        if number in renames or (every == 1 and number % 20 == 7):
            assert resume(tiny_model_path, folder) == found[-1]
            assert not list((folder / "checkpoints").glob(".*"))
        shutil.rmtree(folder)
    assert found == sorted(found)
    assert set(found) == {2, 3}


@pytest.mark.fault("a partial checkpoint that a killed save left behind", "it is not used, and deleted on going on")
def test_a_left_over_partial_checkpoint(run: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    partial = folder / "checkpoints" / ".step-000009.partial"
    shutil.copytree(folder / "checkpoints" / "step-000002", partial)
    (partial / "manifest.json").unlink()
    assert resume(tiny_model_path, folder) == 2
    assert not partial.exists()


def two_checkpoints(run: Any, folder: Path) -> tuple[Path, Path]:
    """Return the checkpoints of updates 2 and 3 in one folder."""
    older = copy_of(run, folder) / "checkpoints" / "step-000002"
    newer = older.with_name("step-000003")
    shutil.copytree(older, newer)
    return older, newer


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


DAMAGES: dict[str, Any] = {
    "model.safetensors": flip_a_byte,
    "optimizer.safetensors": truncate,
    "rng-0.json": Path.unlink,
    "state.json": flip_a_byte,
    "manifest.json": truncate,
}


@pytest.mark.fault(
    "a flipped byte, a truncated file, a missing file in the newest checkpoint",
    "a note names the file, and the next older complete checkpoint is used; refused where it was named",
)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(run: Any, tiny_model_path: Path, tmp_path: Path, name: str) -> None:
    older, newer = two_checkpoints(run, tmp_path / "run")
    DAMAGES[name](newer / name)
    notes: list[str] = []
    assert list(complete_checkpoints(tmp_path / "run", notes.append)) == [older]
    assert len(notes) == 1
    assert name in notes[0]
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        make(tiny_model_path, tmp_path / "run").train(resume_from_checkpoint=newer)
    if name == "model.safetensors":
        assert resume(tiny_model_path, tmp_path / "run") == 2
        assert not newer.exists() or find_fault(newer) is None


def mounted(folder: Path, options: str) -> Any:
    """Mount a small file system; skip the test if this user may not mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here; the limit on file sizes is tested in its place")
    return contextlib.closing(_Mount(folder))


class _Mount:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.mark.fault("disk full during a save (a small file system)", "exit code 1, the part removed, the last one kept")
def test_a_full_disk(run: Any, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m"):
        folder = copy_of(run, tmp_path / "disk" / "run")
        filler = tmp_path / "disk" / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(folder).free - 500_000))
        check_failed_save(run, folder)


@pytest.mark.fault(
    "a limit on file sizes during a save (RLIMIT_FSIZE, in place of a full disk)",
    "exit code 1, the part removed, the last one kept",
)
def test_a_file_size_limit(run: Any, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        check_failed_save(run, folder)

    assert run_forked(child) == 0


def check_failed_save(run: Any, folder: Path) -> None:
    checkpointer, output_dir = run.checkpointer, run.checkpointer.output_dir
    checkpointer.output_dir, checkpointer.saved_step = folder, -1
    try:
        with pytest.raises(SaveError, match=r"written, .* MB are free; the last checkpoint took .* MB") as caught:
            checkpointer.save()
    finally:
        checkpointer.output_dir = output_dir
    assert caught.value.exit_code == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert find_fault(folder / "checkpoints" / "step-000002") is None


@pytest.mark.fault(
    "ENOSPC while metrics are written (injected at the write)", "a message and exit code 1, no traceback"
)
def test_metrics_that_cannot_be_written(tiny_model_path: Path, tmp_path: Path) -> None:
    class Full(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = make(tiny_model_path, tmp_path / "run")
    trainer.callbacks.append(Full())
    with pytest.raises(SaveError, match="No space left"):
        trainer.train()


@pytest.mark.fault("a read-only output folder", "refused with a message before anything is loaded: exit code 2")
def test_a_read_only_folder(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)

    def child() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(ConfigError, match="cannot be written to: Permission denied") as caught:
            make(tiny_model_path, folder)
        assert caught.value.exit_code == 2

    assert run_forked(child) == 0
    assert not list(folder.iterdir())


class Wait(TrainerCallback):
    """Write a file once training has started, and keep running."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.file.write_text(str(os.getpid()))
        time.sleep(600)


@pytest.mark.fault(
    "two runs in one output folder", "the second is refused, naming process and host; nothing overwritten"
)
@pytest.mark.parametrize("options", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": True}])
def test_two_runs_in_one_folder(tiny_model_path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder, begun = tmp_path / "run", tmp_path / "begun"

    def child() -> None:
        trainer = make(tiny_model_path, folder)
        trainer.callbacks.append(Wait(begun))
        trainer.train()

    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(1)
    try:
        wait_until(begun.exists, "the first run trains")
        before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
        with pytest.raises(ConfigError, match=rf"in use: process {pid} on .* is training there"):
            make(tiny_model_path, folder, **options)
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    make(tiny_model_path, folder, overwrite_output_dir=True, max_steps=1, save_strategy="no").train()


class Trap:
    """Touch a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path, int, bool], None], tuple[Path]]:
        return (Path.touch, (self.path,))


@pytest.mark.fault(
    "malicious pickles in a checkpoint folder", "never executed; refused where they stand in for weights"
)
def test_pickles_in_a_checkpoint_are_never_read(run: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    folder, sprung = copy_of(run, tmp_path / "run"), tmp_path / "sprung"
    checkpoint = folder / "checkpoints" / "step-000002"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    assert sprung.exists()
    sprung.unlink()
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "training_args.bin", "rng-0.pkl", "a/b.pt"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(trap)
    assert resume(tiny_model_path, folder, save_total_limit=None) == 2
    trainer = make(tiny_model_path, tmp_path / "other")
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors is missing" in (find_fault(checkpoint) or "")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        trainer.policy.load_checkpoint(checkpoint)
    assert not sprung.exists()


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def make_grpo(model: Path, folder: Path) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=4, max_steps=12,
        save_steps=1, save_total_limit=2, learning_rate=3e-3, rollout={"engine": "transformers"},
        scoring={"in_process": ["prefers_even"]}, resume_from_checkpoint="auto",
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}]} for i in range(9)]
    return GRPOTrainer(str(model), prefers_even, args, rows)


@pytest.mark.fault(
    "SIGKILL of the trainer at random moments, again and again, with resume: auto",
    "metrics, completions and final weights are those of a run without a break, to the bit",
)
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow_fault)])
def test_killed_at_random_moments(tiny_model_path: Path, tmp_path: Path, kills: int) -> None:
    assert run_forked(lambda: make_grpo(tiny_model_path, tmp_path / "straight").train()) == 0
    draw = random.Random(kills)
    outcomes = [
        run_forked(lambda: make_grpo(tiny_model_path, tmp_path / "run").train(), kill_after_s=draw.uniform(0.1, 1.2))
        for _ in range(kills)
    ]
    assert -signal.SIGKILL in outcomes
    assert run_forked(lambda: make_grpo(tiny_model_path, tmp_path / "run").train()) == 0
    comparison = compare_runs(tmp_path / "straight", tmp_path / "run")
    assert comparison.is_exact, str(comparison)
    assert comparison.num_completions == 12 * 8


@pytest.mark.fault(
    "SIGKILL of the trainer with vLLM rollouts, for GRPO and PPO, drawn ahead too",
    "metrics, completions and final weights are those of a run without a break, to the bit",
)
@pytest.mark.slow_fault
@pytest.mark.parametrize(("algorithm", "lag"), [("grpo", 0), ("ppo", 0), ("grpo", 1)])
def test_killed_with_vllm_rollouts(tiny_model_path: Path, tmp_path: Path, algorithm: str, lag: int) -> None:
    pytest.importorskip("vllm")
    recipe = Recipe.parse(
        {
            "algorithm": algorithm,
            "model": {"path": str(tiny_model_path)},
            "data": {"train": {"generator": "arithmetic", "args": {"kind": "prompts", "size": 32}}},
            "rewards": [{"name": "length", "args": {"budget": 6}}],
            "rollout": {"engine": "vllm", "num_cpus_per_worker": 0.5, "max_staleness": lag},
            "train": {"per_device_train_batch_size": 32, "max_completion_length": 12, "learning_rate": 1e-3},
            "output_dir": str(tmp_path / "run"),
        }
    )
    comparison = verify_resume(recipe, steps=4, announce=print)
    assert comparison.is_exact, str(comparison)
    assert comparison.num_completions == 4 * 32
    assert not (tmp_path / "run").exists()
