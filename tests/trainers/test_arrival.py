"""Test training on groups as they arrive: the same updates as without, and gradients before the last group."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlqwen import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, PPOConfig
from rlqwen.errors import ConfigError, RewardFailure, WorkerDied
from rlqwen.packing.batch import Branch, Tree, split_trees
from rlqwen.rollout import sampler as rollouts
from rlqwen.trainers.arrival import split_arriving
from rlqwen.types import Completion, Group, GroupRequest, Prompt
from tests.patience import PATIENCE_S
from tests.rollout.test_prefetch import SnapshotEngine

ROWS = [{"prompt": [{"role": "user", "content": f"{i} + 1 = ?"}]} for i in range(9)]


class LateEngine(SnapshotEngine):
    """Hand over groups in another order than they were asked for, and the last one only when it is released."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.release: threading.Event | None = None
        self.order = slice(None, None, -1)
        self.fails = False

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[Any]:
        groups = list(super().generate(requests))[self.order]
        yield from groups[:-1]
        if self.fails:
            raise WorkerDied("rollout workers failed 4 times")
        if self.release is not None:
            assert self.release.wait(PATIENCE_S), "nothing was trained before the last group"
            self.release.clear()
        yield groups[-1]


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LateEngine]]:
    """Replace the pool of vLLM workers, which is slow to start and has its own tests."""
    built: list[LateEngine] = []

    def build(
        config: Any, *, model_path: Path, tokenizer: PreTrainedTokenizerBase, max_model_length: int, **rest: Any
    ) -> LateEngine:
        built.append(LateEngine(model_path, tokenizer, max_model_length))
        return built[-1]

    monkeypatch.setattr(rollouts, "build_engine", build)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield built
    torch.set_num_threads(before)


def prefers_even(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def make(model: Path, folder: Path, *, arrival: bool | None, reward: Any = prefers_even, **options: Any) -> GRPOTrainer:
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3,
        "num_generations": 4, "max_completion_length": 6, "max_steps": 2, "learning_rate": 3e-3, "save_strategy": "no",
        "logging_steps": 1, "rollout": {"engine": "vllm"}, "scoring": {"in_process": ["prefers_even"]},
        "train_on_arrival": arrival,
    }  # fmt: skip
    return GRPOTrainer(str(model), reward, GRPOConfig(**defaults | options), ROWS)


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.policy.trained_parameters])


def figures(trainer: Any, *keys: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry for key in keys]


@pytest.mark.parametrize(
    "options",
    [
        {"entropy_coef": 0.01},
        {"loss_type": "grpo", "beta": 0.1, "max_tokens_per_micro_batch": 60},
        {"loss_type": "dr_grpo", "num_iterations": 2, "max_steps": 2},
        {"steps_per_generation": 6, "advantage_estimator": "rloo", "scale_rewards": False, "max_steps": 4},
        {"dynamic_sampling": True, "soft_overlong_cache": 3, "rollout": {"engine": "vllm", "num_workers": 2}},
    ],
)  # fmt: skip
def test_updates_are_those_of_whole_batches(tiny_model_path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = make(tiny_model_path, tmp_path / "whole", arrival=False, **options)
    start = weights(whole)
    arriving = make(tiny_model_path, tmp_path / "arriving", arrival=True, **options)
    whole.train()
    arriving.train()
    keys = ("loss", "grad_norm", "entropy", "tokens/trained", "completions/mean_length", "groups/no_signal")
    assert figures(arriving, *keys) == pytest.approx(figures(whole, *keys), rel=1e-4, abs=1e-6)
    moved = (weights(whole) - start).norm()
    assert moved > 0
    assert (weights(arriving) - weights(whole)).norm() < 1e-3 * moved
    assert all(share <= 1 for share in figures(arriving, "time/overhead_share"))


def test_the_first_backward_comes_before_the_last_group(
    tiny_model_path: Path, tmp_path: Path, engines: list[LateEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model_path, tmp_path, arrival=True)
    release, accumulate = threading.Event(), trainer.accumulate
    waiting = []

    def watch(micro: Any, update: Any) -> None:
        accumulate(micro, update)
        waiting.append(not release.is_set())
        release.set()

    monkeypatch.setattr(trainer, "accumulate", watch)
    trainer.rollouts.require_sampler()
    engines[0].release, engines[0].order = release, slice(None)
    trainer.train()
    assert waiting[0]
    assert trainer.state.global_step == 2
    assert all(seconds >= 0 for seconds in figures(trainer, "time/rollout_hidden"))


def test_distillation_on_arrival(tiny_model_path: Path, tmp_path: Path) -> None:
    def train(folder: Path, arrival: bool) -> DistillationTrainer:
        config = DistillationConfig(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2,
            max_completion_length=6, learning_rate=3e-3, save_strategy="no", rollout={"engine": "vllm"},
            loss_normalizer="sequence_mean", train_on_arrival=arrival, teacher=str(tiny_model_path), adam_epsilon=1.0,
        )  # fmt: skip
        trainer = DistillationTrainer("builtin:tiny-qwen3", args=config, train_dataset=ROWS)
        trainer.train()
        return trainer

    whole, arriving = train(tmp_path / "whole", False), train(tmp_path / "arriving", True)
    keys = ("loss", "kl", "grad_norm")
    assert figures(arriving, *keys) == pytest.approx(figures(whole, *keys), rel=1e-4)
    assert (
        weights(arriving) - weights(whole)
    ).norm() < 1e-5  # an epsilon of 1 makes an update as large as its gradient


def test_an_error_in_sampling_ends_the_run(tiny_model_path: Path, tmp_path: Path, engines: list[LateEngine]) -> None:
    trainer = make(tiny_model_path, tmp_path, arrival=True)
    trainer.rollouts.require_sampler()
    engines[0].fails = True
    with pytest.raises(WorkerDied, match="failed 4 times"):
        trainer.train()
    assert not any(thread.name.startswith("rollout-prefetch") for thread in threading.enumerate())


def test_a_reward_that_fails_ends_the_run_before_the_update(tiny_model_path: Path, tmp_path: Path) -> None:
    def prefers_even(completions: list[str], **kwargs: Any) -> list[float]:
        raise ValueError("no")

    trainer = make(tiny_model_path, tmp_path, arrival=True, reward=prefers_even)
    with pytest.raises(RewardFailure):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale_rewards": "batch"}, "deviation of all rewards"),
        ({"advantage_estimator": "reinforce_pp"}, "compare the groups of a batch"),
        ({"loss_type": "grpo", "entropy_coef": 0.1}, "entropy_coef divides by tokens"),
    ],
)
def test_what_needs_the_whole_batch_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        GRPOConfig.parse({"train_on_arrival": True, "num_generations": 8, **options})
    assert GRPOConfig.parse(options).arrival_obstacle is not None
    with pytest.raises(ConfigError, match="draws mini-batches"):
        PPOConfig.parse({"train_on_arrival": True})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale_rewards": "batch"}, "scale_rewards 'batch' divides by"),
        ({"rollout": {"engine": "transformers"}}, "the engine transformers samples in the trainer's own process"),
        ({}, "workers and trainer compute on the same processors"),
    ],
)
def test_a_note_says_once_why_it_is_off_by_default(
    tiny_model_path: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    trainer = make(tiny_model_path, tmp_path, arrival=None, **options)
    assert not trainer.trains_on_arrival
    (note,) = [note for note in trainer.logger.pending_notes if "train_on_arrival" in note]
    assert note.startswith(f"train_on_arrival is off, because {reason}")
    asked = make(tiny_model_path, tmp_path / "asked", arrival=False, **options)
    assert not any("train_on_arrival" in note for note in asked.logger.pending_notes)


def test_a_checkpoint_records_how_many_workers_there_were(tiny_model_path: Path, tmp_path: Path) -> None:
    """Each gets a fixed share of the groups, so their number is part of the result, also where the machine gives it."""
    for number, recorded in ((None, 1), (2, 2)):
        rollout = {"engine": "vllm", "num_workers": number}
        trainer = make(tiny_model_path, tmp_path / str(number), arrival=None, rollout=rollout)
        assert trainer.fingerprint()["train.rollout.num_workers"] == recorded


def test_an_engine_in_the_trainers_process_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the trainer's own process"):
        make(tiny_model_path, tmp_path, arrival=True, rollout={"engine": "transformers"})
    assert not make(tiny_model_path, tmp_path, arrival=None).trains_on_arrival  # workers share this machine's CPUs


def test_shares_wait_for_no_group_of_the_next() -> None:
    groups = [Group(Prompt(i, [1], ""), [Completion([2], [0.0], "stop", "")] * 3, 1) for i in range(4)]
    asked = []

    def arriving() -> Iterator[Group]:
        for group in groups:
            asked.append(group.prompt.index)
            yield group

    seen = []
    for share in split_arriving(arriving(), 4):
        seen.append([(group.prompt.index, indices) for group, indices in share])
        if len(seen) == 1:
            assert asked == [0, 1]
    assert seen == [[(0, [0, 1, 2]), (1, [0])], [(1, [1, 2]), (2, [0, 1])], [(2, [2]), (3, [0, 1, 2])]]


def test_a_full_micro_batch_does_not_wait_for_another_tree() -> None:
    trees = [Tree([1], [Branch([2]), Branch([3])]) for _ in range(3)]
    arriving = iter(trees)
    parts = split_trees(arriving, max_branches=4)
    assert len(next(parts)) == 2
    assert next(arriving) is trees[2]
