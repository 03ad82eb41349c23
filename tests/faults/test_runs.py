"""Inject faults into whole runs: interrupt real `rlqwen run` processes at chosen moments, or let resources run out.

A moment is recognized by an action of the run (a file appears, a process starts), never only by time.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlqwen.checkpoint.atomic_folder import find_fault
from rlqwen.reporting import read_metrics, read_summary
from rlqwen.rollout.ray_reaper import MARK as MARK_OF_RAY
from rlqwen.runs.verification import compare_runs
from tests.narrowing import present
from tests.patience import PATIENCE_S, wait_until

MARK = "RLQWEN_TEST_RUN"
SFT = """\
algorithm: sft
model: {{path: {model}}}
data: {{train: {{generator: arithmetic, args: {{kind: sft, size: 64}}}}}}
train: {{max_steps: {steps}, per_device_train_batch_size: 4, save_steps: 1, save_total_limit: 2}}
output_dir: run
"""
GRPO = """\
algorithm: grpo
model: {{path: {model}}}
data: {{train: {{generator: arithmetic, args: {{size: 64}}}}}}
rewards: ["{reward}:score"]
rollout: {{engine: vllm, num_cpus_per_worker: 0.5, max_num_seqs: 8}}
train:
  {{max_steps: {steps}, per_device_train_batch_size: 128, num_generations: 8, max_completion_length: 256, save_steps: 1}}
output_dir: run
"""
REWARD = """\
import time
from pathlib import Path

def score(completions, **kwargs):
    Path({marker!r}).touch()
    time.sleep({pause})
    return [float(len(str(completion)) % 7) for completion in completions]
"""
DEADLINE_S = PATIENCE_S
"""Time limit for a run to reach the moment; most of it is the start of an engine."""
END_S = PATIENCE_S
"""Time limit for an interrupted run to end."""

INTERRUPTED = "rlqwen: (interrupted|Ctrl-C: saved after update)"
"""Message after Ctrl-C; a run ends at once if no update would be lost."""


@dataclass
class Run:
    """Hold a run and the processes that it starts, which inherit a value in the environment."""

    process: subprocess.Popen[bytes]
    mark: str
    folder: Path
    log: Path

    def family(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _mark_of(process) == self.mark]

    def wait_for(self, moment: Any) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not moment(self):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.001)

    def has_started(self, name: str) -> bool:
        return any(name in " ".join(_command_of(process)) for process in self.family())

    def expect(self, code: int, message: str, seconds: float = END_S) -> None:
        """Assert that the run ends with `code` and one message, and leaves no process and no broken checkpoint."""
        started = time.monotonic()
        assert self.process.wait(seconds) == code, self.log.read_text()
        while left := self.family():
            assert time.monotonic() - started < seconds + 10, [_command_of(process) for process in left]
            time.sleep(0.1)
        text = self.log.read_text()
        assert re.search(message, text), text
        assert "Traceback" not in text
        for checkpoint in (self.folder / "run" / "checkpoints").glob("step-*"):
            assert find_fault(checkpoint) is None


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK) if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _command_of(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
        return command
    except psutil.Error:
        return []


@pytest.fixture
def start(tmp_path: Path, tiny_model_path: Path) -> Iterator[Any]:
    """Return a function that starts `rlqwen run` on a recipe; kill remaining processes at the end."""
    started: list[Run] = []

    def start_run(recipe: str, *words: str, steps: int = 1000, pause: float = 0.0, **environment: str) -> Run:
        reward = tmp_path / "reward.py"
        reward.write_text(REWARD.format(marker=str(tmp_path / "scoring"), pause=pause))
        (tmp_path / "recipe.yaml").write_text(recipe.format(model=tiny_model_path, reward=reward, steps=steps))
        mark, log = uuid.uuid4().hex, tmp_path / f"{len(started)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlqwen", "run", "recipe.yaml", *words],
                cwd=tmp_path,
                env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "RLQWEN_DISPLAY": "plain"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                # A shell that runs the tests in the background leaves SIGINT ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )
        started.append(Run(process, mark, tmp_path, log))
        return started[-1]

    yield start_run
    for run in started:
        for process in run.family():
            process.kill()
        run.process.wait(PATIENCE_S)


def is_saving(run: Run) -> bool:
    """Return whether the third save is in progress: its partial folder exists and is not empty."""
    return any(
        path.is_dir() and any(path.iterdir()) for path in (run.folder / "run/checkpoints").glob(".step-*.partial")
    )


def has_logged(run: Run, steps: int = 2) -> bool:
    return len(read_metrics(run.folder / "run")) >= steps


def is_scoring(run: Run) -> bool:
    return (run.folder / "scoring").exists()


def after(seconds: float) -> Callable[[Run], bool]:
    """Return a moment that comes after some time."""

    def has_passed(run: Run) -> bool:
        time.sleep(seconds)
        return True

    return has_passed


MOMENTS = {
    # Libraries convert an interrupt during an import to their own errors.
    "begins to import": after(0.8),
    "imports": after(2.0),
    "has imported": after(4.0),
    "trains": has_logged,
    "saves a checkpoint": is_saving,
}


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(
            moment,
            marks=pytest.mark.fault(
                f"Ctrl-C while the run {moment}", "exit code 130, all saved, no process and no broken checkpoint left"
            ),
        )
        for moment in MOMENTS
    ],
)
def test_ctrl_c(start: Callable[..., Run], moment: Any) -> None:
    run = start(SFT)
    run.wait_for(MOMENTS[moment])
    os.killpg(run.process.pid, signal.SIGINT)
    run.expect(130, INTERRUPTED)


@pytest.mark.slow_fault
@pytest.mark.parametrize(("number", "codes"), [(signal.SIGINT, {130}), (signal.SIGTERM, {75, 143, -15})])
@pytest.mark.parametrize("moment", ["begins to import", "has imported", "trains"])
@pytest.mark.fault(
    "Ctrl-C or SIGTERM twice within 50 ms",
    "exit code 130, or 75 or 143; no traceback, no process, no broken checkpoint left",
)
def test_a_signal_that_comes_twice(start: Callable[..., Run], moment: str, number: int, codes: set[int]) -> None:
    run = start(SFT)
    run.wait_for(MOMENTS[moment])
    os.killpg(run.process.pid, number)
    time.sleep(0.03)
    os.killpg(run.process.pid, number)
    code = run.process.wait(END_S)
    assert code in codes, run.log.read_text()
    run.expect(code, INTERRUPTED if number == signal.SIGINT else "")


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    "redirection",
    [
        pytest.param(
            shell, id=shell, marks=pytest.mark.fault(f"standard output of a run {what}", "training goes on to its end")
        )
        for shell, what in {
            "> /dev/full": "is on a full disk",
            ">&-": "is closed",
            ">&- 2>&-": "is closed, standard error too",
            "| head -1": "is a pipe that ends",
        }.items()
    ],
)
def test_a_run_outlives_its_output(tmp_path: Path, tiny_model_path: Path, redirection: str) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def score(completions, **kwargs):\n    print('x' * 9999)\n    return [1.0] * len(completions)\n")
    (tmp_path / "recipe.yaml").write_text(GRPO.format(model=tiny_model_path, reward=reward, steps=3))
    words = "rollout.engine=transformers train.per_device_train_batch_size=16 train.max_completion_length=8 train.save_steps=2"
    command = f"({sys.executable} -m rlqwen run recipe.yaml {words}; echo $? > code) {redirection}"
    environment = os.environ | {"RLQWEN_DISPLAY": "plain"}
    ended = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (tmp_path / "code").read_text() == "0\n", ended.stderr
    assert read_summary(tmp_path / "run")["steps"] == 3
    assert "Traceback" not in ended.stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert find_fault(checkpoint) is None


SHORT = ("train.per_device_train_batch_size=16", "train.max_completion_length=32")
ROLLOUT_MOMENTS = [
    # A terminal interrupts the whole process group; `kill` and most schedulers interrupt only the process.
    ("starts Ray", "group", lambda run: run.has_started("gcs_server"), 0.0, ()),
    ("starts the engine", "group", lambda run: run.has_started("ray::"), 0.0, ()),
    ("starts the engine", "process", lambda run: run.has_started("ray::"), 0.0, ()),
    ("samples", "group", is_scoring, 0.0, ()),  # groups are scored while others are still sampled
    ("scores", "group", is_scoring, 20.0, ()),
    ("scores", "process", is_scoring, 20.0, ()),
    ("is some steps in", "group", has_logged, 0.0, SHORT),
    ("is some steps in", "process", has_logged, 0.0, SHORT),
    ("draws ahead", "group", has_logged, 0.0, (*SHORT, "rollout.max_staleness=1")),
    ("draws ahead", "process", has_logged, 0.0, (*SHORT, "rollout.max_staleness=1")),
]


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    ("to", "reached", "pause", "words"),
    [
        pytest.param(
            *case,
            id=f"{moment}-{case[0]}",
            marks=pytest.mark.fault(
                f"Ctrl-C while a run with rollouts {moment}",
                "exit code 130, one line, no process of Ray, vLLM or the rewards left, no broken checkpoint",
            ),
        )
        for moment, *case in ROLLOUT_MOMENTS
    ],
)
def test_ctrl_c_with_rollouts(
    start: Callable[..., Run], to: Any, reached: Any, pause: float, words: tuple[str, ...]
) -> None:
    run = start(GRPO, *words, pause=pause)
    run.wait_for(reached)
    if to == "group":
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        run.process.send_signal(signal.SIGINT)
    run.expect(130, INTERRUPTED)


LOST_RAY = (*SHORT, "train.save_steps=500", "train.learning_rate=1e-3")


@pytest.fixture(scope="module")
def unbroken(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a run with rollouts that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    reward = folder / "reward.py"
    reward.write_text(REWARD.format(marker=str(folder / "scoring"), pause=0.0))
    (folder / "recipe.yaml").write_text(GRPO.format(model=tiny_model_path, reward=reward, steps=10))
    command = [sys.executable, "-m", "rlqwen", "run", "recipe.yaml", *LOST_RAY]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=PATIENCE_S)
    return folder / "run"


@pytest.mark.slow_fault
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
@pytest.mark.fault(
    "Ray's gcs_server or raylet killed or stopped, then --resume",
    "one message within a minute, all saved, no process and no file left; ends as a run without a break, to the bit",
)
def test_a_lost_server_of_ray(start: Callable[..., Run], unbroken: Path, server: str, number: int) -> None:
    run = start(GRPO, *LOST_RAY, steps=10, pause=4.0)
    run.wait_for(lambda run: has_logged(run, 3))
    (victim,) = (process for process in run.family() if process.name() == server)
    files = files_of(run.family())
    assert files
    victim.send_signal(number)
    saved = r"\nrlqwen: saved after update \d+\nrlqwen: resume with: rlqwen run recipe.yaml .*--resume\n$"
    run.expect(1, rf"rlqwen: Ray's {server} \(process {victim.pid}\) .*{saved}", seconds=60.0)
    assert "(raylet)" not in run.log.read_text()
    assert re.search(r"\[20\d\d-.*\]", run.log.read_text()) is None, "no line of Ray's"
    wait_until(lambda: not any(path.exists() for path in files), "its files are gone")
    run = start(GRPO, *LOST_RAY, "--resume", steps=10, pause=4.0)
    run.expect(0, "going on after update", seconds=PATIENCE_S)
    comparison = compare_runs(unbroken, run.folder / "run")
    assert comparison.is_exact, str(comparison)


def files_of(processes: list[psutil.Process]) -> set[Path]:
    """Return the temporary folders of the private Ray's processes, and the shared memory that they have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            if MARK_OF_RAY in (environment := process.environ()):
                assert environment["TMPDIR"] == environment[MARK_OF_RAY]
                found.add(Path(environment["TMPDIR"]))
                mapped = {Path(each.path) for each in process.memory_maps() if each.path.startswith("/dev/shm/")}
                found |= {path for path in mapped if path.exists()}
    return found


@pytest.mark.slow_fault
@pytest.mark.fault(
    "SIGTERM in training, then --resume", "exit code 75 with all saved; the run goes on from there to its end"
)
def test_sigterm_and_resume(start: Callable[..., Run]) -> None:
    run = start(SFT, "train.save_steps=500", "train.max_steps=400")
    run.wait_for(lambda run: has_logged(run, 5))
    run.process.send_signal(signal.SIGTERM)
    run.expect(75, "--resume")
    (checkpoint,) = (run.folder / "run" / "checkpoints").glob("step-*")
    reached = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= reached < 400
    run = start(SFT, "train.save_steps=500", f"train.max_steps={reached + 3}", "--resume", "--allow-changes")
    run.expect(0, "going on after update")
    steps = [line["step"] for line in read_metrics(run.folder / "run") if "loss" in line]
    assert steps == list(range(1, reached + 4))


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    "words", [(), ("--nproc-per-node", "2"), ("--max-restarts", "1")], ids=["", "ranks", "supervised"]
)
@pytest.mark.fault(
    "Ctrl-C in training, then the command that it printed", "exit code 130 with all saved; the run goes on to its end"
)
def test_ctrl_c_saves_and_the_printed_command_resumes(start: Callable[..., Run], words: tuple[str, ...]) -> None:
    run = start(SFT, *words, "train.save_steps=500", "train.max_steps=400")
    run.wait_for(lambda run: has_logged(run, 5))
    os.killpg(run.process.pid, signal.SIGINT)
    run.expect(130, r"Ctrl-C: saved after update \d+\nrlqwen: resume with: rlqwen run recipe.yaml .*--resume\n")
    (checkpoint,) = (run.folder / "run" / "checkpoints").glob("step-*")
    reached = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= reached < 400
    run = start(SFT, *words, "train.save_steps=500", f"train.max_steps={reached + 3}", "--resume", "--allow-changes")
    run.expect(0, "going on after update", seconds=90.0)


@pytest.mark.slow_fault
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 75)])
@pytest.mark.fault(
    "Ctrl-C, or a terminal that is closed, in a run with rollouts",
    "the update in progress is finished by the workers, which get the signal too, and saved",
)
def test_a_signal_to_all_processes_of_a_run_with_rollouts(start: Callable[..., Run], number: int, code: int) -> None:
    run = start(GRPO, *SHORT, "train.save_steps=500")
    run.wait_for(has_logged)
    os.killpg(run.process.pid, number)
    run.expect(code, "saved after update", seconds=90.0)


@pytest.mark.slow_fault
@pytest.mark.fault(
    "SIGKILL of a supervised run (--max-restarts)", "started again from its last checkpoint, done, exit code 0, noted"
)
def test_a_supervised_run_survives_a_kill(start: Callable[..., Run]) -> None:
    run = start(SFT, "--max-restarts", "2", "train.save_steps=5", steps=60)
    run.wait_for(lambda run: has_logged(run, 12))
    (child,) = (process for process in run.family() if process.ppid() == run.process.pid)
    child.kill()
    run.expect(0, "killed by SIGKILL; restart 1 of 2")
    assert (run.folder / "run" / "restarts.jsonl").read_text().count("\n") == 1
    assert read_summary(run.folder / "run")["steps"] == 60
    steps = [line["step"] for line in read_metrics(run.folder / "run") if "loss" in line]
    assert steps == list(range(1, 61))


@pytest.mark.slow_fault
@pytest.mark.fault(
    "SIGKILL of one of two ranks of a supervised run", "both end, both start again, done, exit code 0, noted"
)
def test_a_supervised_run_of_two_ranks_survives_the_kill_of_one(start: Callable[..., Run]) -> None:
    run = start(SFT, "--nproc-per-node", "2", "--max-restarts", "1", "train.save_steps=5", steps=40)
    run.wait_for(lambda run: has_logged(run, 12))
    (rank,) = (process for process in run.family() if process.environ().get("RANK") == "1")
    rank.kill()
    run.expect(0, "restart 1 of 1")
    assert read_summary(run.folder / "run")["steps"] == 40


@pytest.mark.slow_fault
@pytest.mark.fault("Ctrl-C of a supervised run", "passed on once: exit code 130, no restart, no process left")
def test_ctrl_c_of_a_supervised_run(start: Callable[..., Run]) -> None:
    run = start(SFT, "--max-restarts", "2")
    run.wait_for(has_logged)
    os.killpg(run.process.pid, signal.SIGINT)
    run.expect(130, INTERRUPTED)
    assert not (run.folder / "run" / "restarts.jsonl").exists()


@pytest.mark.slow_fault
@pytest.mark.fault(
    "an output folder that cannot be written to", "exit code 2 before a model is loaded, with the folder's name"
)
def test_an_output_folder_that_cannot_be_written_to(start: Callable[..., Run]) -> None:
    run = start(SFT, "output_dir=/proc/rlqwen")  # root may write everywhere else
    run.expect(2, "'/proc/rlqwen' cannot be written to")


FULL_STORE = """
import sys
import numpy as np
import ray
from rlqwen.errors import ResourceError
from rlqwen.rollout import ray_cluster as cluster

ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 1024**2, _temp_dir=sys.argv[1])
kept = []
try:
    for _ in range(4):
        kept.append(cluster.put(np.zeros(60 * 1024**2, dtype=np.uint8)))
except ResourceError as error:
    print(f"refused after {len(kept)}: {error}")
ray.shutdown()
"""


@pytest.mark.slow_fault
@pytest.mark.fault(
    "Ray's object store is full, and the disk that it spills to", "a ResourceError that says so, and what to do"
)
def test_a_full_object_store() -> None:
    """Start a real Ray with a store of 80 MB and a simulated full disk; weights are stored as the pool does it."""
    folder = Path("/tmp") / f"rlq-{uuid.uuid4().hex[:6]}"  # Ray's sockets need a short path
    output = subprocess.run(
        [sys.executable, "-c", FULL_STORE, str(folder)],
        env=os.environ | {"RAY_local_fs_capacity_threshold": "0.0001"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert re.search(r"refused after [01]: Ray's object store \(0\.08\d* GB\) has no room", output.stdout), (
        output.stderr
    )


RAYLET_DIES = """
import sys, threading
import numpy as np
import psutil
from rlqwen.config import RolloutConfig
from rlqwen.rollout import ray_cluster as cluster

cluster.connect(RolloutConfig(num_workers=1, num_cpus_per_worker=0.1), sent_bytes=20_000_000)
(raylet,) = (process for process in psutil.Process().children() if process.name() == "raylet")
raylet.suspend()
threading.Timer(2.0, raylet.kill).start()
cluster.put(np.zeros(20_000_000, dtype=np.uint8))
print("went on")
"""


@pytest.mark.fault(
    "Ray's raylet dies while weights are handed to it", "Ray ends the trainer; one message, nothing left"
)
def test_the_raylet_dies_in_the_middle_of_a_put() -> None:
    command = [sys.executable, "-c", RAYLET_DIES]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "went on" not in ended.stdout
    message = r"^rlqwen: Ray's raylet died while the trainer \(process \d+\) used its object store, .* with --resume$"
    assert re.search(message, ended.stderr, re.MULTILINE), ended.stderr
    assert "Traceback" not in ended.stderr


GIVEN_CLUSTER = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print(cluster.address, flush=True)
input()
"""
LOST_SERVER = """
import signal, sys, time
import psutil
from rlqwen.config import RolloutConfig
from rlqwen.errors import RolloutError
from rlqwen.rollout import ray_cluster as cluster

address, owner, server, number, saving_s = sys.argv[1], *map(int, sys.argv[2:3]), sys.argv[3], *map(int, sys.argv[4:])
joined = cluster.connect(
    RolloutConfig(num_workers=1, num_cpus_per_worker=0.1, ray_address=address or None), sent_bytes=20_000_000
)
import ray

@ray.remote(num_cpus=0)
class Worker:
    def answer(self):
        return 1

worker = Worker.remote()
cluster.call(ray.get, worker.answer.remote())
children = psutil.Process(owner or None).children()
(victim,) = (process for process in children if process.name() == server)
victim.send_signal(number)
try:
    while True:
        cluster.call(lambda: ray.get(worker.answer.remote()))
        cluster.wait([worker.answer.remote()], timeout_s=0.1)
        cluster.call(ray.available_resources)
except RolloutError as error:
    print(error)
time.sleep(saving_s)
joined.disconnect()
sys.exit(7)
"""


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    ("given", "server", "number"),
    [
        pytest.param(False, "gcs_server", signal.SIGKILL, id="own-gcs-killed"),
        pytest.param(False, "raylet", signal.SIGSTOP, id="own-raylet-stopped"),
        pytest.param(True, "gcs_server", signal.SIGKILL, id="given-gcs-killed"),
        pytest.param(True, "gcs_server", signal.SIGSTOP, id="given-gcs-stopped"),
        pytest.param(True, "raylet", signal.SIGKILL, id="given-raylet-killed"),
    ],
)
@pytest.mark.fault(
    "gcs_server or raylet lost under a plain Python script, of its own Ray or of a given cluster",
    "RolloutError within a minute; Ray gives time to save, and the script ends with its own exit code",
)
def test_a_script_that_loses_a_server_of_ray(given: bool, server: str, number: int) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", GIVEN_CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = present(holder.stdout).readline().strip() if given else ""
        saving_s = 30 if given and (server, number) == ("gcs_server", signal.SIGKILL) else 0
        words = [address, str(holder.pid if given else 0), server, str(int(number)), str(saving_s)]
        command = [sys.executable, "-c", LOST_SERVER, *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    finally:
        for process in psutil.Process(holder.pid).children(recursive=True):
            process.kill()
        holder.kill()
        holder.communicate()
    assert re.search(rf"{server}.* without it no rollout worker can be reached", ended.stdout), ended.stderr
    assert ended.returncode == 7, ended.stderr
