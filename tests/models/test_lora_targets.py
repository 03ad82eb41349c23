"""Test names of LoRA targets on mixtures of experts, delta-net layers and models with a vision tower."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)

from rlqwen import SFTConfig
from rlqwen.errors import ModelError
from rlqwen.models.adapters import add_adapter
from rlqwen.models.merged_weights import adapted_weight
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import pack
from tests.models.test_policy import CausalLM, make_model, padded_logprobs, skewed_trees

SHAPE: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 256,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 16,
    "num_position_embeddings": 16,
}  # fmt: skip
EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
ATTENTION = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
SHARED = {f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
DELTA = {
    "qwen3_next": {f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")},
    "qwen3_5_moe": {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")},
}  # fmt: skip


def moe(kind: str) -> CausalLM | Qwen3_5MoeForCausalLM | Qwen3_5MoeForConditionalGeneration:
    torch.manual_seed(0)
    if kind == "qwen3_5_moe":
        return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**SHAPE))
    if kind == "full":
        config = Qwen3_5MoeConfig(text_config=SHAPE, vision_config=VISION)
        return Qwen3_5MoeForConditionalGeneration(config)
    return make_model(kind)


def targets_of(model: PeftModel) -> set[str]:
    """Return what has adapters: the last two parts of each name, with the parameter's name if it is not `weight`."""
    found = set()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            parts = name.replace(".base_layer", "").split(".")[-2:]
            own = getattr(module, "parameter_name", "weight")
            found.add(".".join(parts if own == "weight" else [parts[-1], own]))
    return found


def adapted(kind: str, targets: list[str] | str, **options: Any) -> tuple[set[str], list[str]]:
    model, notes = add_adapter(moe(kind), LoraConfig(r=2, target_modules=targets, **options))
    return targets_of(model), notes


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_target_names_match_experts_shared_experts_and_routers(kind: str) -> None:
    shared = set() if kind == "qwen3_moe" else SHARED
    assert adapted(kind, ["gate_proj", "up_proj", "down_proj"]) == (EXPERTS | shared, [])
    assert adapted(kind, "experts") == (EXPERTS, [])
    assert adapted(kind, ["mlp.experts.down_proj", "q_proj"]) == ({"experts.down_proj", "self_attn.q_proj"}, [])
    assert adapted(kind, ["mlp.gate"]) == ({"mlp.gate"}, [])
    assert adapted(kind, r".*\.(q_proj|mlp\.gate)") == ({"self_attn.q_proj", "mlp.gate"}, [])
    both, notes = adapted(kind, ["up_proj"])
    assert both == {"experts.gate_up_proj"} | (shared & {"shared_expert.up_proj"})
    assert "one weight" in notes[0]
    if shared:
        assert adapted(kind, ["shared_expert.up_proj"]) == ({"shared_expert.up_proj"}, [])
        for name in DELTA[kind]:
            assert adapted(kind, [name.rpartition(".")[2]]) == ({name}, [])


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_all_linear_leaves_out_experts_with_a_note(kind: str) -> None:
    linear = ATTENTION | DELTA.get(kind, set())
    linear |= set() if kind == "qwen3_moe" else SHARED | {"mlp.shared_expert_gate"}
    found, notes = adapted(kind, "all-linear")
    assert found == linear
    assert "leaves out experts" in notes[0]
    assert "[all-linear, experts]" in notes[0]
    assert adapted(kind, ["all-linear", "experts"]) == (linear | EXPERTS, [])
    assert adapted(kind, "all-linear", target_parameters=["experts.down_proj"])[0] == linear | {"experts.down_proj"}


def test_a_vision_tower_gets_no_adapter() -> None:
    for targets in ("all-linear", ["qkv", "q_proj"], ["all-linear", "experts"]):
        if "qkv" in targets:
            with pytest.raises(ModelError, match="'qkv' is part of the vision tower"):
                adapted("full", targets)
            continue
        model, _ = add_adapter(moe("full"), LoraConfig(r=2, target_modules=targets))
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert any(".linear_attn." in name for name in names)
        assert not any("visual" in name for name in names)
        assert any(".experts." in name for name in names) == (targets != "all-linear")


def test_layers_and_exclusions_apply_to_experts_too() -> None:
    model, _ = add_adapter(moe("qwen3_moe"), LoraConfig(r=2, target_modules=["experts"], layers_to_transform=[1]))
    assert {name.split("layers.")[1][0] for name, weight in model.named_parameters() if weight.requires_grad} == {"1"}
    found, _ = adapted("qwen3_5_moe", ["down_proj", "q_proj"], exclude_modules=["experts"])
    assert found == {"shared_expert.down_proj", "self_attn.q_proj"}


@pytest.mark.parametrize(
    ("kind", "targets", "nearest"),
    [
        ("qwen3", ["q_proj", "gate_prj"], "'gate_prj' .* did you mean gate_proj"),
        ("qwen3", ["experts"], "'experts' matches nothing .* there are down_proj"),
        ("qwen3_moe", ["expert"], "did you mean experts"),
        ("qwen3_5_moe", ["in_proj_qkvz"], "did you mean in_proj_qkv"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_with_suggestions(kind: str, targets: list[str], nearest: str) -> None:
    with pytest.raises(ModelError, match=nearest):
        adapted(kind, targets)


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_options_that_fused_weights_do_not_support_are_refused(option: dict[str, Any]) -> None:
    name = next(iter(option))
    with pytest.raises(ModelError, match=f"{name}=.*experts.down_proj, experts.gate_up_proj"):
        adapted("qwen3_moe", ["experts"], **option)
    adapted("qwen3_moe", ["q_proj"], **option)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_the_merged_model_equals_the_adapter_loaded_by_peft(kind: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["all-linear", "experts", "gate"], init_lora_weights=False)
    policy = Policy(moe(kind), SFTConfig(), peft_config=lora)
    expected, _ = policy.logprobs(pack(skewed_trees()))
    with torch.no_grad():
        assert (padded_logprobs(moe(kind), skewed_trees()) - expected).abs().max() > 0.01
        policy.save(tmp_path / "merged")
        policy.save_adapter(tmp_path / "adapter")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        loaded = PeftModel.from_pretrained(moe(kind), tmp_path / "adapter").eval()
        for model in (merged, loaded):
            torch.testing.assert_close(padded_logprobs(model, skewed_trees()), expected, atol=2e-5, rtol=1e-5)


def test_a_merged_expert_is_rounded_once() -> None:
    lora = LoraConfig(r=2, target_modules=["experts"], init_lora_weights=False)
    policy = Policy(moe("qwen3_moe").bfloat16(), SFTConfig(bf16=False), peft_config=lora)
    experts = policy.base_model.model.layers[0].mlp.experts
    layer = experts if experts.parameter_name == "down_proj" else experts.base_layer
    base = layer.get_base_layer().down_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for expert in range(4):  # in PEFT, A holds one block of rows per expert, and B interleaves their columns
        delta = up[:, expert::4] @ down[2 * expert : 2 * expert + 2] * layer.scaling["default"]
        torch.testing.assert_close(adapted_weight(layer)[expert], base[expert].float() + delta, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["out_proj", "conv1d"]}, {"target_parameters": ["conv1d.weight"]}]
)
def test_an_adapter_on_the_convolution_of_a_delta_net_is_refused(options: dict[str, Any]) -> None:
    """Refuse it because the layer reads the weight and does not call the module: the adapter would get no gradient, and
    the merged weight would differ from the one in the forward."""
    defaults: dict[str, Any] = {"target_modules": ["out_proj"]}
    config = LoraConfig(**defaults | options)
    with pytest.raises(ModelError, match=r"linear_attn\.conv1d: .* would have no effect; leave conv1d out"):
        Policy(make_model("qwen3_next"), SFTConfig(), peft_config=config)
    model = get_peft_model(make_model("qwen3_next"), config) if "target_parameters" in options else None
    if model is not None:
        with pytest.raises(ModelError, match="would have no effect"):
            Policy(model, SFTConfig())
