"""Ranks that die: the others never wait for them."""

import time

import pytest
from ranked import launch, run_on_two_ranks


@pytest.mark.slow_fault
@pytest.mark.parametrize(
    ("case", "dead"),
    [
        pytest.param(
            "kills_the_main_rank",
            0,
            marks=pytest.mark.fault(
                "SIGKILL of the main rank while it scores and the other waits", "the other ends within a minute"
            ),
        ),
        pytest.param(
            "kill_the_other_rank",
            1,
            marks=pytest.mark.fault(
                "SIGKILL of the other rank while the main one samples", "the main one ends within a minute"
            ),
        ),
    ],
)
def test_a_rank_that_is_killed_ends_the_others(case, dead, tiny_model_path, tmp_path):
    started = time.monotonic()
    done = launch([case], tiny_model_path, tmp_path)
    assert done.returncode != 0
    assert time.monotonic() - started < 60  # most of it imports
    assert f"rank      : {dead} (local_rank: {dead})" in done.stderr.partition("Root Cause")[2]
    assert not (tmp_path / case / "final").exists()


@pytest.mark.slow_fault
@pytest.mark.fault(
    "SIGKILL of the main rank's rollout workers, which may not be started again", "one error, and the other rank leaves"
)
def test_workers_that_die_end_all_ranks(tiny_model_path, tmp_path):
    """Until then the main rank has synced its weights to vLLM, and trained as the other did."""
    main, other = run_on_two_ranks(["vllm", "kill_the_workers"], tiny_model_path, tmp_path)
    gaps = [entry["sync/canary_gap"] for entry in main["vllm"]["history"] if "sync/canary_gap" in entry]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert main["vllm"]["digest"] == other["vllm"]["digest"]
    assert main["kill_the_workers"]["error"] == "WorkerDied"
    assert other["kill_the_workers"]["error"] == "MainRankFailed"
    assert "WorkerDied" in other["kill_the_workers"]["message"]
