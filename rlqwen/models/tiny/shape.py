"""Choose the shape of a tiny model."""

from typing import Any, Literal

from pydantic import Field, model_validator

from rlqwen.config.base import ArgumentsConfig

ModelType = Literal[
    "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"
]
Template = Literal[
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"
]  # fmt: skip
EXPERT_OPTIONS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
DELTA_NET_OPTIONS = ("linear_head_dim", "linear_num_key_heads", "linear_num_value_heads")


class TinyModelConfig(ArgumentsConfig):
    """Shape of the tiny model; the defaults give about a million parameters."""

    model_type: ModelType = "qwen3"
    """qwen3_5 and qwen3_5_moe have a vision tower and multi-token prediction weights, qwen3_next the latter."""
    hidden_size: int = Field(default=128, ge=32)
    num_layers: int = Field(default=4, ge=1)
    """With delta-net layers, every fourth layer has full attention; if there are fewer than four, the last has."""
    intermediate_size: int = Field(default=512, ge=32)
    """Width of a dense layer (default 256 in qwen3_5 models); experts have `moe_intermediate_size`."""
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=32, multiple_of=32)
    """vLLM's attention on CPU takes multiples of 32."""
    linear_head_dim: int = Field(default=64, multiple_of=32)
    """Width of keys and values in delta-net layers (qwen3_next and qwen3_5 models); vLLM on CPU takes 64 and 128."""
    linear_num_key_heads: int = Field(default=2, ge=1)
    linear_num_value_heads: int = Field(default=4, ge=1)
    """A multiple of `linear_num_key_heads`."""
    max_length: int = Field(default=1024, ge=32)
    """Tokens of context."""
    tie_word_embeddings: bool = True
    num_experts: int = Field(default=8, ge=2)
    """This field and the next two are for mixtures of experts, which have experts in every layer."""
    num_experts_per_tok: int = Field(default=2, ge=1)
    moe_intermediate_size: int = Field(default=64, ge=32)
    """Width of each expert, and of the shared expert if the class has one."""
    initializer_range: float = Field(default=0.02, gt=0)
    chat_template: Template | None = None
    """None: qwen3_5_think for qwen3_5 models, qwen3_instruct_2507 for qwen3_next, else qwen3."""

    @property
    def has_experts(self) -> bool:
        return "moe" in self.model_type or self.model_type == "qwen3_next"

    @property
    def has_delta_net(self) -> bool:
        return self.model_type.startswith(("qwen3_5", "qwen3_next"))

    @property
    def has_vision(self) -> bool:
        return self.model_type in ("qwen3_5", "qwen3_5_moe")

    @property
    def has_mtp(self) -> bool:
        """Return whether the checkpoint has weights for multi-token prediction."""
        return self.has_vision or self.model_type == "qwen3_next"

    @property
    def template(self) -> Template:
        if self.chat_template:
            return self.chat_template
        if self.model_type == "qwen3_next":
            return "qwen3_instruct_2507"
        return "qwen3_5_think" if self.has_delta_net else "qwen3"

    @model_validator(mode="before")
    @classmethod
    def _default_of_the_class(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("model_type")).startswith("qwen3_5"):
            return {"intermediate_size": 256} | values
        return values

    @model_validator(mode="after")
    def _heads_fit(self) -> "TinyModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads={self.linear_num_value_heads} must be a multiple of "
                f"linear_num_key_heads={self.linear_num_key_heads}"
            )
        if self.model_type == "qwen2" and self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(
                f"a qwen2 model needs num_heads x head_dim = hidden_size "
                f"({self.num_heads} x {self.head_dim} is not {self.hidden_size})"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}"
            )
        if self.has_delta_net and self.num_layers < 2:
            raise ValueError(
                f"a {self.model_type} model needs num_layers of at least 2, a delta-net layer and one of full attention"
            )
        return self

    @model_validator(mode="after")
    def _options_have_a_meaning(self) -> "TinyModelConfig":
        for options, has in ((EXPERT_OPTIONS, self.has_experts), (DELTA_NET_OPTIONS, self.has_delta_net)):
            for name in () if has else options:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}={getattr(self, name)} has no meaning in a {self.model_type} model")
        return self
