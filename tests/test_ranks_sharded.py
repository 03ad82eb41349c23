"""Two ranks that share out optimizer state, gradients or weights do what one does."""

import json

import pytest
from ranked import COMMON, _sft, run_case, run_on_two_ranks
from safetensors.torch import load_file

WAYS = ["zero1", "zero2", "zero3", "offload3"]
EXACT = [*(f"sft@{way}" for way in WAYS), "sft_lora@zero3", "ppo_head@zero3", "grpo_idle@zero2"]
ROUNDED = ["sft@auto", "sft@bf16_3", "sft@given"]
LONG = [f"{case}@zero{stage}" for case in ("dpo", "reward", "ppo", "grpo") for stage in (1, 2, 3)]
SHOWN = ("loss", "grad_norm", "eval/loss", "eval/reward/mean", "critic/grad_norm", "kl")


@pytest.fixture(scope="module")
def runs(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_on_two_ranks([*EXACT, *ROUNDED, "sft@overflow", "sft@saved"], tiny_model_path, folder)


def check(name, by_rank, model, alone, rel):
    main, other = (results[name] for results in by_rank)
    theirs = run_case(name.partition("@")[0], str(model), alone)
    assert main["digest"] == other["digest"]
    assert json.dumps(main["history"]) == json.dumps(other["history"])
    assert len(main["history"]) == len(theirs["history"])
    compared = 0
    for ours, wanted in zip(main["history"], theirs["history"], strict=True):
        for key in SHOWN:
            if key in wanted:
                assert ours[key] == pytest.approx(wanted[key], rel=rel, abs=rel / 10), (ours["step"], key)
                compared += 1
    assert compared > 5


@pytest.mark.parametrize("name", EXACT)
def test_shares_change_only_rounding(name, runs, tiny_model_path, tmp_path):
    check(name, runs[1], tiny_model_path, tmp_path, rel=2e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision_follows_float32(name, runs, tiny_model_path, tmp_path):
    check(name, runs[1], tiny_model_path, tmp_path, rel=2e-2)


def test_an_overflow_is_skipped_and_changes_no_weight(runs, tiny_model_path):
    folder, by_rank = runs
    steps = [line for line in by_rank[0]["sft@overflow"]["history"] if "loss" in line]
    assert [line["updates/skipped"] for line in steps] == [1.0] * 3
    ours = load_file(folder / "sft@overflow" / "final" / "model.safetensors")
    before = load_file(tiny_model_path / "model.safetensors")
    assert all(ours[key].equal(before[key]) for key in before)


def test_one_process_goes_on_from_the_checkpoint_of_two(runs, tiny_model_path, tmp_path, monkeypatch):
    folder, by_rank = runs
    monkeypatch.setitem(COMMON, "resume_allow_changes", True)
    trainer = _sft(str(tiny_model_path), tmp_path / "on", eval_generation={"metrics": ["exact_match"], "max_tokens": 4})
    trainer.train(folder / "sft@saved" / "checkpoints" / "step-000002")
    (last,) = [line for line in trainer.state.log_history if "loss" in line and line["step"] == 3]
    (wanted,) = [line for line in by_rank[0]["sft@saved"]["history"] if "loss" in line and line["step"] == 3]
    assert last["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    ours, theirs = (load_file(root / "final" / "model.safetensors") for root in (tmp_path / "on", folder / "sft@saved"))
    assert all(ours[key].allclose(theirs[key], atol=1e-6) for key in theirs)


@pytest.mark.slow_fault
@pytest.mark.fault("unequal work for two ranks at ZeRO 1, 2 and 3, every trainer", "no hang; the curve of one rank")
def test_every_trainer_at_every_stage(tiny_model_path, tmp_path):
    (tmp_path / "two").mkdir()
    by_rank = run_on_two_ranks(LONG, tiny_model_path, tmp_path / "two")
    for name in LONG:
        check(name, by_rank, tiny_model_path, tmp_path / name, rel=5e-4)


@pytest.mark.slow_fault
@pytest.mark.fault("weights in ZeRO-3 shards on their way to vLLM", "whole and exact: the canary agrees at every sync")
def test_shards_reach_vllm_exactly(tiny_model_path, tmp_path):
    main, other = run_on_two_ranks(["vllm@zero3"], tiny_model_path, tmp_path)
    history = main["vllm@zero3"]["history"]
    gaps = [entry["sync/canary_gap"] for entry in history if "sync/canary_gap" in entry]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert main["vllm@zero3"]["digest"] == other["vllm@zero3"]["digest"]
