"""Compare packed, exported and saved adapters of every kind with PEFT's own forward; the base must not change."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlqwen.config import LoraSettings, SFTConfig
from rlqwen.errors import ConfigError, ModelError
from rlqwen.models.adapters import lora_config
from rlqwen.models.merged_weights import checkpoint_weights
from rlqwen.models.policy import Policy
from rlqwen.models.weight_files import write_model
from rlqwen.packing.batch import pack
from rlqwen.rollout.weight_sync import ExpectedWeights
from tests.models.test_policy import make_model, padded_logprobs, skewed_trees

ALL = "all-linear"
PROJECTIONS_AND_ENDS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "dora": {"target_modules": ALL, "use_dora": True},
    "lora on embedding and head": {"target_modules": PROJECTIONS_AND_ENDS},
    "dora on embedding and head": {"target_modules": PROJECTIONS_AND_ENDS, "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"up_proj": 3}, "exclude_modules": ["lm_head"],
    },
    "full embedding": {"target_modules": ALL, "modules_to_save": ["embed_tokens"]},
    "full head with dora": {"target_modules": ALL, "modules_to_save": ["lm_head"], "use_dora": True},
    "rows of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 110]},
    "rows of both ends": {
        "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [4, 110]},
    },
}  # fmt: skip


def adapted(kind: str, *, tied: bool = False, model_kind: str = "qwen3", **options: Any) -> Policy:
    """Return a policy with a nonzero adapter and changed fully trained modules."""
    defaults = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    config = LoraConfig(**defaults | ADAPTERS[kind] | options)
    policy = Policy(make_model(model_kind, tie_word_embeddings=tied), SFTConfig(), peft_config=config, reference=True)
    shake(policy)
    return policy


def shake(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trained_parameters:
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))


def plain_logprobs(policy: Policy) -> Tensor:
    """Return (N,) logprobs of PEFT's own forward on padded rows with ordinary attention."""
    with policy.generation_model() as model:
        return padded_logprobs(model, skewed_trees())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_packed_and_merged_logprobs_equal_those_of_peft(kind: str) -> None:
    policy = adapted(kind)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    expected = plain_logprobs(policy)
    torch.testing.assert_close(policy.logprobs(pack(skewed_trees()))[0], expected, atol=2e-5, rtol=1e-5)

    start = make_model()
    exported = dict(policy.export_weights())
    assert exported.keys() == start.state_dict().keys()
    assert (padded_logprobs(start, skewed_trees()) - expected).abs().max() > 0.01
    start.load_state_dict(exported)
    torch.testing.assert_close(padded_logprobs(start, skewed_trees()), expected, atol=2e-5, rtol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("dora", False), ("dora on embedding and head", False), ("rows of the embedding", True),
        ("rows of both ends", False),
    ],
)  # fmt: skip
def test_gradients_equal_those_of_peft(kind: str, tied: bool) -> None:
    policy = adapted(kind, tied=tied)
    weights = torch.randn(pack(skewed_trees()).num_targets)
    (policy.logprobs(pack(skewed_trees()))[0] @ weights).backward()
    ours = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.requires_grad}
    policy.model.zero_grad()
    with policy.generation_model() as plain, torch.enable_grad():
        (padded_logprobs(plain, skewed_trees()) @ weights).backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_saved_models_and_adapters_load_with_the_same_logprobs(tmp_path: Path, kind: str) -> None:
    policy = adapted(kind)
    expected = plain_logprobs(policy)
    policy.save(tmp_path / "merged")
    policy.save_adapter(tmp_path / "adapter")
    policy.save(tmp_path / "base", adapter=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(padded_logprobs(merged, skewed_trees()), expected, atol=2e-5, rtol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(tensor, make_model().state_dict()[name]) for name, tensor in base.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(padded_logprobs(loaded, skewed_trees()), expected, atol=2e-5, rtol=1e-5)
    shake(policy)
    assert (plain_logprobs(policy) - expected).abs().max() > 1e-3
    policy.load_checkpoint(tmp_path / "adapter")
    torch.testing.assert_close(plain_logprobs(policy), expected)


@pytest.mark.parametrize(
    "trained",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 7]},
        {"trainable_token_indices": {"embed_tokens": [3, 7]}, "ensure_weight_tying": True},
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
    ],
)
def test_a_tied_head_stays_tied_to_a_trained_embedding(tmp_path: Path, trained: dict[str, Any]) -> None:
    policy = adapted("lora", tied=True, **trained)
    start = make_model(tie_word_embeddings=True)
    assert not torch.equal(dict(policy.export_weights())["lm_head.weight"], start.lm_head.weight)
    expected = plain_logprobs(policy)
    torch.testing.assert_close(policy.logprobs(pack(skewed_trees()))[0], expected, atol=2e-5, rtol=1e-5)
    exported = dict(policy.export_weights())
    assert torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    start.save_pretrained(tmp_path / "start")
    shapes = {name: tuple(tensor.shape) for name, tensor in exported.items()}
    assert ExpectedWeights(str(tmp_path / "start")).check(shapes) == {"lm_head.weight": "model.embed_tokens.weight"}
    if "trainable_token_indices" in trained:
        changed = (exported["lm_head.weight"] != start.lm_head.weight).any(1).nonzero().flatten()
        assert changed.tolist() == [3, 7]
    torch.testing.assert_close(
        policy.reference_logprobs(pack(skewed_trees())), padded_logprobs(start, skewed_trees()), atol=2e-5, rtol=1e-5
    )
    policy.save(tmp_path / "merged")
    policy.save_adapter(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(padded_logprobs(merged, skewed_trees()), expected, atol=2e-5, rtol=1e-5)
    shake(policy)
    policy.load_checkpoint(tmp_path / "adapter")
    torch.testing.assert_close(plain_logprobs(policy), expected)


def test_adapters_on_fused_experts_are_trained_and_merged(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    policy = Policy(make_model("qwen3_moe"), SFTConfig(), peft_config=config)
    expected = plain_logprobs(policy)
    torch.testing.assert_close(policy.logprobs(pack(skewed_trees()))[0], expected, atol=2e-5, rtol=1e-5)
    policy.save(tmp_path)
    assert (padded_logprobs(make_model("qwen3_moe"), skewed_trees()) - expected).abs().max() > 0.01
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(padded_logprobs(merged, skewed_trees()), expected, atol=2e-5, rtol=1e-5)


def test_a_merged_weight_is_rounded_once() -> None:
    """Add base and delta in float32, and round only the sum to the dtype of the base."""
    policy = Policy(
        make_model().bfloat16(),
        SFTConfig(bf16=False),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    layer = policy.base_model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(dict(policy.export_weights())[name], expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def test_a_model_written_in_several_files_loads(tmp_path: Path) -> None:
    policy = adapted("lora")
    weights = checkpoint_weights(policy.base_model, dtype=torch.bfloat16)
    num_bytes = write_model(tmp_path, policy.base_model, weights, max_shard_bytes=40_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert num_bytes == 2 * sum(parameter.numel() for parameter in make_model().parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype is torch.bfloat16
    exported = dict(policy.export_weights())
    assert all(torch.equal(tensor, exported[name].bfloat16()) for name, tensor in loaded.state_dict().items())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_adapters_that_cannot_be_trained_or_merged_are_refused() -> None:
    with pytest.raises(ModelError, match="put embed_tokens into modules_to_save"):
        adapted("lora on embedding and head", tied=True)
    with pytest.raises(ModelError, match=r"q_proj: .*lora_bias has no merged weights"):
        Policy(make_model(), SFTConfig(), peft_config=LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ModelError, match="changes the base weights"):
        adapted("lora", init_lora_weights="pissa")
    with pytest.raises(ModelError, match="trains LoRA, rsLoRA and DoRA adapters, not IA3Config"):
        Policy(make_model(), SFTConfig(), peft_config=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ModelError, match=r"no_such.*matches nothing.*there are down_proj"):
        Policy(make_model(), SFTConfig(), peft_config=LoraConfig(target_modules=["no_such"]))
    with pytest.raises(ModelError, match="bias='all' trains biases"):
        adapted("lora", bias="all")
    untied = get_peft_model(make_model(tie_word_embeddings=True), LoraConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ModelError, match="ensure_weight_tying=True"):
        Policy(untied, SFTConfig())
    with pytest.raises(ModelError, match="has an adapter already"):
        Policy(untied, SFTConfig(), peft_config=LoraConfig())


class UnknownWrapper(AuxiliaryTrainingWrapper):
    """Stand in for a wrapper that a later PEFT may add."""

    def init_modules(self, adapter_name: Any, **kwargs: Any) -> None:
        self.inner = self.original_module

    def _get_available_adapters(self) -> Any:
        return set(self._adapters)

    def _forward_wrapped(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x, *args, **kwargs)


def test_an_unknown_wrapper_is_refused_before_training_and_when_saving(tmp_path: Path) -> None:
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    inner: Any = model.get_base_model()
    wrap: Any = UnknownWrapper  # its constructor has no annotations
    inner.lm_head = wrap(make_model().lm_head, "default")
    with pytest.raises(ModelError, match="lm_head is wrapped in PEFT's UnknownWrapper"):
        Policy(model, SFTConfig())
    policy = adapted("lora")
    policy.base_model.model.norm = wrap(policy.base_model.model.norm, "default")
    with pytest.raises(ModelError, match=r"'model\.norm\..*' is to be saved, and Qwen3ForCausalLM has no such weight"):
        policy.save(tmp_path / "inner")
    assert not list((tmp_path / "inner").glob("*.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, weight: [] if "norm" in name else [(name, weight)], "the weights to save lack"),
        (lambda name, weight: [(name, weight[:1])], "is to be saved as"),
        (lambda name, weight: [(name, weight), (f"{name}.twice", weight)], "has no such weight"),
    ],
)
def test_every_save_checks_names_and_shapes(
    tmp_path: Path, change: Callable[[str, Tensor], list[tuple[str, Tensor]]], message: str
) -> None:
    model = make_model("qwen3_moe")
    weights = [entry for named in checkpoint_weights(model) for entry in change(*named)]
    with pytest.raises(ModelError, match=message):
        write_model(tmp_path, model, weights)


def test_token_rows_trained_on_only_one_side_of_a_tied_embedding_are_refused() -> None:
    with pytest.raises(ModelError, match="trainable_token_indices would make them two"):
        adapted("lora", tied=True, trainable_token_indices={"lm_head": [3]})
    with pytest.raises(ModelError, match="trainable_token_indices would make them two"):
        adapted("lora", tied=True, trainable_token_indices={"embed_tokens": [3], "lm_head": [4]})


def test_pissa_is_merged_with_the_residual_base_weights() -> None:
    start = make_model()
    policy = Policy(
        copy.deepcopy(start), SFTConfig(), peft_config=LoraConfig(target_modules=ALL, init_lora_weights="pissa")
    )
    with policy.model.disable_adapter():
        residual = dict(policy.export_weights())["model.layers.0.mlp.up_proj.weight"]
    assert (residual - start.model.layers[0].mlp.up_proj.weight).abs().max() > 1e-3
    for name, tensor in policy.export_weights():
        torch.testing.assert_close(tensor, start.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_lora_settings_of_a_recipe_become_pefts_config() -> None:
    settings = LoraSettings(
        r=8, use_dora=True, use_rslora=True, target_modules=["q_proj"], layers_to_transform=[0], modules_to_save=["x"],
        exclude_modules=["lm_head"], rank_pattern={"q_proj": 2}, init_lora_weights="gaussian",
    )  # fmt: skip
    config = lora_config(settings)
    assert (config.lora_alpha, config.use_dora, config.use_rslora, config.task_type) == (16, True, True, "CAUSAL_LM")
    assert (config.layers_to_transform, config.modules_to_save, config.rank_pattern) == ([0], ["x"], {"q_proj": 2})
    with pytest.raises(ConfigError, match="needs target_modules as a list"):
        LoraSettings.parse({"layers_to_transform": 1})
