"""Compare packed rows through delta-net layers with one sequence at a time through transformers' own layers."""

import copy
import importlib
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from rlqwen.config import SFTConfig
from rlqwen.errors import ModelError
from rlqwen.models.policy import Policy
from rlqwen.packing import delta_net
from rlqwen.packing.batch import Branch, PackedBatch, Tree, idle_batch, pack
from rlqwen.packing.delta_plan import DeltaPlan
from rlqwen.packing.forward import _sequential, packing_obstacle, packs_prefixes
from rlqwen.packing.row_layout import ROOT
from tests.models.test_policy import make_model, skewed_trees, with_memory
from tests.narrowing import present
from tests.packing.deep_trees import deep_trees

TEXT = {
    "vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 8, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}  # fmt: skip
DENSE: dict[str, Any] = TEXT | {"intermediate_size": 64}
EXPERTS: dict[str, Any] = TEXT | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
    "num_position_embeddings": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
KINDS = ["qwen3_5", "qwen3_5_moe", "qwen3_next", "full", "full_moe"]


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "qwen3_next":
        return make_model(kind)
    if kind == "qwen3_5":
        return with_memory(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**DENSE)))
    if kind == "qwen3_5_moe":
        return with_memory(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**EXPERTS)))
    if kind == "full":
        return with_memory(
            Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=dict(DENSE), vision_config=dict(VISION)))
        )
    return with_memory(
        Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=dict(EXPERTS), vision_config=dict(VISION)))
    )


def tokens(count: int, start: int = 0) -> list[int]:
    return [(start + 7 * i + i * i) % 120 for i in range(count)]


def edge_trees() -> list[Tree]:
    """Return trees with single tokens, chunks just full or one over, short and empty prefixes, and empty branches."""
    sizes = [(1, [1, 40]), (2, [0, 3, 65]), (32, [32, 1]), (33, [31, 64]), (70, [0]), (64, [0, 0, 5])]
    trees = [Tree(tokens(p, p), [Branch(tokens(b, 3 * b + n)) for n, b in enumerate(bs)]) for p, bs in sizes]
    return [*trees, Tree([], [Branch(tokens(n, n)) for n in (1, 2, 45)])]


def sequential_logprobs(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Return (N,) logprobs of the targets, one sequence at a time through a model that was never packed."""
    hidden = _sequential(model, batch, batch.source_N, batch.sequence_N, None)
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits.float().log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]


def assert_same_gradients(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert any("linear_attn" in name for name in expected)
    for name, parameter in ours.named_parameters():
        if name in expected:
            gap = (present(parameter.grad) - expected[name]).norm()
            assert gap <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("trees", [skewed_trees, edge_trees, deep_trees])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_one_sequence_at_a_time(kind: str, trees: Callable[[], list[Tree]]) -> None:
    model = make(kind)
    plain = copy.deepcopy(model)
    policy = Policy(model, SFTConfig(gradient_checkpointing=trees is edge_trees))
    assert packs_prefixes(policy.base_model.config)
    batch = pack(trees())
    weights = torch.randn(batch.num_targets)
    logp, _ = policy.logprobs(batch)
    (logp @ weights).backward()
    expected = sequential_logprobs(plain, batch)
    (expected @ weights).backward()
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_adapters_on_the_projections_of_delta_nets_are_trained(kind: str) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = Policy(make(kind), SFTConfig(gradient_checkpointing=True), peft_config=lora, reference=True)
    assert any("linear_attn.in_proj_qkv" in name for name in policy.trained_names)
    plain = copy.deepcopy(policy.base_model)
    plain.set_attn_implementation("sdpa")
    batch = pack(edge_trees())
    logp, _ = policy.logprobs(batch)
    logp.sum().backward()
    expected = sequential_logprobs(plain, batch)
    expected.sum().backward()
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(policy.base_model, plain)
    reference = policy.reference_logprobs(batch)
    assert (reference - logp).abs().max() > 1e-3
    torch.testing.assert_close(reference, sequential_logprobs(make(kind), batch), atol=1e-5, rtol=1e-5)


def test_bf16_is_as_close_to_float32_packed_as_sequentially() -> None:
    model = make("qwen3_5")
    plain = copy.deepcopy(model)
    batch = pack(skewed_trees())
    with torch.no_grad():
        exact = sequential_logprobs(plain, batch)
        with torch.autocast("cpu", torch.bfloat16):
            usual = (sequential_logprobs(plain, batch) - exact).abs()
        ours = (Policy(model, SFTConfig(bf16=True)).logprobs(batch)[0] - exact).abs()
    assert ours.mean() <= 1.5 * usual.mean()
    assert ours.max() <= 2 * usual.max() + 0.01


def test_an_idle_row_has_a_gradient_of_zero_for_every_weight() -> None:
    policy = Policy(make("qwen3_5"), SFTConfig())
    logp, _ = policy.logprobs(idle_batch(edge_trees()[-2]))
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.model.parameters())


def recurrence(
    plan: DeltaPlan, query: Tensor, key: torch.Tensor, value: torch.Tensor, g: Tensor, beta: torch.Tensor
) -> Tensor:
    """Compute the rule by its definition, token by token: (T, H, V)."""
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    outputs: dict[int, Tensor] = {}
    ends = {ROOT: value.new_zeros(value.shape[1], key.shape[2], value.shape[2])}
    for number, segment in enumerate(plan.layout.segments):
        state = ends[segment.parent]
        for t in range(segment.start, segment.end):
            state = state * g[t].exp()[:, None, None]
            added = (value[t] - torch.einsum("hkv,hk->hv", state, key[t])) * beta[t][:, None]
            state = state + key[t][:, :, None] * added[:, None]
            outputs[t] = torch.einsum("hkv,hk->hv", state, query[t]) * key.shape[2] ** -0.5
        ends[number] = state
    return torch.stack([outputs[t] for t in range(len(outputs))])


def random_row(num_tokens: int, decay: float) -> list[Tensor]:
    torch.manual_seed(0)
    row = [torch.randn(num_tokens, 2, width, dtype=torch.float64) for width in (8, 8, 4)]
    row += [-decay * torch.rand(num_tokens, 2, dtype=torch.float64), torch.rand(num_tokens, 2, dtype=torch.float64)]
    return [tensor.requires_grad_() for tensor in row]


def results(output: Tensor, row: Sequence[Tensor]) -> list[Tensor]:
    return [output, *torch.autograd.grad((output * output.detach().cos()).sum(), row)]


@pytest.mark.parametrize("trees", [edge_trees, deep_trees])
@pytest.mark.parametrize("decay", [0.05, 5.0])
def test_the_chunked_rule_equals_its_definition(decay: float, trees: Callable[[], list[Tree]]) -> None:
    batch = pack(trees())
    plan = DeltaPlan(batch.layout, batch.num_tokens, torch.device("cpu"))
    row = random_row(batch.num_tokens, decay)
    ours = results(delta_net.chunked_rule(plan, *row, normalize=True), row)
    torch.testing.assert_close(ours, results(recurrence(plan, *row), row))


def varlen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: torch.Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Emulate flash-linear-attention's chunk_gated_delta_rule with transformers' own function."""
    module = importlib.import_module(delta_net.MODULES["qwen3_5_text"])
    rule = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    assert cu_seqlens.dtype == torch.int64
    assert q.shape[0] == 1
    assert cu_seqlens[-1] == q.shape[1]
    assert cu_seqlens.diff().min() > 0
    assert initial_state is None or initial_state.shape == (len(cu_seqlens) - 1, v.shape[2], q.shape[3], v.shape[3])
    outputs, states = [], []
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        output, state = rule(
            *(x[:, start:end] for x in (q, k, v)), g=g[:, start:end], beta=beta[:, start:end],
            initial_state=None if initial_state is None else initial_state[number : number + 1],
            output_final_state=True, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )  # fmt: skip
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None


@pytest.mark.parametrize(
    ("trees", "calls"), [(edge_trees(), 2), (edge_trees()[-1:], 1), ([edge_trees()[4]], 1), (deep_trees(1), 4)]
)
def test_a_variable_length_kernel_is_called_for_one_depth_after_another(trees: list[Tree], calls: int) -> None:
    batch = pack(trees)
    plan = DeltaPlan(batch.layout, batch.num_tokens, torch.device("cpu"))
    row = random_row(batch.num_tokens, 0.05)
    seen = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["output_final_state"])
        return varlen_kernel(*args, **kwargs)

    query, key, value, g, beta = (x.float()[None] for x in row)
    output = delta_net.staged_rule(kernel, plan, query, key, value, g, beta, normalize=True)[0]
    assert seen == [True] * (calls - 1) + [False]
    torch.testing.assert_close(results(output, row), results(recurrence(plan, *row).float(), row), atol=2e-5, rtol=1e-4)


def test_a_model_with_that_kernel_equals_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_net, "_kernel", lambda device_type: varlen_kernel)
    model = make("qwen3_5")
    plain = copy.deepcopy(model)
    batch = pack(edge_trees())
    logp, _ = Policy(model, SFTConfig(gradient_checkpointing=True)).logprobs(batch)
    logp.sum().backward()
    expected = sequential_logprobs(plain, batch)
    expected.sum().backward()
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, plain)


def test_an_unpacked_model_is_unchanged_by_the_replaced_functions() -> None:
    model = make("qwen3_5")
    ids = torch.tensor([tokens(50), tokens(50, 5)])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    sampled = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    policy = Policy(model, SFTConfig())
    policy.logprobs(pack(edge_trees()))
    with policy.generation_model() as plain:
        torch.testing.assert_close(plain(input_ids=ids, attention_mask=mask).logits, before, rtol=0, atol=0)
        generating: Any = plain  # the annotated `self` of generate fits none of transformers' own models
        again = generating.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, sampled)
    assert copy.deepcopy(model).config._attn_implementation == model.config._attn_implementation


def test_other_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("qwen3_5").config
    module = importlib.import_module(delta_net.MODULES["qwen3_5_text"])
    monkeypatch.setattr(module, "causal_conv1d_fn", lambda hidden_states, weight: None)
    with pytest.raises(ModelError, match=r"no function causal_conv1d_fn\(hidden_states, weight, bias, activation\)"):
        delta_net.install(config)
    monkeypatch.setattr(module.Qwen3_5GatedDeltaNet, "forward", lambda self, hidden_states, **kwargs: None)
    with pytest.raises(ModelError, match="does not call torch_chunk_gated_delta_rule"):
        delta_net.install(config)
    monkeypatch.delattr(module, "torch_chunk_gated_delta_rule")
    with pytest.raises(ModelError, match=r"no function torch_chunk_gated_delta_rule\(query"):
        Policy(make("qwen3_5"), SFTConfig())


def test_functions_that_the_package_kernels_turned_into_modules_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(delta_net.MODULES["qwen3_5_text"])
    function = inspect.unwrap(module.causal_conv1d_fn)

    class Function(torch.nn.Module):
        def forward(
            self,
            hidden_states: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            activation: str | None = None,
            **kwargs: Any,
        ) -> Any:
            return function(hidden_states, weight, bias, activation)

    monkeypatch.setattr(module, "causal_conv1d_fn", Function())
    batch = pack(edge_trees())
    logp, _ = Policy(make("qwen3_5"), SFTConfig()).logprobs(batch)
    assert module.causal_conv1d_fn.is_packed
    torch.testing.assert_close(logp, sequential_logprobs(make("qwen3_5"), batch), atol=1e-5, rtol=1e-5)


def test_a_layer_that_ignores_the_layout_is_refused() -> None:
    model = make("qwen3_5")
    policy = Policy(model, SFTConfig())
    layer = model.model.layers[2].linear_attn
    forward = layer.forward
    layer.forward = lambda *args, layout=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ModelError, match=r"1 of the 2 delta-net layers of Qwen3_5ForCausalLM called causal_conv1d_fn"):
        policy.logprobs(pack(edge_trees()))


def test_only_known_recurrent_layers_share_prefixes() -> None:
    assert packing_obstacle(make("full").config) is None
    other = make("qwen3_5").config
    other.model_type = "qwen9"
    assert packing_obstacle(other) == "qwen9 has layers of type linear_attention"
    other.layer_types = ["sliding_attention", "mamba", "full_attention"]
    assert packing_obstacle(other) == "qwen9 has layers of type mamba"


def test_missing_kernels_are_reported_only_on_devices_that_can_run_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Filter the advice of transformers to install kernels, which it gives on a CPU too."""
    model = make("qwen3_5")
    Policy(model, SFTConfig()).logprobs(pack(edge_trees()[:1]))
    logging.getLogger("transformers.integrations.hub_kernels").handle(
        logging.makeLogRecord(
            {"msg": "`f` is falling back to its reference PyTorch implementation because", "levelno": 30}
        )
    )
    assert not caplog.text
    text = model.config.get_text_config(decoder=True)
    assert delta_net.kernel_note(text, "cpu") is None
    monkeypatch.setattr(delta_net, "_kernel", lambda device_type: None)
    assert "pip install flash-linear-attention" in present(delta_net.kernel_note(text, "cuda"))
    assert delta_net.kernel_note(make_model().config, "cuda") is None
    monkeypatch.setattr(delta_net, "_kernel", lambda device_type: varlen_kernel)
    assert delta_net.kernel_note(text, "cuda") is None
