"""Test the tolerance that the first weight sync measures, and that a resumed run keeps it."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlqwen import GRPOConfig, GRPOTrainer
from rlqwen.rollout import sampler as rollouts
from rlqwen.rollout.engines.transformers import TransformersEngine
from rlqwen.rollout.sync_check import SyncCheck
from rlqwen.types import Canary

ROWS = [{"prompt": f"{number} + 1 = ?"} for number in range(8)]


def check(*, dtype: str = "bfloat16", tolerance: float | None = None) -> SyncCheck:
    policy: Any = SimpleNamespace(
        device="cpu", inference=nullcontext, logprobs=lambda batch: (-torch.ones(batch.num_targets), None)
    )
    return SyncCheck(policy, dtype=dtype, tolerance=tolerance, max_length=10)


@pytest.mark.parametrize(
    ("dtype", "gap", "expected"),
    [("bfloat16", 0.03, 0.06), ("bfloat16", 0.001, 0.02), ("float32", 0.0, 1e-4), ("float32", 4e-4, 8e-4)],
)
def test_later_syncs_may_have_twice_the_gap_of_the_first(dtype: str, gap: float, expected: float) -> None:
    made = check(dtype=dtype)
    assert made.canary([1, 2, 3]).tolerance == {"float32": 1e-3, "bfloat16": 0.1}[dtype]
    made.calibrate({"sync/canary_gap": gap})
    made.calibrate({"sync/canary_gap": 7.0})
    assert made.canary([1, 2, 3]).tolerance == pytest.approx(expected)


def test_a_given_tolerance_is_kept() -> None:
    made = check(tolerance=0.5)
    made.calibrate({"sync/canary_gap": 1e-3})
    assert made.canary([1, 2]).tolerance == 0.5


def test_every_canary_has_the_tokens_of_the_first() -> None:
    made = check()
    assert made.canary([1, 2, 3]).token_ids == (1, 2, 3, 1, 2, 3)
    assert made.canary([4] * 30).token_ids == (1, 2, 3, 1, 2, 3)
    assert check().canary(range(30)).token_ids == tuple(range(10))


class MeasuredEngine(TransformersEngine):
    """Sample from the policy, and report a gap per sync."""

    def __init__(self, policy: Any, tokenizer: PreTrainedTokenizerBase, length: int, gaps: list[float]) -> None:
        super().__init__(policy, tokenizer, max_model_length=length, max_num_seqs=64)
        self._gaps = gaps
        self.canaries: list[Canary] = []

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        assert canary is not None
        self.canaries.append(canary)
        return super().load_weights(version, weights, canary) | {"sync/canary_gap": self._gaps.pop(0)}


def canaries_of_run(
    monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, gaps: Sequence[float], **options: Any
) -> list[Canary]:
    engines: list[MeasuredEngine] = []

    def build(config: Any, *, policy: Any, tokenizer: Any, max_model_length: int, **rest: Any) -> MeasuredEngine:
        engines.append(MeasuredEngine(policy, tokenizer, max_model_length, list(gaps)))
        return engines[-1]

    monkeypatch.setattr(rollouts, "build_engine", build)
    args = GRPOConfig(
        output_dir=str(folder),
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=4,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        rollout={"engine": "transformers"},
        scoring={"in_process": ["longest"]},
        **options,
    )
    trainer = GRPOTrainer(str(model), longest, args, ROWS)
    trainer.train()
    trainer.close()
    return engines[0].canaries


def longest(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids)) for ids in completion_ids]


def test_a_resumed_run_keeps_text_and_tolerance(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    first = canaries_of_run(monkeypatch, tiny_model_path, run, [3e-4, 5e-4])
    saved = str(run / "checkpoints" / "step-000001")
    resumed = canaries_of_run(monkeypatch, tiny_model_path, run, [5e-4], resume_from_checkpoint=saved)
    assert [canary.tolerance for canary in first] == [1e-3, 6e-4]
    assert [canary.tolerance for canary in resumed] == [6e-4]
    assert len({canary.token_ids for canary in first + resumed}) == 1
