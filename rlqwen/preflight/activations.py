"""Compute the bytes that a forward pass keeps for the backward pass, per token of the packed row, from a config alone.

The sums name what autograd saves in transformers' Qwen layers, in rlqwen's attention and in PEFT's adapters; the tests
compare them with what it really saves. C is the width of the residual stream.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlqwen.packing.delta_net import is_delta_net
from rlqwen.packing.delta_plan import CHUNK
from rlqwen.preflight.layer_shapes import LayerShape

_FLOAT32 = 4


@dataclass(frozen=True)
class ForwardRules:
    """Say how a forward pass runs, which decides what it keeps."""

    compute: int
    """Bytes of a number that matrix products read."""
    residual: int
    """Bytes of a number in the residual stream."""
    on_gpu: bool
    """Whether norms are one kernel in half precision, and attention is FlashAttention; see rlqwen.models.gpu_forward."""
    adapters: frozenset[str] | None
    """Last parts of the names of the linear layers with an adapter; None: all weights are trained."""

    @classmethod
    def of(
        cls, *, on_gpu: bool, half: bool, adapters: frozenset[str] | None = None, half_weights: bool = False
    ) -> "ForwardRules":
        """Return the rules of a device and a precision; `half_weights`: the embedding itself is in half precision."""
        residual = 2 if half and (on_gpu or half_weights) else _FLOAT32
        return cls(2 if half else _FLOAT32, residual, on_gpu, adapters)

    @property
    def trains_all(self) -> bool:
        return self.adapters is None

    def inputs(self, width: int, readers: Iterable[str]) -> int:
        """Return the bytes of an input that the linear layers `readers` keep for the gradients of their weights."""
        kept = [name for name in readers if self.adapters is None or name in self.adapters]
        # Autocast casts a float32 residual again for each layer, and PEFT casts the input of each adapter.
        each_has_a_copy = self.compute < _FLOAT32 and (self.residual > self.compute or not self.trains_all)
        return self.compute * width * (len(kept) if each_has_a_copy else min(len(kept), 1))

    def norm(self, width: int, size: int, *, plain: bool) -> int:
        """Return what a norm keeps of `width` numbers of `size` bytes; `plain`: it multiplies by its weight alone."""
        if self.on_gpu and plain and self.compute < _FLOAT32:
            return size * width
        return _FLOAT32 * width + ((size if plain else _FLOAT32) * width if self.trains_all else 0)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes per token that a decoder layer keeps."""

    whole: float
    """What each tensor parallel rank keeps whole: numbers of the residual stream, and of routers."""
    divided: float
    """What those ranks divide: heads, and the inner numbers of MLPs and experts."""

    def __add__(self, other: "LayerActivations") -> "LayerActivations":
        return LayerActivations(self.whole + other.whole, self.divided + other.divided)

    def per_rank(self, tensor_ranks: int = 1) -> float:
        """Return the bytes per token on one of `tensor_ranks` ranks."""
        return self.whole + self.divided / tensor_ranks


def layer_activations(shape: LayerShape, config: Any, rules: ForwardRules) -> LayerActivations:
    """Return the bytes per token that a decoder layer of a shape keeps; `config`: that of the text model."""
    plain = not is_delta_net(config)
    kept = LayerActivations(2 * rules.norm(config.hidden_size, rules.residual, plain=plain), 0.0)
    kept += _delta_net(config, rules) if shape.kind == "linear_attention" else _attention(shape, config, rules)
    return kept + (
        _experts(config, rules) if shape.experts else _mlp(config.hidden_size, config.intermediate_size, rules)
    )


def head_activations(config: Any, rules: ForwardRules) -> float:
    """Return the bytes per token of the last norm and of the hidden states that the head reads."""
    width: int = config.hidden_size
    return rules.norm(width, rules.residual, plain=not is_delta_net(config)) + rules.compute * width


def checkpoint_bytes(config: Any, rules: ForwardRules) -> int:
    """Return the bytes per token that a recomputed layer keeps: its input."""
    return int(rules.residual * config.hidden_size)


def attention_outputs(config: Any, rules: ForwardRules) -> float:
    """Return the bytes per token of what all layers' attention kernels return: outputs, and a number per head.

    On a GPU there are two of each for tokens that have a prefix, which is counted for all tokens.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = config.num_attention_heads
    size = rules.compute * heads * head_width(config) + _FLOAT32 * heads
    return float((2 if rules.on_gpu else 1) * size * (len(kinds) - list(kinds).count("linear_attention")))


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _attention(shape: LayerShape, config: Any, rules: ForwardRules) -> LayerActivations:
    """Return the bytes of full attention: inputs, normed heads, what the kernel keeps, and the input of the output."""
    queries: int = config.num_attention_heads * head_width(config)
    keys: int = config.num_key_value_heads * head_width(config)
    is_gated = is_delta_net(config)
    size = 0
    if shape.has_query_norm:
        size += rules.norm(queries, rules.compute, plain=not is_gated) + rules.norm(
            keys, rules.compute, plain=not is_gated
        )
    size += rules.compute * 2 * (queries + keys) + _FLOAT32 * config.num_attention_heads
    if is_gated:
        size += rules.compute * 3 * queries
    if is_gated or not rules.on_gpu or not rules.trains_all:  # else it is the kernel's own output
        size += rules.inputs(queries, ("o_proj",))
    return LayerActivations(rules.inputs(config.hidden_size, ("q_proj", "k_proj", "v_proj")), size)


def _delta_net(config: Any, rules: ForwardRules) -> LayerActivations:
    """Return the bytes of a gated delta-net layer, whose rule runs in float32 and in chunks."""
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    width = heads * value
    channels = 2 * config.linear_num_key_heads * key + width
    whole = rules.inputs(config.hidden_size, ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))
    size = rules.compute * 2 * channels + rules.inputs(width, ("out_proj",)) + rules.compute * width
    rule = 8 * width + 7 * heads * key + 5 * heads * CHUNK + heads * key * value / CHUNK
    return LayerActivations(whole, size + _FLOAT32 * rule)


def _mlp(width: int, inner: int, rules: ForwardRules) -> LayerActivations:
    """Return the bytes of a gated MLP: its input, gate, its SiLU, up, and their product."""
    product = rules.inputs(inner, ("down_proj",))
    return LayerActivations(rules.inputs(width, ("gate_proj", "up_proj")), rules.compute * 3 * inner + product)


def _experts(config: Any, rules: ForwardRules) -> LayerActivations:
    """Return the bytes of the chosen experts of a token, the router and a shared expert."""
    chosen, inner, width = config.num_experts_per_tok, config.moe_intermediate_size, config.hidden_size
    trained = rules.adapters is None or bool(rules.adapters & {"experts", "gate_up_proj"})
    size, whole = rules.compute * chosen * 3 * inner, rules.compute * chosen * width
    if trained:
        size += rules.compute * chosen * inner
        whole += rules.compute * chosen * width
    whole += _FLOAT32 * (2 * config.num_experts + 4 * chosen)
    if rules.trains_all:
        whole += rules.compute * width  # the router's input
    kept = LayerActivations(whole, size)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        kept += _mlp(width, shared, rules) + LayerActivations(rules.compute * 2 * width, 0.0)
    return kept
