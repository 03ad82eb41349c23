"""Make the configs of tiny models, with the fields that the configs of real checkpoints have."""

from typing import TYPE_CHECKING, Any

from rlqwen.models.tiny.shape import EXPERT_OPTIONS, TinyModelConfig
from rlqwen.models.tiny.tokenizer import END_OF_TURN

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PATCH_SIZE = 16
MERGE_SIZE = 2
_VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def model_config(shape: TinyModelConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedConfig":
    """Return transformers' config of the class that `shape` names."""
    from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig, Qwen3NextConfig

    fields: dict[str, Any] = {
        # Rounded up, as Qwen's own, so that the head's matrix has a friendly width.
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_length,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "initializer_range": shape.initializer_range,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.model_type == "qwen2":
        return Qwen2Config(**fields)
    fields["head_dim"] = shape.head_dim
    if shape.has_experts:
        fields |= {name: getattr(shape, name) for name in EXPERT_OPTIONS}
    if shape.has_delta_net:
        fields |= _delta_net_fields(shape)
    if shape.model_type.startswith("qwen3_5"):
        return _qwen3_5_config(shape, tokenizer, fields)
    if shape.model_type == "qwen3_next":
        return Qwen3NextConfig(**fields, norm_topk_prob=True)
    if shape.model_type == "qwen3_moe":
        return Qwen3MoeConfig(**fields, norm_topk_prob=True)
    return Qwen3Config(**fields)


def _delta_net_fields(shape: TinyModelConfig) -> dict[str, Any]:
    interval = min(4, shape.num_layers)
    kinds = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(shape.num_layers)]
    fields: dict[str, Any] = {
        "full_attention_interval": interval,
        "layer_types": kinds,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": shape.linear_head_dim,
        "linear_value_head_dim": shape.linear_head_dim,
        "linear_num_key_heads": shape.linear_num_key_heads,
        "linear_num_value_heads": shape.linear_num_value_heads,
        "partial_rotary_factor": 0.25,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25},
    }
    if shape.has_experts:
        fields["shared_expert_intermediate_size"] = shape.moe_intermediate_size
    return fields


def _qwen3_5_config(
    shape: TinyModelConfig, tokenizer: "PreTrainedTokenizerBase", fields: dict[str, Any]
) -> "PreTrainedConfig":
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

    frequencies = shape.head_dim // 8
    sections = [frequencies - 2 * (frequencies // 3), frequencies // 3, frequencies // 3]
    fields["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": sections}
    fields |= {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}
    if shape.has_experts:
        del fields["intermediate_size"]
    if not shape.has_vision:
        return Qwen3_5MoeTextConfig(**fields) if shape.has_experts else Qwen3_5TextConfig(**fields)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": shape.hidden_size,
        "num_position_embeddings": 64,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [],
        "initializer_range": shape.initializer_range,
    }
    tokens: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _VISION_TOKENS.items()}
    whole = Qwen3_5MoeConfig if shape.has_experts else Qwen3_5Config
    return whole(
        text_config=fields | {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=shape.tie_word_embeddings,
        **tokens,
    )
