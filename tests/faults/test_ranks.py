"""Inject dying ranks: the other ranks never wait for them."""

from pathlib import Path

import pytest

from rlqwen.checkpoint.atomic_folder import find_fault
from rlqwen.reporting import read_metrics
from tests.ranked import launch, run_on_two_ranks


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    ("case", "dead"),
    [
        pytest.param(
            "kills_the_main_rank",
            0,
            marks=pytest.mark.fault(
                "SIGKILL of the main rank while it scores and the other waits", "the other ends soon"
            ),
        ),
        pytest.param(
            "kill_the_other_rank",
            1,
            marks=pytest.mark.fault("SIGKILL of the other rank while the main one samples", "the main one ends soon"),
        ),
    ],
)
def test_a_rank_that_is_killed_ends_the_others(case: str, dead: int, tiny_model_path: Path, tmp_path: Path) -> None:
    done = launch([case], tiny_model_path, tmp_path)
    assert done.returncode != 0
    assert f"rank      : {dead} (local_rank: {dead})" in done.stderr.partition("Root Cause")[2]
    assert not (tmp_path / case / "final").exists()


@pytest.mark.slow_fault
@pytest.mark.fault(
    "SIGKILL of the main rank's rollout workers, which may not be started again", "one error, and the other rank leaves"
)
def test_dead_rollout_workers_end_all_ranks(tiny_model_path: Path, tmp_path: Path) -> None:
    """Check also that, before the fault, the main rank synced its weights to vLLM and trained like the other rank."""
    main, other = run_on_two_ranks(["vllm", "kill_the_workers"], tiny_model_path, tmp_path)
    gaps = [entry["sync/canary_gap"] for entry in main["vllm"]["history"] if "sync/canary_gap" in entry]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert main["vllm"]["digest"] == other["vllm"]["digest"]
    assert main["kill_the_workers"]["error"] == "WorkerDied"
    assert other["kill_the_workers"]["error"] == "MainRankFailed"
    assert "WorkerDied" in other["kill_the_workers"]["message"]


@pytest.mark.slow_fault
@pytest.mark.fault(
    "a symptom that stops a run, one that rolls it back, on two ranks",
    "both stop after one whole checkpoint; both go back, and end with equal weights",
)
def test_the_monitor_acts_on_both_ranks(tiny_model_path: Path, tmp_path: Path) -> None:
    ranks = run_on_two_ranks(["stopped", "blown_up"], tiny_model_path, tmp_path)
    for rank in ranks:
        assert rank["stopped"]["error"] == "WatchStop"
        assert "idle at step 2" in rank["stopped"]["message"]
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert checkpoint.name == "step-000002"
    assert find_fault(checkpoint) is None
    main, other = (rank["blown_up"] for rank in ranks)
    assert main["digest"] == other["digest"]
    assert (
        main["position"] == other["position"] == 9 * 6
    )  # two of nine steps were rolled back, and their rows are not used again
    (undone,) = [line for line in read_metrics(tmp_path / "blown_up") if line.get("watch/action") == "rolled back"]
    assert (undone["watch/from_step"], undone["watch/to_step"]) == (6, 4)
