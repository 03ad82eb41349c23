"""Count the floating-point operations of a forward pass, per token and from a model's shape alone."""

from dataclasses import dataclass

from rlqwen.packing.delta_plan import CHUNK
from rlqwen.preflight.activations import head_width
from rlqwen.preflight.layer_shapes import LayerShape
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.parameter_counts import chosen_experts


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one forward pass; a product of (m, k) and (k, n) has 2mkn."""

    layers: float
    """Per token, of products with the weights of the decoder layers."""
    attention: float
    """Per token, of attention between tokens, and of the delta rule."""
    head: float
    """Per token whose logits are needed."""

    @property
    def model(self) -> float:
        """Return the FLOPs per token of training all weights, nothing computed twice: what MFU is measured by."""
        return 3 * (self.layers + self.attention + self.head)

    def training(self, *, recomputes: bool = False, trains_all: bool = True, targets: float = 1.0) -> float:
        """Return the FLOPs per token that a forward and a backward pass really take.

        `recomputes`: layers run a second time; `trains_all`: gradients of all weights are computed, not of adapters
        alone; `targets`: share of tokens whose logits are needed, which are always computed a second time.
        """
        backward = 2 if trains_all else 1
        layers = self.layers * (1 + backward + recomputes) + self.attention * (3 + recomputes)
        return layers + targets * self.head * (2 + backward)

    def forward(self, targets: float = 1.0) -> float:
        """Return the FLOPs per token without gradients."""
        return self.layers + self.attention + targets * self.head


def token_flops(size: ModelSize, length: float) -> TokenFlops:
    """Count for sequences of `length` tokens, of which a token sees half on average."""
    config = size.text_config
    products = sum(count * active_parameters(size, shape) for shape, count in size.shapes.items())
    attention = 0.0
    for shape, count in size.shapes.items():
        if shape.kind == "linear_attention":
            heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
            attention += count * heads * (2 * CHUNK * (3 * key + 2 * value) + 6 * key * value)
        else:
            attention += count * 2 * length * config.num_attention_heads * head_width(config)
    head = 1 if size.model.get_output_embeddings() is None else config.vocab_size
    return TokenFlops(2.0 * products, attention, 2.0 * head * config.hidden_size)


def active_parameters(size: ModelSize, shape: LayerShape) -> float:
    """Return the parameters of a layer that a token is multiplied with."""
    chosen, experts = chosen_experts(size.text_config)
    return shape.dense + (shape.experts * chosen / experts if experts else shape.experts)
