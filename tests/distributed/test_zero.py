"""Compare ZeRO on two ranks, which shard optimizer state, gradients or weights, with one process.

Tests of float16 do not depend on the processor: they replace DeepSpeed's check for float16 support by yes, so that its
engines compute in float16, or by no (`+emulated`).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlqwen.distributed.loss_scale import LossScale
from rlqwen.distributed.zero_engine import Engine
from rlqwen.distributed.zero_step import ZeroStep
from rlqwen.packing.batch import PackedBatch
from tests.narrowing import present
from tests.ranked import COMMON, OVERFLOW_UPDATES, STAGES, _sft, run_case, run_on_two_ranks

WAYS = ["zero1", "zero2", "zero3", "offload3"]
EXACT = [*(f"sft@{way}" for way in WAYS), "sft_lora@zero3", "ppo_head@zero3", "grpo_idle@zero2", "grpo_idle@zero3"]
EXACT += ["grpo_arrival@zero1", "grpo_arrival@zero3"]
ROUNDED = ["sft@auto", "sft@bf16_3", "sft@given", "sft@given+emulated"]
OVERFLOW = [f"sft_plain@overflow_{way}" for way in (*STAGES, "stage1+emulated")]
OVERFLOWS = [f"sft_plain@overflows_{way}" for way in ("stage1", "stage2_offload", "stage3", "stage1+emulated")]
SAVED = [f"sft@saved{stage}" for stage in (1, 2, 3)]
ON = ["sft_on@bf16_2", "sft_on@bf16_3"]
CHECKPOINT = "sft@saved1/checkpoints/step-000002"
LONG = [f"{case}@zero{stage}" for case in ("dpo", "reward", "ppo", "grpo") for stage in (1, 2, 3)]
SHOWN = ("loss", "grad_norm", "eval/loss", "eval/reward/mean", "critic/grad_norm", "kl")


@pytest.fixture(scope="module")
def runs(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_on_two_ranks([*EXACT, *ROUNDED, *OVERFLOW, *OVERFLOWS, *SAVED, *ON], tiny_model_path, folder)


def check(name: str, by_rank: list[dict[Any, Any]], model: Path, alone: Path, rel: float) -> None:
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
def test_sharding_changes_only_rounding(
    name: str, runs: tuple[Path, list[dict[Any, Any]]], tiny_model_path: Path, tmp_path: Path
) -> None:
    check(name, runs[1], tiny_model_path, tmp_path, rel=2e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_low_precision_stays_close_to_float32(
    name: str, runs: tuple[Path, list[dict[Any, Any]]], tiny_model_path: Path, tmp_path: Path
) -> None:
    check(name, runs[1], tiny_model_path, tmp_path, rel=2e-2)


def updates(result: dict[str, Any], key: str) -> list[Any]:
    return [line[key] for line in result["history"] if "loss" in line]


@pytest.fixture(scope="module")
def skipping(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that runs one rank in float32 and skips the given updates; each run is made once."""
    results = {}

    def run(skipped: Any) -> dict[str, Any]:
        if skipped not in results:
            trainer = _sft(
                str(tiny_model_path), tmp_path_factory.mktemp("skipping") / "run", max_steps=OVERFLOW_UPDATES,
                max_nonfinite_steps=OVERFLOW_UPDATES, eval_strategy="no", eval_on_start=False,
            )  # fmt: skip
            skip, update = iter(skipped), trainer.update

            def skipping_update(micro_batches: Sequence[PackedBatch], **options: Any) -> Any:
                if next(skip):
                    present(trainer.policy.trained_parameters[0].grad).view(-1)[0] = math.nan
                return update(micro_batches, **options)

            pytest.MonkeyPatch().setattr(trainer, "update", skipping_update)
            trainer.train()
            results[skipped] = {"history": trainer.state.log_history}
        return results[skipped]

    return run


@pytest.mark.parametrize("name", OVERFLOW)
def test_an_overflow_changes_only_the_loss_scale(
    name: str, runs: tuple[Path, list[dict[Any, Any]]], skipping: Any
) -> None:
    """Compare bits of weights and moments on each rank, and the metrics with a float32 run that skips the same updates.

    Which updates overflow depends on the processor's rounding: the first one always does, and some do not.
    """
    for result in (by_rank[name] for by_rank in runs[1]):
        skipped, memories = tuple(updates(result, "updates/skipped")), result["memories"]
        assert skipped[0]
        assert skipped.count(0.0) >= 2
        for overflowed, (scale, *digests), (next_scale, *next_digests) in zip(
            skipped, memories, memories[1:], strict=False
        ):
            assert next_scale == (scale / 2 if overflowed else scale)
            assert (next_digests == digests) == bool(overflowed)
        wanted = skipping(skipped)
        for key in ("loss", "grad_norm"):
            pairs = zip(skipped, updates(result, key), updates(wanted, key), strict=True)
            for ours, theirs in [pair for overflowed, *pair in pairs if not overflowed]:
                assert ours == pytest.approx(theirs, rel=2e-2), key


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_run_in_which_every_update_overflows_keeps_the_weights(
    name: str, runs: tuple[Path, list[dict[Any, Any]]], tiny_model_path: Path
) -> None:
    """Cover engines that compute with weights rounded to float16."""
    folder, by_rank = runs
    assert updates(by_rank[0][name], "updates/skipped") == [1.0] * 2
    ours = load_file(folder / name / "final" / "model.safetensors")
    before = load_file(tiny_model_path / "model.safetensors")
    assert all(ours[key].equal(before[key]) for key in before)


@pytest.mark.parametrize("name", SAVED)
def test_one_process_resumes_a_sharded_checkpoint_of_two_ranks(
    name: str,
    runs: tuple[Path, list[dict[Any, Any]]],
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, by_rank = runs
    monkeypatch.setitem(COMMON, "resume_allow_changes", True)
    trainer = _sft(str(tiny_model_path), tmp_path / "on", eval_generation={"metrics": ["exact_match"], "max_tokens": 4})
    trainer.train(folder / name / "checkpoints" / "step-000002")
    (last,) = [line for line in trainer.state.log_history if "loss" in line and line["step"] == 3]
    (wanted,) = [line for line in by_rank[0][name]["history"] if "loss" in line and line["step"] == 3]
    assert last["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    ours, theirs = (load_file(root / "final" / "model.safetensors") for root in (tmp_path / "on", folder / name))
    assert all(ours[key].allclose(theirs[key], atol=1e-6) for key in theirs)


@pytest.mark.parametrize("name", ON)
def test_an_engine_in_bf16_keeps_the_exact_weights_of_a_checkpoint(
    name: str, runs: tuple[Path, list[dict[Any, Any]]]
) -> None:
    """Resume a float32 checkpoint after the last update: final/ has the same bits, and a missing curve is no error."""
    assert not any("error" in results[name] for results in runs[1])
    ours, saved = (load_file(runs[0] / part / "model.safetensors") for part in (f"{name}/final", CHECKPOINT))
    assert all(ours[key].equal(saved[key]) for key in saved)
    assert not all(saved[key].equal(saved[key].bfloat16().float()) for key in saved)


@pytest.mark.slow_fault
@pytest.mark.fault(
    "unequal work for two ranks at ZeRO 1, 2 and 3, every trainer", "no hang; the same curve as on one rank"
)
def test_every_trainer_at_every_zero_stage(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    by_rank = run_on_two_ranks(LONG, tiny_model_path, tmp_path / "two")
    for name in LONG:
        check(name, by_rank, tiny_model_path, tmp_path / name, rel=5e-4)


@pytest.mark.slow_fault
@pytest.mark.fault("weights in ZeRO-3 shards on their way to vLLM", "whole and exact: the canary agrees at every sync")
def test_shards_reach_vllm_exactly(tiny_model_path: Path, tmp_path: Path) -> None:
    main, other = run_on_two_ranks(["vllm@zero3"], tiny_model_path, tmp_path)
    history = main["vllm@zero3"]["history"]
    gaps = [entry["sync/canary_gap"] for entry in history if "sync/canary_gap" in entry]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert main["vllm@zero3"]["digest"] == other["vllm@zero3"]["digest"]


class WatchedEngine(Engine):
    """Stand in for an engine on three ranks, and record its arguments."""

    averages_over = 3

    def __init__(self) -> None:
        """Start no engine of DeepSpeed."""

    def after_backward(self) -> None:
        pass

    def scale_loss(self, scale: float) -> None:
        self.divided_by = scale

    def before_backward(self, loss: Tensor) -> None:
        self.loss = loss.item()


def test_the_loss_scale_does_not_depend_on_the_number_of_ranks() -> None:
    """Correct DeepSpeed's mean over ranks in float32, because a larger loss scale would overflow float16 earlier."""
    optimizer_step = object.__new__(ZeroStep)
    engine = WatchedEngine()
    optimizer_step.engines, optimizer_step.scale = [engine], LossScale(True, {"initial_scale_power": 4})
    optimizer_step._backward(torch.tensor(2.0, requires_grad=True))
    assert engine.loss == 2.0 * 16
    assert engine.divided_by == 16 / 3
