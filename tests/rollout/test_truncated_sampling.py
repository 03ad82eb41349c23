"""Test training on completions of a truncated distribution: the correction compares equally truncated distributions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlqwen.algorithms.losses.correction import compare_with_sampler
from rlqwen.config import GRPOConfig
from rlqwen.errors import ConfigError
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.packing.batch import Branch, Tree, pack
from rlqwen.types import Truncation
from tests.trainers.test_grpo import make_trainer as make_grpo
from tests.trainers.test_ppo import make_trainer as make_ppo

TRUNCATED: dict[str, Any] = {"top_p": 0.8, "top_k": 30, "min_p": 0.02, "temperature": 0.8, "max_completion_length": 24}


def entries(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


@pytest.fixture(scope="module")
def sharp_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a model with large weights, so that truncation removes tokens with noticeable probability."""
    return build_tiny_qwen3(
        tmp_path_factory.mktemp("tiny") / "sharp", hidden_size=64, num_layers=2, intermediate_size=128, num_heads=2,
        num_kv_heads=1, initializer_range=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "steps_per_generation": 2}], ids=["once", "often"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_grpo_correction_weights_do_not_depend_on_completion_length(
    sharp_model_path: Path, tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    trainer = make_grpo(
        sharp_model_path, tmp_path, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.99,
        vllm_importance_sampling_clip_max=1.01, num_generations=4, per_device_train_batch_size=8, **TRUNCATED, **options,
    )  # fmt: skip
    trainer.train()
    assert max(entries(trainer, "sampling/logp_gap")) < 1e-4
    assert entries(trainer, "sampling/correction") == pytest.approx([1.0] * len(entries(trainer, "loss")), abs=1e-3)
    assert max(entries(trainer, "sampling/logp_missing")) == 0


def test_ppo_correction_weights_do_not_depend_on_completion_length(sharp_model_path: Path, tmp_path: Path) -> None:
    trainer = make_ppo(sharp_model_path, tmp_path, max_steps=4, **TRUNCATED)
    trainer.train()
    assert max(entries(trainer, "sampling/logp_gap")) < 1e-4
    assert entries(trainer, "sampling/correction") == pytest.approx([1.0] * len(entries(trainer, "loss")), abs=1e-3)


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"generation_kwargs": {"presence_penalty": 1.0}}], ids=str
)
@pytest.mark.parametrize("make", [make_grpo, make_ppo])
def test_a_penalty_disables_the_correction_with_a_warning(
    tiny_model_path: Path, tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    trainer = make(tiny_model_path, tmp_path, max_steps=1, top_p=0.9, **options)
    assert trainer.truncation is None  # not computed, because nothing uses it
    (note,) = [note for note in trainer.logger.pending_notes if "correction" in note]
    (name,) = options
    assert f"no importance correction, and sampling/logp_gap is not measured: {name}" in note
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not {"sampling/logp_gap", "sampling/correction"} & entry.keys()
    assert entry["sampling/logp_missing"] == 0  # otherwise the monitor would raise an alert
    assert math.isfinite(entry["loss"])


def test_tokens_outside_the_vocabulary_raise_an_error(tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_grpo(tiny_model_path, tmp_path, generation_kwargs={"logit_bias": {10**6: 1.0}})
    with pytest.raises(ConfigError, match=r"generation_kwargs\.logit_bias names token 1000000"):
        trainer.train()


def test_stale_groups_refuse_options_that_disable_the_correction() -> None:
    with pytest.raises(ConfigError, match="repetition_penalty shapes the sampler's distribution"):
        GRPOConfig(rollout={"max_staleness": 1}, repetition_penalty=1.2)
    assert GRPOConfig(rollout={"max_staleness": 1}, top_p=0.9, top_k=20).truncation == Truncation(top_p=0.9, top_k=20)


def test_correction_weights_equal_a_manual_computation() -> None:
    """Two completions sampled from the trainer's truncated distribution have equal weights, whatever their length."""
    trees = [Tree([1], [Branch([2] * length, per_token={"sampler_logp": [-0.5] * length}) for length in (2, 50)])]
    batch = pack(trees)
    old_logp_N = torch.full((52,), -0.7)
    batch.per_token["log_kept"] = torch.full((52,), -0.2)
    config = GRPOConfig(top_p=0.9, vllm_importance_sampling_mode="sequence_truncate")
    weights_N, metrics = compare_with_sampler(old_logp_N, batch, config)
    torch.testing.assert_close(weights_N, torch.ones(52), atol=1e-4, rtol=0)
    assert metrics["sampling/logp_gap"].value.item() == pytest.approx(0.0, abs=1e-5)
    whole_N, _ = compare_with_sampler(old_logp_N, batch, GRPOConfig(vllm_importance_sampling_mode="sequence_truncate"))
    assert whole_N is not None
    assert whole_N[-1].item() == pytest.approx(math.exp(-0.2 * 50), rel=1e-3)  # the value without the term


def test_a_completion_ended_by_a_stop_string_counts_as_finished(sharp_model_path: Path, tmp_path: Path) -> None:
    seen: dict[tuple[int, ...], str] = {}

    def remember(completions: list[str], completion_ids: list[list[int]], **_: object) -> Any:
        seen.update(zip((tuple(ids) for ids in completion_ids), completions, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_grpo(
        sharp_model_path, tmp_path, reward=remember, max_steps=1, mask_truncated_completions=True, beta=0.1,
        generation_kwargs={"stop": ["e", "a", "i"]}, max_completion_length=12,
        rows=[{"prompt": f"{number} + 1 = "} for number in range(4)],
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()]
    stopped = [row for row in rows if {"e", "a", "i"} & set(row["completion"])]
    assert stopped
    assert {row["finish_reason"] for row in stopped} == {"stop"}
    finished = [row for row in rows if row["finish_reason"] == "stop"]
    assert entries(trainer, "completions/truncated") == [1 - len(finished) / len(rows)]
    assert {row["completion"] for row in rows} <= set(seen.values())  # includes the evaluation at the end
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in trainer.train_rows)
    assert entries(trainer, "tokens/trained")[0] <= sum(row["num_tokens"] for row in finished) + num_prompt_tokens
