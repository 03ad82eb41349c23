"""Fill shared memory or a disk under whole runs, each in a mount namespace of its own, which needs no rights."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlqwen.checkpoint.atomic_folder import find_fault
from rlqwen.reporting import read_metrics, read_summary
from rlqwen.runs.verification import compare_runs
from tests.patience import PATIENCE_S

RECIPE = """\
algorithm: grpo
model: {{path: {model}}}
data: {{train: {{generator: arithmetic, args: {{size: 64}}}}}}
rewards: ["{work}/reward.py:score"]
rollout: {{engine: vllm, num_cpus_per_worker: 0.5, max_num_seqs: 8}}
train: {{max_steps: 12, per_device_train_batch_size: 16, num_generations: 8, max_completion_length: 8, save_steps: 2,
  learning_rate: 1.0e-3, save_total_limit: 3}}
output_dir: run
"""
REWARD = """\
import os, time

def score(completions, **kwargs):
    open("{work}/scoring", "w").close()
    while not os.path.exists("{work}/go-on"):
        time.sleep(0.01)
    return [float(len(str(completion)) % 7) for completion in completions]
"""
SCRIPT = """\
mount -t tmpfs -o size={size} tmpfs {place} || exit 99
python={python}; cd {cwd}
$python -m rlqwen run {work}/recipe.yaml {words} & run=$!
until {moment}; do kill -0 $run || break; sleep 0.05; done
cat /dev/zero > {place}/filler 2>> {work}/filler.log
touch {work}/go-on
wait $run; code=$?
rm -f {place}/filler
if [ $code = 1 ] && [ -d run/checkpoints ]; then $python -m rlqwen run {work}/recipe.yaml {words} --resume || exit 98; fi
[ -d run ] && [ {cwd} != {work} ] && cp -r run {work}/
exit $code
"""
IN_THE_FIRST_STEP = "test -e {work}/scoring"


@pytest.fixture
def work(tmp_path: Path, tiny_model_path: Path) -> Path:
    """Return a folder with a recipe and its reward, which waits in the first step until `go-on` exists."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_path, work=tmp_path))
    (tmp_path / "reward.py").write_text(REWARD.format(work=tmp_path))
    return tmp_path


@pytest.fixture
def disk() -> Iterator[Path]:
    """Return a folder with a path that is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def run_filled(
    work: Path, place: str, *words: str, size: str, moment: str, cwd: str | None = None, **environment: str
) -> tuple[int, str]:
    """Run the recipe with a small file system at `place`, filled at a moment; return exit code and standard error.

    A run that fails is resumed once there is room again.
    """
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare (util-linux) here, without which this test cannot mount a small file system")
    script = SCRIPT.format(
        work=work, place=place, words=shlex.join(words), python=shlex.quote(sys.executable),
        size=size, moment=moment.format(work=work), cwd=cwd or work,
    )  # fmt: skip
    ended = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env=os.environ | {"RLQWEN_DISPLAY": "plain", "OMP_NUM_THREADS": "1"} | environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if ended.returncode == 99 or "unshare failed" in ended.stderr:
        pytest.skip(f"this user may not mount in a namespace of its own: {ended.stderr.strip()}")
    assert "No space left" in (work / "filler.log").read_text()
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


def check_complete(folder: Path) -> None:
    assert read_summary(folder)["steps"] == 12
    assert [line["step"] for line in read_metrics(folder) if "loss" in line] == list(range(1, 13))
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        assert find_fault(checkpoint) is None


@pytest.mark.slow_fault
@pytest.mark.fault("/dev/shm fills up while a run with rollouts trains", "the run ends as any other")
def test_shared_memory_that_fills_up(work: Path) -> None:
    code, error = run_filled(work, "/dev/shm", size="300m", moment=IN_THE_FIRST_STEP)
    assert code == 0, error
    check_complete(work / "run")


@pytest.mark.slow_fault
@pytest.mark.fault("/dev/shm is full when the engine starts", "one message that names it and what is free; exit code 1")
def test_shared_memory_that_is_full_when_the_engine_starts(work: Path) -> None:
    code, error = run_filled(work, "/dev/shm", size="16k", moment="true")
    assert code == 1, error
    start = r"rlqwen: rollout worker 0 .*could not start its engine: no space is left on "
    assert re.search(start + ".*: 0 GB in /dev/shm", error), error


@pytest.mark.slow_fault
@pytest.mark.fault("the temporary folder's disk fills up while a run with rollouts trains", "the run ends as any other")
def test_a_full_temporary_folder(work: Path, disk: Path) -> None:
    code, error = run_filled(work, str(disk), size="300m", moment=IN_THE_FIRST_STEP, TMPDIR=str(disk))
    assert code == 0, error
    check_complete(work / "run")


@pytest.mark.slow_fault
@pytest.mark.fault(
    "the run folder's disk is full (a small file system), then --resume",
    "one message, exit code 1, the last checkpoint kept; ends as a run without a break, to the bit",
)
def test_a_full_disk_under_a_run(work: Path, disk: Path) -> None:
    (work / "go-on").touch()
    words = ("rollout.engine=transformers",)
    command = [sys.executable, "-m", "rlqwen", "run", "recipe.yaml", *words, "output_dir=unbroken"]
    subprocess.run(command, cwd=work, check=True, capture_output=True, timeout=PATIENCE_S)
    code, error = run_filled(
        work, str(disk), *words, size="20m", moment="test -d run/checkpoints/step-000004", cwd=str(disk)
    )
    assert code == 1, error
    assert re.search(r"rlqwen: .* cannot be (saved|written).*No space left on device", error), error
    check_complete(work / "run")
    comparison = compare_runs(work / "unbroken", work / "run")
    assert comparison.is_exact, str(comparison)
