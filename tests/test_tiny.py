"""The built-in tiny model: its tokenizer, its files, and that building it disturbs nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlqwen.errors import ConfigError, ModelError
from rlqwen.tiny import build_tiny_qwen3, resolve_model_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("tiny") / "model", seed=3)


def test_it_loads_as_a_qwen3_of_about_a_million_parameters(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert 800_000 < model.num_parameters() < 1_200_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) <= model.config.vocab_size < 600
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == [end_of_turn, end_of_text]
    assert model.generation_config.pad_token_id == end_of_text == tokenizer.pad_token_id
    assert tokenizer.eos_token_id == end_of_turn == model.config.eos_token_id


def test_a_sum_takes_few_tokens_and_any_text_survives(folder):
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


def test_think_tags_are_tokens_that_decoding_keeps(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<think>1</think><|im_end|>")["input_ids"]
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>1</think>"


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_random_state_alone(folder, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    again = build_tiny_qwen3(tmp_path / "again", seed=3)
    assert torch.equal(torch.rand(3), expected)
    other = build_tiny_qwen3(tmp_path / "other", seed=4)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (folder / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def test_shape_options_reach_the_model(tmp_path):
    path = build_tiny_qwen3(tmp_path, model_type="qwen2", num_layers=1, tie_word_embeddings=False, max_length=256)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.model_type == "qwen2"
    assert model.config.num_hidden_layers == 1
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(path).model_max_length == model.config.max_position_embeddings == 256


def test_resolving_builds_once_per_set_of_arguments(tmp_path):
    first = resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layers=1)
    stamp = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layers=1) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == stamp
    assert resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layers=1, seed=1) != first
    assert len(list(tmp_path.iterdir())) == 2
    assert resolve_model_path("Qwen/Qwen3-0.6B", tmp_path) == "Qwen/Qwen3-0.6B"


def test_wrong_names_and_options_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"builtin:tiny-gpt.*builtin:tiny-qwen3"):
        resolve_model_path("builtin:tiny-gpt", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        resolve_model_path("builtin:tiny-qwen3", tmp_path, num_layer=1)
    with pytest.raises(ConfigError, match="num_heads=3 must be a multiple of num_kv_heads=2"):
        build_tiny_qwen3(tmp_path, num_heads=3)
    assert not list(tmp_path.iterdir())
