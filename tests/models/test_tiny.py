"""Test the built-in tiny models: tokenizer, files, and that building one has no side effects."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.tiny import BUILTIN_MODELS, build_tiny_qwen3, read_trl_template, resolve_model_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("tiny") / "model", seed=3)


def test_tiny_qwen3_loads_with_about_a_million_parameters(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert 800_000 < model.num_parameters() < 1_200_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) <= model.config.vocab_size < 600
    end_of_turn, end_of_text = map(tokenizer.convert_tokens_to_ids, ["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == [end_of_turn, end_of_text]
    assert model.generation_config.pad_token_id == end_of_text == tokenizer.pad_token_id
    assert tokenizer.eos_token_id == end_of_turn == model.config.eos_token_id


def test_arithmetic_takes_few_tokens_and_any_text_round_trips(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "12 + 34 = ?"}, {"role": "assistant", "content": "\\boxed{46}"}]
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n12 + 34 = ?<|im_end|>\n<|im_start|>assistant\n"
    question = ["1", "2", "Ġ+", "Ġ", "3", "4", "Ġ=", "Ġ?"]
    assert tokenizer.tokenize(text) == [
        *("<|im_start|>", "user", "Ċ", *question, "<|im_end|>", "Ċ"),
        *("<|im_start|>", "assistant", "Ċ"),
    ]
    assert tokenizer.tokenize("\n\n\\boxed{46}") == ["ĊĊ", "\\boxed", "{", "4", "6", "}"]
    strange = "héllo 世界 𝕏\t\r\n{}<|not a token|>"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_think_tags_are_kept_by_decoding(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<think>1</think><|im_end|>")["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>"


def test_the_same_seed_gives_the_same_bytes_and_keeps_the_rng_state(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    again = build_tiny_qwen3(tmp_path / "again", seed=3)
    assert torch.equal(torch.rand(3), expected)
    other = build_tiny_qwen3(tmp_path / "other", seed=4)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (folder / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def test_shape_options_reach_the_model(tmp_path: Path) -> None:
    path = build_tiny_qwen3(tmp_path, model_type="qwen2", num_layers=1, tie_word_embeddings=False, max_length=256)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.model_type == "qwen2"
    assert model.config.num_hidden_layers == 1
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(path).model_max_length == model.config.max_position_embeddings == 256


def shapes_on_disk(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)


RECENT = [name for name in BUILTIN_MODELS if "3.5" in name or "next" in name]
MTP = [
    *(f"mtp.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mtp.{name}.weight" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")),
    *(f"mtp.layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
]


@pytest.mark.parametrize("name", RECENT)
def test_recent_families_have_the_structure_of_real_checkpoints(name: str, tmp_path: Path) -> None:
    folder = Path(resolve_model_path(f"builtin:{name}", tmp_path))
    shapes = shapes_on_disk(folder)
    has_vision, has_experts = "3.5" in name and "text" not in name, "moe" in name or "next" in name
    layers = "model.language_model.layers" if has_vision else "model.layers"
    expert = f"{layers}.0.mlp.experts.{'0.gate_proj.weight' if 'next' in name else 'gate_up_proj'}"
    dense = f"{layers}.0.mlp.gate_proj.weight"
    assert (expert in shapes, dense in shapes) == (has_experts, not has_experts)
    has_mtp = has_vision or "next" in name
    assert {key for key in shapes if key.startswith("mtp.") and "mlp" not in key} == (set(MTP) if has_mtp else set())
    assert any("visual" in key for key in shapes) == has_vision == (folder / "preprocessor_config.json").is_file()
    if has_mtp:
        mlp = {key.replace(f"{layers}.3.", "mtp.layers.0."): shapes[key] for key in shapes if f"{layers}.3.mlp" in key}
        assert mlp == {key: shape for key, shape in shapes.items() if "mtp" in key and "mlp" in key}
        assert shapes["mtp.fc.weight"] == [128, 256]

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    assert 800_000 < model.num_parameters() < 1_600_000
    config = model.config
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    attention = model.model.layers[3].self_attn
    assert attention.q_proj.out_features == 2 * attention.o_proj.in_features, "q_proj holds queries and gates"
    assert config.linear_num_value_heads > config.linear_num_key_heads > 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == read_trl_template("qwen3_5_think" if "3.5" in name else "qwen3_instruct_2507")
    assert tokenizer.tokenize("12\\boxed") == ["1", "2", "\\boxed"]
    if has_vision:
        loaded = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        whole, info = loaded
        assert not any(info.values())
        assert whole.config.vision_config.out_hidden_size == config.hidden_size
        token = tokenizer.convert_ids_to_tokens(whole.config.image_token_id)
        assert (token, whole.config.text_config.mtp_num_hidden_layers) == ("<|image_pad|>", 1)


def test_building_a_checkpoint_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    small = {"model_type": "qwen3_5_moe", "num_layers": 2, "hidden_size": 64, "num_experts": 2}
    first, again, other = (build_tiny_qwen3(tmp_path / str(i), seed=i // 2, **small) for i in range(3))
    assert torch.equal(torch.rand(3), expected)
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (first, again, other)]
    assert files[0] == files[1]
    assert [name for name in files[0] if files[0][name] != files[2][name]] == ["model.safetensors"]
    kinds = json.loads((first / "config.json").read_text())["text_config"]["layer_types"]
    assert kinds == ["linear_attention", "full_attention"]


def test_any_chat_template_of_qwen_can_be_chosen(tmp_path: Path) -> None:
    build_tiny_qwen3(tmp_path, num_layers=1, chat_template="qwen3_8")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == read_trl_template("qwen3_8")


def test_resolving_builds_once_per_set_of_arguments(tmp_path: Path) -> None:
    first = resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layers=1)
    stamp = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layers=1) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == stamp
    assert resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layers=1, seed=1) != first
    assert len(list(tmp_path.iterdir())) == 2
    assert resolve_model_path("Qwen/Qwen3-0.6B", tmp_path) == "Qwen/Qwen3-0.6B"


def test_wrong_names_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"builtin:tiny-gpt.*builtin:tiny-qwen3"):
        resolve_model_path("builtin:tiny-gpt", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layer=1)
    with pytest.raises(ConfigError, match="num_heads=3 must be a multiple of num_kv_heads=2"):
        build_tiny_qwen3(tmp_path, num_heads=3)
    for wrong, message in (
        ({"num_experts": 4}, "num_experts=4 has no meaning in a qwen3 model"),
        ({"linear_head_dim": 128}, "linear_head_dim=128 has no meaning in a qwen3 model"),
        ({"model_type": "qwen3_5", "num_layers": 1}, "num_layers of at least 2"),
        ({"model_type": "qwen3_5", "linear_num_value_heads": 3}, "must be a multiple of linear_num_key_heads=2"),
        ({"chat_template": "llama3"}, "chat_template"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_tiny_qwen3(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
