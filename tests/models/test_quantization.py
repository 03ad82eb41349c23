"""Test 4- and 8-bit base weights on CPU: training of adapters, and export of equal plain weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlqwen.config import ModelConfig, QuantizationSettings, Recipe, SFTConfig
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models import quantization
from rlqwen.models.loading import load_model
from rlqwen.models.policy import Policy
from rlqwen.models.quantization import bitsandbytes_config, quantized_bits
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.packing.batch import pack
from rlqwen.preflight import check_recipe
from rlqwen.trainers.factory import model_arguments
from rlqwen.trainers.sft import SFTTrainer
from tests.models.test_policy import make_model, padded_logprobs, skewed_trees

pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional extra")
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
NF4 = QuantizationSettings(bits=4)
KINDS = {
    "nf4": (NF4, {}),
    "nf4 dora": (NF4, {"use_dora": True}),
    "fp4": (QuantizationSettings(bits=4, type="fp4", double=False), {}),
    "8 bits": (QuantizationSettings(bits=8), {"use_rslora": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    make_model(initializer_range=0.1).save_pretrained(path)
    return path


def quantized(
    folder: Path, settings: QuantizationSettings, *, bf16: bool = False, checkpointing: bool = False, **lora: Any
) -> Policy:
    dtype = "bfloat16" if bf16 else "float32"
    config = bitsandbytes_config(settings.model_copy(update={"compute_dtype": dtype}))
    args = SFTConfig(
        model_init_kwargs={"dtype": dtype, "quantization_config": config},
        bf16=bf16,
        gradient_checkpointing=checkpointing,
    )
    return Policy(load_model(str(folder), args), args, peft_config=LoraConfig(**LORA | lora), reference=True)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_weights_give_the_logprobs_of_the_policy(folder: Path, tmp_path: Path, kind: str) -> None:
    settings, lora = KINDS[kind]
    policy = quantized(folder, settings, **lora)
    assert policy.quantized_bits == settings.bits
    batch = pack(skewed_trees())
    logp, _ = policy.logprobs(batch)
    before = {name: tensor for name, tensor in policy.model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    before = {name: tensor.clone() for name, tensor in before.items()}

    plain = make_model()
    exported = dict(policy.export_weights())
    assert exported.keys() == plain.state_dict().keys()
    plain.load_state_dict(exported)
    # Both multiply dequantized weights, so they differ only by float32 rounding.
    torch.testing.assert_close(padded_logprobs(plain, skewed_trees()), logp, atol=5e-5, rtol=1e-4)
    assert all(torch.equal(before[name], policy.model.state_dict()[name]) for name in before)
    with policy.inference():
        assert torch.equal(policy.logprobs(batch)[0], logp)

    policy.save(tmp_path / "merged", dtype=policy.original_dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert quantized_bits(loaded) is None
    torch.testing.assert_close(padded_logprobs(loaded, skewed_trees()), logp, atol=5e-5, rtol=1e-4)
    policy.save(tmp_path / "base", adapter=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reference = policy.reference_logprobs(batch)
    torch.testing.assert_close(padded_logprobs(base, skewed_trees()), reference, atol=5e-5, rtol=1e-4)
    assert (reference - logp).abs().max() > 0.01
    # Quantization changes the base, with 8 bits less than with 4.
    start = padded_logprobs(AutoModelForCausalLM.from_pretrained(folder), skewed_trees())
    assert 1e-4 < (reference - start).abs().mean() < (0.05 if settings.bits == 8 else 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_gets_gradients(folder: Path, kind: str, checkpointing: bool) -> None:
    """Compare them with the gradients of the same adapter on the dequantized weights."""
    settings, lora = KINDS[kind]
    policy = quantized(folder, settings, checkpointing=checkpointing, **lora)
    assert not any("base_layer" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    plain = make_model()
    with policy.model.disable_adapter():
        plain.load_state_dict(dict(policy.export_weights()))
    twin = Policy(plain, SFTConfig(), peft_config=LoraConfig(**LORA | lora))
    twin.model.load_state_dict(
        {name: tensor for name, tensor in policy.model.state_dict().items() if "lora_" in name}, strict=False
    )
    for each in (policy, twin):
        each.logprobs(pack(skewed_trees()))[0].sum().backward()
    expected = dict(twin.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            gap = (parameter.grad - expected[name].grad).norm()
            assert gap <= 1e-3 * expected[name].grad.norm() + 1e-5, name


@pytest.mark.parametrize("kind", ["nf4", "8 bits"])
def test_logprobs_in_bfloat16_differ_only_by_rounding(folder: Path, kind: str) -> None:
    settings, lora = KINDS[kind]
    policy = quantized(folder, settings, bf16=True, **lora)
    dtypes = {parameter.dtype for parameter in policy.model.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16, torch.uint8 if settings.bits == 4 else torch.int8}
    assert policy.original_dtype is torch.bfloat16
    logp, _ = policy.logprobs(pack(skewed_trees()))
    plain = make_model()
    plain.load_state_dict(dict(policy.export_weights()))
    gap = (padded_logprobs(plain, skewed_trees()) - logp).abs()
    assert gap.mean() < 0.05


def test_a_model_saved_quantized_is_loaded_and_exported(folder: Path, tmp_path: Path) -> None:
    args = SFTConfig(model_init_kwargs={"quantization_config": bitsandbytes_config(NF4), "dtype": "float32"})
    model = load_model(str(folder), args)
    expected = padded_logprobs(model, skewed_trees())
    model.save_pretrained(tmp_path)
    policy = Policy(load_model(str(tmp_path), SFTConfig()), SFTConfig(), peft_config=LoraConfig(r=4))
    assert not policy.has_base_of(str(tmp_path))
    torch.testing.assert_close(policy.logprobs(pack(skewed_trees()))[0], expected, atol=2e-5, rtol=1e-5)
    plain = make_model()
    plain.load_state_dict(dict(policy.export_weights()))
    torch.testing.assert_close(padded_logprobs(plain, skewed_trees()), expected, atol=5e-5, rtol=1e-4)


def test_a_trainer_takes_the_quantization_arguments_of_trl(tmp_path: Path) -> None:
    """Train SFT on 4 bits: the loss falls, and the saved model loads without bitsandbytes."""
    model = build_tiny_qwen3(
        tmp_path / "model", hidden_size=64, num_layers=2, intermediate_size=128, num_heads=2, num_kv_heads=1
    )
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=8, learning_rate=1e-2, lr_scheduler_type="constant",
        model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, save_strategy="steps",
        save_steps=8, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"text": "one two three four"}] * 8
    with pytest.raises(ModelError, match="4-bit weights cannot be trained themselves"):
        SFTTrainer(str(model), args, rows)
    trainer = SFTTrainer(str(model), args, rows, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    state = trainer.train()
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert quantized_bits(final) is None
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_config.json").is_file()
    trainer.policy.load_checkpoint(tmp_path / "run" / "checkpoints" / "step-000008" / "adapter")


def test_the_quantization_section_of_a_recipe_is_read() -> None:
    model = {"path": "x", "lora": {"r": 4}, "quantization": {"bits": 4, "type": "fp4", "compute_dtype": "bfloat16"}}
    config = model_arguments(ModelConfig.parse(model))["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "fp4", True)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="quantized weights cannot be trained themselves; set lora"):
        ModelConfig.parse({"path": "x", "quantization": {}})
    with pytest.raises(ConfigError, match=r"quantization\.bits"):
        ModelConfig.parse(model | {"quantization": {"bits": 3}})


def test_missing_packages_and_unsupported_quantization_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="PEFT cannot train DoRA on 8-bit weights on CPU"):
        quantized(folder, QuantizationSettings(bits=8), use_dora=True)
    model = make_model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="quantized by 'gptq'"):
        Policy(model, SFTConfig())
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'rlqwen\[quantization\]'"):
        bitsandbytes_config(NF4)
    section = {"path": "builtin:tiny-qwen3", "lora": {}, "quantization": {}}
    data = {"train": {"generator": "arithmetic", "args": {"size": 4}}}
    recipe = {"algorithm": "sft", "model": section, "data": data, "output_dir": str(tmp_path)}
    faults = [str(fault) for fault in check_recipe(Recipe.parse(recipe)).faults]
    assert any("model.quantization needs bitsandbytes" in fault for fault in faults)
    with pytest.raises(ModelError, match="quantization_config needs bitsandbytes"):
        load_model(str(folder), SFTConfig(model_init_kwargs={"quantization_config": object()}))
