"""Two ranks do what one does: every trainer, on the same batches, against a run of one process."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.patience import PATIENCE_S
from tests.ranked import CASES, run_case, run_on_two_ranks

OTHERS = ("fail", "kill", "vllm", "stopped", "blown_up", "sft_on", "sft_plain")
NAMES = [name for name in CASES if not name.startswith(OTHERS)]
UNLIKE = ("time/", "/time", "seconds", "tokens/trained")
"""Figures that may differ: seconds, and tokens, because a prompt whose completions are on two ranks is on both."""


@pytest.fixture(scope="module")
def runs(tiny_model_path, tmp_path_factory):
    """Folder of the two ranks' runs, and what each rank found, by rank and case."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_on_two_ranks([*NAMES, "fails"], tiny_model_path, folder)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one(name, runs, tiny_model_path, tmp_path, monkeypatch):
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
                continue  # rounding ranks answers that are as likely as under the reference
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


def test_a_checkpoint_of_two_ranks_goes_on_in_one(runs, tiny_model_path, tmp_path):
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


@pytest.mark.fault("a reward fails on the main rank of two", "the other leaves at once, in one line; exit codes agree")
def test_an_error_of_the_main_rank_ends_the_others_with_a_short_word(runs):
    main, other = (results["fails"] for results in runs[1])
    assert main["error"] == "RewardFailure"
    assert "this reward fails" in main["message"]
    assert other["error"] == "MainRankFailed"
    assert other["message"].startswith("rank 1 stops, because the main rank failed: RewardFailure: ")
    assert len(other["message"].splitlines()) == 1
    assert other["seconds"] < PATIENCE_S  # its own would be parallel.timeout
