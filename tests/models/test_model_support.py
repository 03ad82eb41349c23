"""Test other decoder families: some run packed, some one sequence at a time, and others are refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rlqwen import SFTConfig
from rlqwen.config import ModelConfig
from rlqwen.errors import ModelError
from rlqwen.models.critic import ScalarModel
from rlqwen.models.policy import Policy
from rlqwen.packing.attention import packed_attention
from rlqwen.packing.attention_rules import CausalMask
from rlqwen.packing.batch import pack
from rlqwen.packing.forward import packs_prefixes
from rlqwen.packing.row_layout import Layout, Segment
from rlqwen.preflight.model_check import read_model
from tests.models.test_policy import SHAPE, padded_logprobs, skewed_trees
from tests.trainers.test_grpo import make_trainer as make_grpo
from tests.trainers.test_grpo import steps
from tests.trainers.test_sft import make_trainer as make_sft

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW: dict[str, Any] = {"sliding_window": 12}
MLA = {
    "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    }
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "Llama": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
              "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "Mistral without a window": ("mistral", {"sliding_window": None}),
    "Mistral with a window": ("mistral", WINDOW),
    "Ministral, windows by layer": ("ministral", WINDOW | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "Qwen3, windows by layer": ("qwen3", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "Gemma3": ("gemma3_text", WINDOW | {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}),
    "OLMo3": ("olmo3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "SmolLM3": ("smollm3", {}),
    "DeepSeek-V3, values narrower than keys": ("deepseek_v3", MLA),
    "Granite without scaled logits": ("granite", {"logits_scaling": 1.0, "residual_multiplier": 0.5}),
    "GPT-2, learned positions": ("gpt2", GPT2),
}  # fmt: skip

SEQUENTIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3, frequencies by the longest sequence": ("phi3", LONGROPE),
    "LFM2, convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma2": ("gemma2", {}, r"gemma2 caps attention scores \(attn_logit_softcapping=50.0\).*train this one with TRL"),
    "Gemma3 with a cap": ("gemma3_text", {"final_logit_softcapping": 30.0}, r"gemma3_text scales or caps its logits"),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 4}, "gpt_oss has attention sinks"),
    "Cohere": ("cohere", {}, r"cohere scales or caps its logits \(logit_scale=0.0625\)"),
    "Granite": ("granite", {"logits_scaling": 8.0}, r"granite scales or caps its logits \(logits_scaling=8.0\)"),
    "MiniCPM3": ("minicpm3", MLA | {"dim_model_base": 16}, "minicpm3 scales or caps its logits"),
    "Phi": ("phi", {}, "phi has a language-model head with a bias"),
    "StableLM, which drops arguments": ("stablelm", {}, "stablelm cannot forward packed rows"),
    "BLOOM, positions in a mask": ("bloom", {"n_head": 4}, r"bloom: .* differs from the model's own by 0\.\d+"),
    "Doge, a mask that it computes with": ("doge", {}, "doge cannot forward packed rows"),
    "Qwen3, bidirectional": (
        "qwen3",
        {"is_causal": False},
        "qwen3 masks its attention with bidirectional_mask_function",
    ),
    "BART": ("bart", {"d_model": 64, "decoder_layers": 1}, "bart masks its attention with bidirectional_mask_function"),
}


def make(model_type: str, *, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Return a random model whose logits differ widely, so that a wrong forward is noticed."""
    torch.manual_seed(0)
    known = transformers.CONFIG_MAPPING[model_type]()
    shape = {key: value for key, value in (SHAPE | SPECIAL).items() if hasattr(known, key)}
    model = auto.from_config(type(known)(**shape | options), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1)
    return model.eval()


def assert_same_as_alone(model: PreTrainedModel, policy_model: Any) -> None:
    policy = Policy(policy_model, SFTConfig(disable_dropout=True))
    trees = skewed_trees()  # sequences of up to 100 tokens, so that windows of 12 hide most of a prefix
    weights = torch.randn(pack(trees).num_targets)
    logp, _ = policy.logprobs(pack(trees))
    (logp @ weights).backward()
    expected = padded_logprobs(model, trees)
    (expected @ weights).backward()
    torch.testing.assert_close(logp, expected, atol=5e-5, rtol=1e-5)
    for (name, ours), theirs in zip(policy_model.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6, name


@pytest.mark.parametrize("family", PACKED)
def test_a_packed_row_equals_the_models_own_forward(family: str) -> None:
    model_type, options = PACKED[family]
    model = make(model_type, **options)
    assert packs_prefixes(model.config)
    assert_same_as_alone(model, copy.deepcopy(model))


def test_a_sliding_window_changes_the_logprobs() -> None:
    """Make sure that the comparisons of families with windows can fail."""
    with_window, without = make("mistral", **WINDOW), make("mistral", sliding_window=None)
    trees = skewed_trees()
    assert (padded_logprobs(with_window, trees) - padded_logprobs(without, trees)).abs().max() > 0.1


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_families_that_cannot_share_prefixes_run_one_sequence_at_a_time(family: str) -> None:
    model_type, options = SEQUENTIAL[family]
    model = make(model_type, **options)
    assert not packs_prefixes(model.config)
    policy = Policy(copy.deepcopy(model), SFTConfig())
    [note] = policy.notes
    assert note.startswith(model_type)
    assert note.endswith("sequences are forwarded one after another, each with its prompt again")
    tree = skewed_trees()[-1]
    torch.testing.assert_close(policy.logprobs(pack([tree]))[0], padded_logprobs(model, [tree]), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_families_are_refused_by_name(family: str) -> None:
    model_type, options, message = REFUSED[family]
    with pytest.raises(ModelError, match=message):
        Policy(make(model_type, **options), SFTConfig())


def test_references_and_reward_models_are_checked_like_policies() -> None:
    with pytest.raises(ModelError, match="logits_scaling"):
        Policy(make("llama"), SFTConfig(), reference=make("granite", logits_scaling=8.0))
    model = make("mistral", auto=AutoModelForSequenceClassification, num_labels=1, **WINDOW, pad_token_id=None)
    trees = skewed_trees()[:-1]
    scores = ScalarModel(copy.deepcopy(model), SFTConfig()).scores(pack(trees))
    rows = [tree.prefix + branch.token_ids for tree in trees for branch in tree.branches]
    alone = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    torch.testing.assert_close(scores, alone, atol=5e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="gemma2 caps attention scores"):
        ScalarModel(make("gemma2", auto=AutoModelForSequenceClassification, num_labels=1), SFTConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 50.0}, "gives its attention softcap=50.0"),
        ({"s_aux": torch.zeros(4)}, "gives its attention s_aux "),
        ({"position_bias": torch.zeros(1)}, "gives its attention position_bias"),
        ({"is_causal": False}, "attends to later tokens"),
        ({"sliding_window": 3}, "asks for sliding_window=3 with a mask of window None"),
        ({"attention_mask": None}, "attends with no mask"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, r"attends with a mask of its own \(Tensor\)"),
    ],
)
def test_an_argument_that_changes_attention_is_refused(arguments: dict[str, Any], message: str) -> None:
    states = torch.randn(1, 2, 4, 8)
    call: dict[str, Any] = {"attention_mask": CausalMask(None), "layout": Layout([Segment(0, 4)])}
    harmless: dict[str, Any] = {"softcap": None, "position_ids": torch.arange(4), "is_causal": True, "use_cache": False}
    packed_attention(torch.nn.Identity(), states, states, states, **call | harmless)
    with pytest.raises(ModelError, match=message):
        packed_attention(torch.nn.Identity(), states, states, states, **call | arguments)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of another family and the tiny tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    path = tmp_path_factory.mktemp(request.param)
    make(request.param, **shape | (WINDOW if request.param == "mistral" else {})).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("lora", [False, True])
def test_sft_and_grpo_train_other_families(folder: Path, tmp_path: Path, lora: bool) -> None:
    peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
    sft = make_sft(folder, tmp_path / "sft", max_steps=2, learning_rate=1e-3, peft_config=peft_config)
    sft.train()
    first, last = (entry["loss"] for entry in sft.state.log_history if "loss" in entry)
    assert last < first
    grpo = make_grpo(folder, tmp_path / "grpo", max_steps=2, peft_config=peft_config)
    grpo.train()
    assert (
        max(steps(grpo, "sampling/logp_gap")) < 1e-4
    )  # the model's own attention samples, and packed attention trains
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "grpo" / "final")
    torch.testing.assert_close(
        Policy(plain, SFTConfig()).logprobs(pack(skewed_trees()))[0],
        grpo.policy.logprobs(pack(skewed_trees()))[0],
        atol=5e-5,
        rtol=1e-5,
    )


def test_vllm_and_the_trainer_agree_on_sliding_windows(tiny_model_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "head_dim": 32,
        "eos_token_id": tokenizer.eos_token_id,
    }
    make("mistral", **shape, **WINDOW, pad_token_id=tokenizer.pad_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rollout = {"engine": "vllm", "num_workers": 1, "num_cpus_per_worker": 0.5}
    trainer = make_grpo(tmp_path, tmp_path / "run", max_completion_length=24, rollout=rollout)
    trainer.train()
    assert max(steps(trainer, "sync/canary_gap") + steps(trainer, "sampling/logp_gap")) < 1e-5


def test_check_refuses_a_family_without_loading_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    for file in tiny_model_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(ModelError, match="gemma2 caps attention scores"):
        read_model(ModelConfig(path=str(tmp_path)), tmp_path / "scratch")
