"""Inject faults into prefetching: discarded while sampling, or sampled from weights that were rolled back."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlqwen import GRPOConfig, GRPOTrainer
from rlqwen.config import ScoringConfig
from rlqwen.packing.batch import PackedBatch
from rlqwen.reporting import read_metrics
from rlqwen.rewards import Scorer
from rlqwen.rollout.engine import RolloutEngine
from rlqwen.rollout.prefetch import Prefetcher, RolloutBatch
from rlqwen.trainers.data_stream import RowStream
from rlqwen.types import Canary, GroupRequest, Prompt
from tests.narrowing import present
from tests.patience import PATIENCE_S
from tests.ranked import SUMS, prefers_even


class SlowToLeave(RolloutEngine):
    """Sample until cancelled, and react to the cancel with a short delay."""

    version = 0

    def __init__(self) -> None:
        self.begun, self.cancelled, self.is_sampling = threading.Event(), threading.Event(), False

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Any]:
        self.is_sampling = True
        self.begun.set()
        assert self.cancelled.wait(PATIENCE_S)
        time.sleep(0.2)
        self.is_sampling = False
        yield from ()

    def load_weights(self, version: int, weights: Any, canary: Canary | None) -> dict[str, float]:
        raise NotImplementedError

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        raise NotImplementedError


@pytest.mark.fault(
    "draws ahead are given up while one is sampled", "no thread samples beside the sync and the draw that come next"
)
def test_sampling_stops_when_prefetches_are_discarded() -> None:
    engine = SlowToLeave()
    ahead = Prefetcher(engine)
    with Scorer([], ScoringConfig()) as scorer:
        ahead.begin(RolloutBatch("first", (), scorer, 1))
        ahead.begin(RolloutBatch("second", (), scorer, 1))
        assert engine.begun.wait(PATIENCE_S)
        ahead.discard()
        assert not engine.is_sampling
        assert ahead.collect("second") is None
        ahead.close()


ROLLBACK = {"mismatch": {"action": "rollback", "threshold": 2.0}}


@pytest.mark.slow_fault
@pytest.mark.fault(
    "weights blown up in a run that draws ahead (rollout.max_staleness)",
    "rolled back; what was drawn from those weights is given up; no row trained twice or left out",
)
def test_a_rollback_discards_prefetched_groups(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=7, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=6, learning_rate=1e-4, save_strategy="steps", save_steps=2, watch=ROLLBACK,
        rollout={"engine": "vllm", "max_num_seqs": 16, "num_cpus_per_worker": 0.5, "max_staleness": 1},
        scoring={"in_process": ["prefers_even"]},
    )  # fmt: skip
    trainer = GRPOTrainer(str(tiny_model_path), prefers_even, config, SUMS)
    steps, trained = [], []
    update, next_groups = trainer.update, trainer.next_groups

    def poisoned(micro_batches: Sequence[PackedBatch], **options: Any) -> Any:
        result = update(micro_batches, **options)
        steps.append(trainer.state.global_step)
        if len(steps) == 5:
            with torch.no_grad():
                trainer.policy.base_model.model.norm.weight.mul_(1000.0)
        return result

    def noted(prompts_P: Sequence[Prompt]) -> Any:
        groups, metrics = next_groups(prompts_P)
        trained.append((groups, metrics["groups/staleness"], present(trainer.rollouts.sampler)._weights.version))
        return groups, metrics

    monkeypatch.setattr(trainer, "update", poisoned)
    monkeypatch.setattr(trainer, "next_groups", noted)
    trainer.train()
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    order = RowStream(trainer.train_rows, seed=config.seed, shuffle=config.shuffle_dataset).take(9 * 2)
    assert [group.prompt for groups, _, _ in trained for group in groups] == order
    assert [staleness for _, staleness, _ in trained] == [0, 1, 1, 1, 1, 1, 0, 1, 1]
    blown_up = trained[5][2]  # the version at the step with the alert
    assert all(group.policy_version > blown_up for groups, _, _ in trained[6:] for group in groups)
    (undone,) = [line for line in read_metrics(tmp_path) if line.get("watch/action") == "rolled back"]
    assert (undone["watch/from_step"], undone["watch/to_step"]) == (6, 4)
    gaps = [entry["sampling/logp_gap"] for entry in trainer.state.log_history if "sampling/logp_gap" in entry]
    assert len(gaps) == 7
    assert max(gaps) < 2.0
