"""Test half-precision checkpoints with some float32 weights, such as the decay rates of delta-net layers."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlqwen import SFTConfig, SFTTrainer
from rlqwen.models.loading import load_model
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.rollout.weight_sync import ExpectedWeights, publish
from rlqwen.runs.export import ExportOptions, export_model
from tests.forked_ranks import run_ranks

EXACT = ("A_log", "linear_attn.norm.weight")
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "linear_head_dim": 32,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
ROWS = [{"prompt": f"{i}:", "completion": f" {i}"} for i in range(4)]


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_next"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bfloat16 folder with two float32 weights that bfloat16 would round."""
    experts = {"num_experts": 2, "moe_intermediate_size": 32} if request.param == "qwen3_next" else {}
    folder = build_tiny_qwen3(tmp_path_factory.mktemp("mixed") / "model", model_type=request.param, **SHAPE, **experts)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        is_exact = name.endswith(EXACT) and "mtp." not in name
        weights[name] = weight + torch.rand(weight.shape) * 0.1 if is_exact else weight.bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name])] == []


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules="all-linear")])
def test_float32_weights_are_saved_unchanged(mixed: Path, tmp_path: Path, peft_config: Any) -> None:
    """Compare every bit after a run with a learning rate of 0."""
    options = {"learning_rate": 0.0, "max_steps": 1, "bf16": True, "save_strategy": "steps", "save_steps": 1}
    args = SFTConfig(output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, **options)
    SFTTrainer(str(mixed), args, ROWS, peft_config=peft_config).train()
    before = load_file(mixed / "model.safetensors")
    assert_same_weights(load_file(tmp_path / "run" / "final" / "model.safetensors"), before)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000001" / "model.safetensors")
    assert all(saved[name].equal(before[name].to(saved[name].dtype)) for name in before)
    export_model(ExportOptions(source=str(tmp_path / "run"), destination=str(tmp_path / "exported")))
    assert_same_weights(load_file(tmp_path / "exported" / "model.safetensors"), before)


def test_float32_weights_are_trained_and_sent_as_float32(mixed: Path) -> None:
    args = SFTConfig(bf16=True)
    policy = Policy(load_model(str(mixed), args), args, reference=True)
    exact = [name for name in policy.trained_names if name.endswith(EXACT)]
    assert policy._reference is not None
    reference, stored = dict(policy._reference.model.named_parameters()), load_file(mixed / "model.safetensors")
    for name in exact:
        assert reference[name].equal(policy.model.get_parameter(name))
    chunks: list[Any] = []
    publish(1, policy.export_weights(), None, dtype="bfloat16", expected=_expected(mixed), put=chunks.append)
    sent = {name: (array, dtype) for chunk in chunks for name, array, dtype in chunk}
    assert len(exact) == 2
    assert {name for name, (_, dtype) in sent.items() if dtype == "torch.float32"} == {
        name for name in stored if name.endswith(EXACT) and "mtp." not in name
    }
    assert all(np.array_equal(array, stored[name].numpy()) for name, (array, dtype) in sent.items() if "32" in dtype)


def _expected(folder: Path) -> ExpectedWeights:
    expected = ExpectedWeights(str(folder))
    pytest.MonkeyPatch().setattr(expected, "check", lambda shapes: {})
    return expected


def test_a_float32_checkpoint_is_rounded_on_request(mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path / "wide")
    config = json.loads((mixed / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["dtype"] = "float32"
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path / "wide"), SFTConfig(model_init_kwargs={"dtype": "bfloat16"}))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_frozen_float32_weights_stay_exact_under_a_bf16_engine(mixed: Path, tmp_path: Path) -> None:
    def train() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing DeepSpeed causes many
            options = {"learning_rate": 0.0, "max_steps": 1, "bf16": True, "parallel": {"zero_stage": 2}}
            args = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **options)
            SFTTrainer(str(mixed), args, ROWS, peft_config=LoraConfig(r=2, target_modules=["out_proj"])).train()

    run_ranks(train)
    assert_same_weights(load_file(tmp_path / "final" / "model.safetensors"), load_file(mixed / "model.safetensors"))
