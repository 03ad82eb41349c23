"""Test off-policy training with a bounded lag: weights of each step, dropped groups, resume and discarded prefetches."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from rlqwen import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from rlqwen.errors import ConfigError, RolloutError, WorkerDied
from rlqwen.rollout import sampler as rollouts
from rlqwen.rollout.engine import RolloutEngine
from rlqwen.rollout.engines.transformers import TransformersEngine
from rlqwen.rollout.prefetch import Prefetcher, RolloutBatch
from rlqwen.runs.verification import compare_runs
from rlqwen.types import Canary, Group, GroupRequest
from tests.forked import run_forked
from tests.narrowing import instance_of, present
from tests.patience import PATIENCE_S

ROWS = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}]} for i in range(9)]


class SnapshotEngine(TransformersEngine):
    """Sample from a copy of the weights, as workers do, so that the policy can train at the same time."""

    def __init__(self, folder: str, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.threads: list[str] = []
        """Name of the thread of each `generate` call."""
        self._busy = threading.Lock()
        super().__init__(self, tokenizer, max_model_length=length, max_num_seqs=64)

    @contextmanager
    def generation_model(self) -> Iterator[Any]:
        yield self.model

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Any]:
        self.threads.append(threading.current_thread().name)
        assert self._busy.acquire(blocking=False), "two draws at once"
        try:
            yield from super().generate(requests)
        finally:
            self._busy.release()

    def load_weights(
        self, version: int, weights: "Iterable[tuple[str, torch.Tensor]]", canary: Canary | None
    ) -> dict[str, float]:
        assert self._busy.acquire(blocking=False), "other weights in the middle of a draw"
        try:
            self.model.load_state_dict({name: tensor.clone() for name, tensor in weights})
        finally:
            self._busy.release()
        return super().load_weights(version, (), canary)


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace the pool of vLLM workers, which is slow to start and has its own tests."""

    def build(
        config: Any, *, model_path: str, tokenizer: PreTrainedTokenizerBase, max_model_length: int, **rest: Any
    ) -> SnapshotEngine:
        return SnapshotEngine(model_path, tokenizer, max_model_length)

    monkeypatch.setattr(rollouts, "build_engine", build)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a forked child, for the same order of sums
    yield
    torch.set_num_threads(before)


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def make(
    model: Path, folder: Path, *, algorithm: str = "grpo", lag: int = 1, **options: Any
) -> PPOTrainer | GRPOTrainer:
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": 6,
        "learning_rate": 3e-3, "save_strategy": "no", "rollout": {"engine": "vllm", "max_staleness": lag},
        "scoring": {"in_process": ["prefers_even"]},
    } | options  # fmt: skip
    if algorithm == "ppo":
        return PPOTrainer(str(model), prefers_even, PPOConfig(num_ppo_epochs=1, **defaults), ROWS, ROWS[:3])
    return GRPOTrainer(str(model), prefers_even, GRPOConfig(num_generations=4, **defaults), ROWS, ROWS[:3])


def versions(folder: Path, kind: str = "step") -> list[Any]:
    """Return the weight version from which each file of completions was sampled."""
    found = []
    for path in sorted((folder / "completions").glob(f"{kind}-*.jsonl")):
        [version] = {json.loads(line)["policy_version"] for line in path.read_text().splitlines()}
        found.append(version)
    return found


def figures(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("algorithm", "arrival"), [("grpo", False), ("grpo", True), ("ppo", False)])
@pytest.mark.parametrize(
    ("lag", "expected"), [(0, [1, 2, 3, 4, 5, 6]), (1, [1, 1, 2, 3, 4, 5]), (2, [1, 1, 1, 2, 3, 4])]
)
def test_each_step_is_sampled_with_the_expected_weights(
    tiny_model_path: Path, tmp_path: Path, algorithm: str, arrival: bool, lag: int, expected: list[int]
) -> None:
    trainer = make(tiny_model_path, tmp_path, algorithm=algorithm, lag=lag, train_on_arrival=arrival)
    engines: list[SnapshotEngine] = []
    trainer.callbacks.append(
        Watch(lambda: engines.append(instance_of(SnapshotEngine, present(trainer.rollouts.sampler).engine)))
    )
    trainer.train()
    assert versions(tmp_path) == expected
    gaps = figures(trainer, "sampling/logp_gap")
    stale = [step + 1 - version for step, version in enumerate(expected)]
    assert [gap > 1e-4 for gap in gaps] == [staleness > 0 for staleness in stale]
    assert sum(name.startswith("rollout-prefetch") for name in engines[0].threads) == (
        6 if arrival else 5 if lag else 0
    )
    if lag:
        assert figures(trainer, "groups/staleness") == stale
        assert figures(trainer, "groups/stale_dropped") == [0.0] * 6


class Watch(TrainerCallback):
    def __init__(self, then: Callable[[], None] | Callable[[], Any] | Callable[[], Any | None]) -> None:
        self.then = then

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.then()


@pytest.mark.parametrize("arrival", [False, True])
def test_too_stale_groups_are_dropped_and_sampled_again(tiny_model_path: Path, tmp_path: Path, arrival: bool) -> None:
    trainer = make(tiny_model_path, tmp_path, max_steps=4, train_on_arrival=arrival)

    def change_weights_twice() -> None:
        if trainer.state.global_step == 2:
            trainer.evaluate()  # draws with the weights of the update, so that the next change is one more
            trainer.policy.version += 1

    trainer.callbacks.append(Watch(change_weights_twice))
    trainer.train()
    assert figures(trainer, "groups/stale_dropped") == [0.0, 0.0, 2.0, 0.0]
    assert figures(trainer, "groups/staleness") == [0.0, 1.0, 0.0, 1.0]
    assert versions(tmp_path) == [1, 1, 4, 4]


def test_evaluation_uses_current_weights_and_does_not_affect_training(tiny_model_path: Path, tmp_path: Path) -> None:
    make(tiny_model_path, tmp_path / "without").train()
    make(tiny_model_path, tmp_path / "with", eval_strategy="steps", eval_steps=2).train()
    assert versions(tmp_path / "with", "eval") == [3, 5, 7]
    for name in (f"step-{step:06d}.jsonl" for step in range(1, 7)):
        first, second = (tmp_path / kind / "completions" / name for kind in ("without", "with"))
        assert first.read_text() == second.read_text()


@pytest.mark.fault(
    "SIGKILL of the trainer while groups are drawn ahead", "groups are in the checkpoint: the run goes on to the bit"
)
@pytest.mark.parametrize(
    ("algorithm", "lag", "arrival"), [("grpo", 1, False), ("grpo", 1, True), ("grpo", 2, True), ("ppo", 1, False)]
)
def test_prefetched_groups_survive_a_resume(
    tiny_model_path: Path, tmp_path: Path, algorithm: str, lag: int, arrival: bool
) -> None:
    options: dict[str, Any] = {"algorithm": algorithm, "lag": lag, "save_strategy": "steps", "save_steps": 3}
    options["train_on_arrival"] = arrival
    # All runs are in forks, because a fork of a process that has used several threads may wait for them forever.
    assert run_forked(lambda: make(tiny_model_path, tmp_path / "straight", **options).train()) == 0

    def train_and_die() -> None:
        trainer = make(tiny_model_path, tmp_path / "killed", **options)

        def die() -> None:
            if trainer.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.callbacks.append(Watch(die))
        trainer.train()

    assert run_forked(train_and_die) == -signal.SIGKILL
    going_on: dict[str, Any] = options | {"resume_from_checkpoint": True}
    assert run_forked(lambda: make(tiny_model_path, tmp_path / "killed", **going_on).train()) == 0
    comparison = compare_runs(tmp_path / "straight", tmp_path / "killed")
    assert comparison.is_exact, str(comparison)
    assert versions(tmp_path / "killed") == [max(1, step - lag) for step in range(1, 7)]


@pytest.mark.fault("rollout workers die for good while they draw ahead", "the run ends with that error")
def test_an_error_in_prefetching_ends_the_run(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: TransformersEngine, batch: list[GroupRequest]) -> Iterator[Group]:
        if threading.current_thread().name.startswith("rollout-prefetch"):
            raise WorkerDied("rollout workers failed 4 times")
        return sample(self, batch)

    sample = TransformersEngine._sample
    monkeypatch.setattr(TransformersEngine, "_sample", die)
    trainer = make(tiny_model_path, tmp_path)
    with pytest.raises(WorkerDied, match="failed 4 times"):
        trainer.train()
    assert not any(thread.name.startswith("rollout-prefetch") for thread in threading.enumerate())


class SlowEngine(RolloutEngine):
    """React to a cancel with a delay, as a pool does."""

    version = 0

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.num_begun = 0
        self.is_running = False
        self._cancelled = False

    def run(self) -> None:
        self.num_begun += 1
        self.is_running, self._cancelled = True, False
        self.begun.set()
        until = time.monotonic() + PATIENCE_S
        while not self._cancelled and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
        self.is_running = False
        raise RolloutError("dropped")

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Group]:
        raise NotImplementedError

    def load_weights(self, version: int, weights: Any, canary: Canary | None) -> dict[str, float]:
        raise NotImplementedError

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        raise NotImplementedError


class SlowDraw(RolloutBatch):
    def __init__(self, name: str) -> None:
        self.name = name

    def sample(self, engine: Any) -> None:
        engine.run()


def test_discarded_prefetches_have_ended() -> None:
    """Otherwise they would run in the pool at the same time as sampling of the trainer's own thread."""
    engine = SlowEngine()
    ahead = Prefetcher(engine)
    for name in ("first", "second", "third"):
        ahead.begin(SlowDraw(name))
    assert engine.begun.wait(timeout=PATIENCE_S)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(ahead.discard).result(timeout=PATIENCE_S)
    assert not engine.is_running
    assert engine.num_begun == 1
    assert ahead.collect("second") is None
    ahead.close()


def test_max_staleness_sets_the_correction_mode_and_checks_options() -> None:
    lag = {"rollout": {"max_staleness": 1}}
    assert GRPOConfig().vllm_importance_sampling_mode == "sequence_mask"
    assert GRPOConfig(**lag).vllm_importance_sampling_mode == "token_truncate"
    assert PPOConfig(**lag).vllm_importance_sampling_mode == "token_truncate"
    asked = GRPOConfig(**lag, vllm_importance_sampling_mode="sequence_truncate")
    assert asked.vllm_importance_sampling_mode == "sequence_truncate"
    for options, message in (
        ({"vllm_importance_sampling_correction": False}, "importance weights must correct"),
        ({"dynamic_sampling": True}, "leave one of them out"),
        ({"rollout": {"max_staleness": 1, "engine": "transformers"}}, "the engine to vllm"),
    ):
        with pytest.raises((ValueError, ConfigError), match=message):
            GRPOConfig(**lag | options)
