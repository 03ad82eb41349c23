"""Test vision-language models without a text-only class: their text model is trained, and the tower does not change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from rlqwen import SFTConfig
from rlqwen.errors import ModelError
from rlqwen.models.loading import load_model, load_scalar_model
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import pack
from tests.models.test_policy import SHAPE, padded_logprobs, skewed_trees
from tests.narrowing import present
from tests.trainers.test_grpo import make_trainer as make_grpo
from tests.trainers.test_grpo import steps
from tests.trainers.test_sft import make_trainer as make_sft

TEXT = SHAPE | {"vocab_size": 640, "head_dim": 16}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
QWEN_VISION = VISION | {"depth": 1, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [0]}
QWEN3_VISION = VISION | {
    "depth": 2, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
OTHER_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4}  # fmt: skip
MARKS = {"image_token_id": 630, "video_token_id": 631, "vision_start_token_id": 632, "vision_end_token_id": 633}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "qwen2_5_vl": (TEXT | ROPE, QWEN_VISION, MARKS),
    "qwen3_vl": (TEXT | ROPE, QWEN3_VISION, MARKS),
    "qwen3_vl_moe": (TEXT | ROPE | MOE, QWEN3_VISION, MARKS),
    "gemma3": (TEXT | {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}, OTHER_VISION,
               {"mm_tokens_per_image": 4, "image_token_index": 630}),
}  # fmt: skip
TOWERS = ("visual", "vision_tower", "multi_modal_projector")


def make(model_type: str) -> Any:
    torch.manual_seed(0)
    text, vision, others = FAMILIES[model_type]
    config_class: Any = transformers.CONFIG_MAPPING[model_type]
    config = config_class(text_config=text, vision_config=vision, **others)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1)
    return model.eval()


def write(model_type: str, tiny_model_path: Path, folder: Path) -> Any:
    make(model_type).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessorFast"}')
    return folder


def tower(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: weight
        for name, weight in model.state_dict().items()
        if any(part in TOWERS for part in name.split(".")) and ".lora_" not in name
    }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_rows_are_exact_and_the_tower_is_frozen(model_type: str, tmp_path: Path) -> None:
    make(model_type).save_pretrained(tmp_path)
    own, model = make(model_type), load_model(str(tmp_path), SFTConfig())
    policy = Policy(model, SFTConfig())
    trees = skewed_trees()
    logp, _ = policy.logprobs(pack(trees))
    torch.testing.assert_close(logp, padded_logprobs(own, trees), atol=5e-5, rtol=1e-5)
    logp.sum().backward()
    assert not any(weight.requires_grad for name, weight in policy.model.named_parameters() if name in tower(model))
    assert all(weight.grad is not None for weight in policy.trained_parameters)
    assert "frozen, as they came" in present(policy.frozen_note)


@pytest.mark.parametrize(("model_type", "lora"), [("qwen2_5_vl", False), ("qwen3_vl", True)])
def test_trainers_keep_every_bit_of_the_tower(
    model_type: str, lora: bool, tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = write(model_type, tiny_model_path, tmp_path / "base")
    peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
    sft = make_sft(folder, tmp_path / "sft", max_steps=2, learning_rate=1e-2, peft_config=peft_config)
    assert not any(part in name.split(".") for name in sft.policy.trained_names for part in TOWERS)
    sft.train()
    first, last = (entry["loss"] for entry in sft.state.log_history if "loss" in entry)
    assert last < first
    grpo = make_grpo(tmp_path / "sft" / "final", tmp_path / "grpo", max_steps=1, peft_config=peft_config)
    grpo.train()
    assert max(steps(grpo, "sampling/logp_gap")) < 1e-4
    before = AutoModelForImageTextToText.from_pretrained(folder)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "grpo" / "final")
    assert type(after) is type(before)
    assert tower(after).keys() == tower(before).keys() != set()
    assert all(torch.equal(weight, tower(before)[name]) for name, weight in tower(after).items())
    trained = [model.model.language_model.layers[0].mlp.up_proj.weight for model in (before, after)]
    assert not torch.equal(*trained)
    assert (tmp_path / "grpo" / "final" / "preprocessor_config.json").is_file()
    saved = json.loads((tmp_path / "grpo" / "final" / "config.json").read_text())
    assert saved["architectures"] == [type(before).__name__]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_stay_off_the_tower_when_the_user_excludes_modules_too(model_type: str) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["o_proj"])
    names = Policy(make(model_type), SFTConfig(), peft_config=config).trained_names
    assert any("q_proj" in name for name in names)
    assert not any(part in name.split(".") for name in names for part in (*TOWERS, "o_proj"))


def test_a_scalar_head_is_refused_with_a_short_message(tiny_model_path: Path, tmp_path: Path) -> None:
    folder = write("qwen3_vl", tiny_model_path, tmp_path)
    with pytest.raises(ModelError, match="no class with a scalar head for qwen3_vl") as fault:
        load_scalar_model(str(folder), SFTConfig())
    assert "Model type should be one of" not in str(fault.value)
