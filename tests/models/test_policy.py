"""Test the policy: packed logprobs and gradients, references, export, saving and loading."""

import copy
import random
import warnings
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from rlqwen.config import SFTConfig
from rlqwen.errors import ModelError
from rlqwen.models.loading import load_model
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, Tree, pack
from rlqwen.packing.forward import packs_prefixes
from tests.narrowing import present

SHAPE = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
QWEN3: dict[str, Any] = SHAPE | {"head_dim": 32}


CausalLM = Qwen2ForCausalLM | Qwen3MoeForCausalLM | Qwen3NextForCausalLM | Qwen3ForCausalLM
Model = TypeVar("Model", bound=PreTrainedModel)


def make_model(kind: str = "qwen3", **options: Any) -> CausalLM:
    torch.manual_seed(0)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE | options))
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3 | experts | options))
    if kind == "qwen3_next":
        linear: dict[str, Any] = {
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        }  # fmt: skip
        return with_memory(Qwen3NextForCausalLM(Qwen3NextConfig(**QWEN3 | linear | options)))
    return Qwen3ForCausalLM(Qwen3Config(**QWEN3 | options))


def with_memory(model: Model) -> Model:
    """Make delta-net layers forget slowly: with random decay rates they forget in one token, and no test covers the state."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-6, -2)
    return model


def skewed_trees(seed: int = 0) -> list[Tree]:
    """Return prompts and completions of many lengths, with an empty completion and a sequence without prompt."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(120) for _ in range(count)]

    trees = [Tree(tokens(rng.randint(1, 40)), [Branch(tokens(rng.randint(1, 60))) for _ in range(4)]) for _ in range(3)]
    trees[0].branches.append(Branch([]))
    return [*trees, Tree([], [Branch(tokens(30), loss_mask=[rng.random() < 0.5 for _ in range(30)])])]


def padded_logprobs(model: PreTrainedModel | PeftModel, trees: list[Tree], temperature: float = 1.0) -> torch.Tensor:
    """Return (N,) logprobs of the same targets from a right-padded batch in which each sequence has its own prefix."""
    rows = [(tree.prefix, branch) for tree in trees for branch in tree.branches if branch.token_ids]
    width = max(len(prefix) + len(branch.token_ids) for prefix, branch in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (prefix, branch) in enumerate(rows):
        sequence = prefix + branch.token_ids
        ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.tensor(sequence), 1
    log_probs = (model(input_ids=ids, attention_mask=mask).logits.float() / temperature).log_softmax(-1)
    kept = []
    for row, (prefix, branch) in enumerate(rows):
        for i, token in enumerate(branch.token_ids):
            place = len(prefix) + i
            if place > 0 and (branch.loss_mask is None or branch.loss_mask[i]):
                kept.append(log_probs[row, place - 1, token])
    return torch.stack(kept)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(kind: str, checkpointing: bool) -> None:
    model = make_model(kind)
    plain = copy.deepcopy(model)
    policy = Policy(model, SFTConfig(gradient_checkpointing=checkpointing))
    assert packs_prefixes(policy.base_model.config)
    trees = skewed_trees()
    weights = torch.randn(pack(trees).num_targets)

    logp, _ = policy.logprobs(pack(trees), temperature=0.8)
    (logp @ weights).backward()
    expected = padded_logprobs(plain, trees, temperature=0.8)
    (expected @ weights).backward()

    torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            continue
        gap = (present(ours.grad) - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
        assert gap < 1e-4, name


@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens"], ["lm_head"]])
def test_packed_equals_padded_with_lora(modules_to_save: list[str] | None) -> None:
    model = make_model(tie_word_embeddings=False)
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=modules_to_save, init_lora_weights=False)
    policy = Policy(model, SFTConfig(), peft_config=lora, reference=True)
    if modules_to_save:
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    trees = skewed_trees()
    logp, _ = policy.logprobs(pack(trees))
    logp.sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.requires_grad}
    policy.model.zero_grad()
    with policy.generation_model() as plain, torch.enable_grad():
        expected = padded_logprobs(plain, trees)
        expected.sum().backward()
    torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-5)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, name


def test_the_lora_reference_is_the_model_without_adapter_and_export_changes_no_weight() -> None:
    model = make_model()
    start = copy.deepcopy(model)
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"], init_lora_weights=False)
    # PEFT warns that saving unties tied embeddings; this test checks only the export.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = Policy(model, SFTConfig(), peft_config=lora, reference=True)
    trees = skewed_trees()
    batch = pack(trees)
    adapted, _ = policy.logprobs(batch)
    torch.testing.assert_close(policy.reference_logprobs(batch), padded_logprobs(start, trees), atol=2e-5, rtol=1e-5)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}

    exported = dict(policy.export_weights())
    assert exported.keys() == start.state_dict().keys()
    merged = copy.deepcopy(start)
    merged.load_state_dict(exported)
    torch.testing.assert_close(padded_logprobs(merged, trees), adapted, atol=5e-5, rtol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items())


def test_the_reference_does_not_change_with_the_policy() -> None:
    policy = Policy(make_model(), SFTConfig(), reference=True)
    batch = pack(skewed_trees())
    before = policy.reference_logprobs(batch)
    with torch.no_grad():
        for parameter in policy.trained_parameters:
            parameter.mul_(1.1)
    torch.testing.assert_close(policy.reference_logprobs(batch), before)
    assert (policy.logprobs(batch)[0] - before).abs().max() > 1e-3
    policy.refresh_reference(alpha=1.0)
    torch.testing.assert_close(policy.reference_logprobs(batch), policy.logprobs(batch)[0].detach())


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_next"])
def test_a_reference_in_half_precision_rounds_only_what_autocast_rounds(kind: str) -> None:
    """Rounding the rotary embedding would shift the positions of far tokens, and rounding decay rates would change how
    states decay."""
    policy = Policy(make_model(kind), SFTConfig(bf16=True), reference=True)
    reference = present(policy._reference).model
    assert all(ours.equal(theirs) for ours, theirs in zip(policy.model.buffers(), reference.buffers(), strict=True))
    for ours, theirs in zip(policy.model.parameters(), reference.parameters(), strict=True):
        assert theirs.equal(ours if ours.ndim == 1 else ours.bfloat16())
    batch = pack([Tree([i % 50 for i in range(200)], [Branch([7, 8, 9])])])
    with torch.no_grad():
        gap = policy.logprobs(batch)[0] - policy.reference_logprobs(batch)
    assert gap.abs().max() < 0.05


def test_a_tied_head_is_exported_too() -> None:
    exported = dict(Policy(make_model(tie_word_embeddings=True), SFTConfig()).export_weights())
    assert torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])


def test_experts_are_exported_under_checkpoint_names() -> None:
    names = {name for name, _ in Policy(make_model("qwen3_moe"), SFTConfig()).export_weights()}
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)


def test_trained_weights_are_float32_and_frozen_ones_keep_their_dtype() -> None:
    lora = LoraConfig(r=2, target_modules="all-linear")
    policy = Policy(make_model().bfloat16(), SFTConfig(bf16=True), peft_config=lora)
    dtypes = {p.requires_grad: p.dtype for p in policy.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    logp, _ = policy.logprobs(pack(skewed_trees()))
    logp.sum().backward()
    assert logp.dtype is torch.float32


@pytest.mark.parametrize("adapter", [False, True])
def test_a_saved_folder_loads_and_is_restored(tmp_path: Path, adapter: bool) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if adapter else None
    policy = Policy(make_model(), SFTConfig(), peft_config=lora)
    batch = pack(skewed_trees())
    logp = policy.logprobs(batch)[0].detach()
    policy.save(tmp_path / "model")
    if adapter:
        policy.save_adapter(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(padded_logprobs(loaded, skewed_trees()), logp, atol=5e-5, rtol=1e-4)
    with torch.no_grad():
        for parameter in policy.trained_parameters:
            parameter.mul_(1.3)
    policy.load_checkpoint(tmp_path / ("adapter" if adapter else "model"))
    torch.testing.assert_close(policy.logprobs(batch)[0], logp)


def test_a_folder_without_weights_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path), SFTConfig())
