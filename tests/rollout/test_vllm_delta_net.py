"""Test models with gated delta-net layers in real vLLM workers: the text part of full models, in bfloat16 on CPU."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedModel

from rlqwen.config import RolloutConfig, TrainerConfig
from rlqwen.errors import ConfigError
from rlqwen.models.loading import load_model
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import resolve_model_path
from rlqwen.rollout import build_engine
from rlqwen.rollout.engines.vllm import Vllm
from rlqwen.rollout.engines.vllm_served_model import text_view
from rlqwen.rollout.pool import RolloutPool
from rlqwen.types import Canary, Group
from tests.rollout.test_pool import TEMPERATURE, logprobs, requests

ARGS = TrainerConfig(output_dir="unused", use_cpu=True, bf16=False)
NAMES = ("tiny-qwen3.5", "tiny-qwen3.5-moe", "tiny-qwen3-next")
TOLERANCE = 0.02
"""Allowed mean gap between logprobs in bfloat16 and float32; single gaps are larger if rounding changes the experts."""


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(resolve_model_path(f"builtin:{request.param}", tmp_path_factory.mktemp("models"), num_layers=4))


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy(load_model(str(folder), ARGS), ARGS)


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RolloutPool]:
    config = RolloutConfig(engine="vllm", num_cpus_per_worker=0.5, max_num_seqs=32, dtype="bfloat16")
    engine = build_engine(
        config,
        model_path=str(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        compute_dtype="float32",
        max_model_length=128,
        seed=0,
    )
    assert isinstance(engine, RolloutPool)
    yield engine
    engine.close()


def canary(model: PreTrainedModel) -> Canary:
    tokens = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(9)).tolist()
    return Canary(tuple(tokens), tuple(logprobs(model, tokens).tolist()), tolerance=TOLERANCE)


def gap(groups: list[Group], model: PreTrainedModel) -> float:
    """Return the mean difference between the sampler's and the model's logprobs."""
    gaps: list[float] = []
    for group in groups:
        for completion in group.completions[:2]:
            tokens = group.prompt.token_ids + completion.token_ids
            expected = logprobs(model, tokens, TEMPERATURE)[len(group.prompt.token_ids) - 1 :]
            gaps += (torch.tensor(completion.logprobs) - expected).abs().tolist()
    return sum(gaps) / len(gaps)


def test_every_kind_of_weight_is_synced_to_the_workers(pool: RolloutPool, policy: Policy) -> None:
    """Change one kind of weight at a time; sampling again, with cached prefixes, must be as accurate."""
    kinds: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in policy.base_model.named_parameters():
        kinds.setdefault(name.partition(".layers.")[2].partition(".")[2] or name, []).append(parameter)
    assert any("conv1d" in kind for kind in kinds)
    generator = torch.Generator().manual_seed(0)
    for version, (kind, parameters) in enumerate(kinds.items(), start=1):
        with torch.no_grad():
            for parameter in parameters:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.5 * parameter.std() if parameter.ndim > 1 else 0.3))
        with policy.generation_model() as model:
            metrics = pool.load_weights(version, policy.export_weights(), canary(model))
        assert metrics["sync/canary_gap"] < TOLERANCE, kind
        assert metrics["sync/rebuilt_engines"] == 0, kind
    with policy.generation_model() as model:
        for _ in range(2):
            groups = list(pool.generate(requests(count=6, max_tokens=40)))
            assert gap(groups, model) < TOLERANCE


def test_the_same_seeds_give_the_same_completions(pool: RolloutPool) -> None:
    def draw() -> list[list[int]]:
        groups = sorted(pool.generate(requests(count=4)), key=lambda group: group.prompt.index)
        return [completion.token_ids for group in groups for completion in group.completions]

    first, second = draw(), draw()
    assert sum(ours == theirs for ours, theirs in zip(first, second, strict=True)) > 0.8 * len(first)


def test_bfloat16_is_chosen_on_cpu_and_logged(folder: Path) -> None:
    config = RolloutConfig(engine="vllm", num_gpus_per_worker=0)
    dtype, note = Vllm.choose_dtype(config, str(folder), "float32")
    assert dtype == "bfloat16"
    assert note is not None
    assert "bfloat16" in note
    assert Vllm.choose_dtype(config, str(folder), "bfloat16") == ("bfloat16", None)
    with pytest.raises(ConfigError, match=r"rollout\.dtype is float32.*bfloat16 only"):
        Vllm.choose_dtype(config.model_copy(update={"dtype": "float32"}), str(folder), "float32")
    on_gpu = config.model_copy(update={"num_gpus_per_worker": 1.0})
    assert Vllm.choose_dtype(on_gpu, str(folder), "float32") == ("float32", None)


def test_heads_without_a_kernel_are_refused(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_next", "linear_key_head_dim": 32, "linear_value_head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="linear_key_head_dim is 32"):
        Vllm.choose_dtype(RolloutConfig(engine="vllm", num_gpus_per_worker=0), str(tmp_path), "float32")


def test_the_text_view_of_a_full_folder_has_only_the_text_model(folder: Path, tmp_path: Path) -> None:
    view = text_view(folder, tmp_path / "view")
    config = json.loads((view / "config.json").read_text("utf-8"))
    assert "vision_config" not in config
    assert (view / "model.safetensors").resolve() == (folder / "model.safetensors").resolve()


def test_the_text_view_ties_the_head_if_the_full_model_does(tmp_path: Path) -> None:
    config = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": {"model_type": "qwen3_5_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert json.loads((text_view(tmp_path, tmp_path / "view") / "config.json").read_text())["tie_word_embeddings"]


def test_the_text_view_of_quantized_weights_keeps_the_quantization_config(tmp_path: Path) -> None:
    """Without the config, vLLM cannot assign the scales among the weights."""
    quantization = {"quant_method": "compressed-tensors"}
    config = {"model_type": "qwen3_5", "text_config": {}, "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert json.loads((text_view(tmp_path, tmp_path / "view") / "config.json").read_text())["quantization_config"] == (
        quantization
    )


def test_workers_are_sent_merged_weights(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = Policy(load_model(str(folder), ARGS), ARGS, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapted.lora_obstacle is not None
