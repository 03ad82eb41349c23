"""Test sending adapters to workers: what is sent, and that workers sample from the adapted policy."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlqwen.config import RolloutConfig, SFTConfig
from rlqwen.errors import ConfigError, WeightSyncError
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.rollout.policy_sync import choose_sync
from rlqwen.rollout.pool import RolloutPool
from tests.narrowing import present
from tests.rollout.test_pool import SMALL as SHAPE
from tests.rollout.test_pool import TEMPERATURE, assert_drawn_from, canary, logprobs, requests, share_identical, start

RANK = 3
RSLORA = {"r": RANK, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"down_proj": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "tied", initializer_range=0.15, **SHAPE)


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RolloutPool]:
    engine = start(folder, lora_rank=RANK)
    yield engine
    engine.close()


def adapted(folder: Path, seed: int = 0, **options: Any) -> Policy:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False}
    config = LoraConfig(**defaults | options)
    return Policy(model, SFTConfig(), peft_config=config)


def test_workers_sample_from_the_adapted_policy(pool: RolloutPool, folder: Path) -> None:
    """Check a first adapter, a second one that replaces it, and a restarted worker that gets the second."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = list(pool.generate(requests()))
    assert_drawn_from(before, base)
    for version in (1, 2):
        policy = adapted(folder, seed=version, **RSLORA)
        with policy.generation_model() as model:
            metrics = pool.load_weights(version, policy.export_adapter(), canary(model))
            assert metrics["sync/canary_gap"] < 1e-4
            assert metrics["sync/bytes"] == 4 * sum(parameter.numel() for parameter in policy.trained_parameters)
            after = list(pool.generate(requests()))
            assert {group.policy_version for group in after} == {version}
            assert_drawn_from(after, model)
        assert share_identical(before, after) < 0.5
        assert gap(after, base) > 0.1
        before = after
    victim = pool.process_ids()[0]
    os.kill(victim, signal.SIGKILL)
    again = list(pool.generate(requests()))
    assert victim not in pool.process_ids()
    assert {group.policy_version for group in again} == {2}
    with policy.generation_model() as model:
        assert_drawn_from(again, model)
        with pytest.raises(WeightSyncError, match=r"version 3, .* by 0\.05.* \(tolerance 0\.001\)\. Likely"):
            pool.load_weights(3, policy.export_adapter(), canary(model, offset=0.05))
        with pytest.raises(WeightSyncError, match=r"missing: base_model.*lora_A"):
            pool.load_weights(4, list(policy.export_adapter())[1:], canary(model))


def gap(groups: list[Any], model: Any) -> float:
    """Return the largest difference between the sampler's logprobs and those of `model`."""
    gaps = []
    for group in groups[:4]:
        for completion in group.completions:
            expected = logprobs(model, group.prompt.token_ids + completion.token_ids, TEMPERATURE)
            gaps.append((torch.tensor(completion.logprobs) - expected[len(group.prompt.token_ids) - 1 :]).abs().max())
    return float(max(gaps))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"use_rslora": True}, None),
        ({"target_modules": ["v_proj"], "layers_to_transform": [1]}, None),
        ({"use_dora": True}, "vLLM has no DoRA"),
        ({"modules_to_save": ["norm"]}, "trains whole modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "no adapter on embed_tokens"),
        ({"r": 600}, "rank 600 is above"),
        ({"bias": "all"}, "biases are trained"),
    ],
)
def test_only_the_adapter_is_sent_if_vllm_can_apply_it(
    folder: Path, options: dict[str, Any], reason: str | None
) -> None:
    untied = AutoModelForCausalLM.from_pretrained(folder)
    untied.config.tie_word_embeddings = False
    policy = Policy(untied, SFTConfig(), peft_config=LoraConfig(**{"target_modules": "all-linear"} | options))
    if reason is None:
        alone = (8, "rollout workers are sent the adapter alone, of rank 8")
        assert choose_sync(policy, RolloutConfig(lora=True)) == alone
        assert choose_sync(policy, RolloutConfig(num_gpus_per_worker=1)) == alone
        for config, why in (
            (RolloutConfig(lora=False), "lora is false"),
            (RolloutConfig(num_gpus_per_worker=0), "CPU"),
        ):
            rank, note = choose_sync(policy, config)
            assert rank is None
            assert why in present(note)
        return
    rank, note = choose_sync(policy, RolloutConfig())
    assert rank is None
    assert reason in present(note)
    with pytest.raises(ConfigError, match=reason):
        choose_sync(policy, RolloutConfig(lora=True))


def test_without_an_adapter_and_for_experts_weights_are_sent(folder: Path) -> None:
    assert choose_sync(Policy(AutoModelForCausalLM.from_pretrained(folder), SFTConfig()), RolloutConfig()) == (
        None,
        None,
    )
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_experts": 2, "num_experts_per_tok": 1}
    experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_key_value_heads=1, moe_intermediate_size=16))
    policy = Policy(experts, SFTConfig(), peft_config=LoraConfig(target_modules=["q_proj"]))
    assert "mixture of experts" in present(choose_sync(policy, RolloutConfig())[1])


def test_a_base_model_that_differs_from_the_folder_is_detected(folder: Path) -> None:
    assert adapted(folder).has_base_of(str(folder))
    assert not adapted(folder, init_lora_weights="pissa", target_modules=["q_proj"]).has_base_of(str(folder))
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    policy = Policy(rounded, SFTConfig(), peft_config=LoraConfig(target_modules=["q_proj"]))
    assert not policy.has_base_of(str(folder))
