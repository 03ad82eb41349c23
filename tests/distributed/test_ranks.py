"""Compare runs of two ranks with runs of one process on the same batches, for every trainer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlqwen.runs.launch import launch
from tests.patience import PATIENCE_S
from tests.ranked import CASES, run_case, run_on_two_ranks

OTHERS = ("fail", "kill", "vllm", "stopped", "blown_up", "sft_on", "sft_plain")
NAMES = [name for name in CASES if not name.startswith(OTHERS)]
UNLIKE = ("time/", "/time", "seconds", "tokens/trained")
"""Metrics that may differ: times, and tokens, because two ranks may both hold a prompt and share its completions."""


LEAVES_EARLY = """
import time
import torch
import torch.distributed as dist
from rlqwen.distributed import Ranks
ranks = Ranks()
if ranks.rank == 0:
    time.sleep(0.5)
call = dist.all_reduce(torch.zeros(3), async_op=True)
if ranks.rank == 1:
    call.get_future().then(lambda _: time.sleep(2))
    time.sleep(1)
else:
    call.wait()
"""
"""Rank 1 ends while a thread of its process group is still in Python."""


@pytest.mark.slow
def test_a_rank_ends_cleanly_while_its_last_call_is_still_being_dropped() -> None:
    assert launch([sys.executable, "-c", LEAVES_EARLY], 2) == 0


@pytest.fixture(scope="module")
def runs(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    """Return the folder of the runs of two ranks, and the results by rank and case."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_on_two_ranks([*NAMES, "fails"], tiny_model_path, folder)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_like_one(
    name: str,
    runs: tuple[Path, list[dict[Any, Any]]],
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RLQWEN_CACHE", str(tmp_path / "cache"))
    folder, by_rank = runs
    alone = run_case(name, str(tiny_model_path), tmp_path)
    main, other = (results[name] for results in by_rank)
    assert main["digest"] == other["digest"]
    assert json.dumps(main["history"]) == json.dumps(other["history"])
    assert main["position"] == alone["position"]
    assert len(main["history"]) == len(alone["history"])
    for ours, theirs in zip(main["history"], alone["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if key.endswith("accuracies") and abs(theirs[key.replace("accuracies", "margins")]) < 1e-5:
                continue  # both answers are as likely as under the reference, so rounding decides
            if not any(part in key for part in UNLIKE):
                assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-5, nan_ok=True), key
    load = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    ours, theirs = (load.from_pretrained(root / name / "final").state_dict() for root in (folder, tmp_path))
    moved = max(
        (theirs[key] - value).abs().max().item()
        for key, value in AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict().items()
        if key in theirs
    )
    gap = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
    assert moved > 1e-4
    assert gap < 1e-3 * moved + 1e-6
    ours, theirs = ((root / name / "metrics.jsonl").read_text().splitlines() for root in (folder, tmp_path))
    assert len(ours) == len(theirs) >= len(alone["history"])


def test_one_process_resumes_a_checkpoint_of_two_ranks(
    runs: tuple[Path, list[dict[Any, Any]]], tiny_model_path: Path, tmp_path: Path
) -> None:
    folder, by_rank = runs
    checkpoints = sorted((folder / "grpo_best" / "checkpoints").glob("step-*"))
    history = by_rank[0]["grpo_best"]["history"]
    step = int(checkpoints[0].name.removeprefix("step-"))
    trainer = CASES["grpo_best"](str(tiny_model_path), tmp_path)
    trainer.args.resume_allow_changes = True
    trainer.train(resume_from_checkpoint=checkpoints[0])
    expected = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    found = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert max(found) == max(expected) > step
    assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)


@pytest.mark.fault(
    "a reward fails on the main rank of two", "the other stops at once, with a message of one line; exit codes agree"
)
def test_an_error_of_the_main_rank_ends_the_other_with_a_short_message(runs: tuple[Path, list[dict[Any, Any]]]) -> None:
    main, other = (results["fails"] for results in runs[1])
    assert main["error"] == "RewardFailure"
    assert "this reward fails" in main["message"]
    assert other["error"] == "MainRankFailed"
    assert other["message"].startswith("rank 1 stops, because the main rank failed: RewardFailure: ")
    assert len(other["message"].splitlines()) == 1
    assert other["seconds"] < PATIENCE_S  # without the message it would wait for parallel.timeout
