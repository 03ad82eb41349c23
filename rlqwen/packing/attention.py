"""Attend over a packed row of shared prefixes and their branches, in any transformers model.

`AttentionInterface` swaps the attention function, and the layout travels as a keyword of the model's forward. On a GPU
in half precision attention is a few calls of FlashAttention (rlqwen.packing.cascade_attention), elsewhere padded blocks
(rlqwen.packing.block_attention).

Shapes: T tokens in the row; H heads of width D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from rlqwen.packing.attention_rules import read_call, read_mask, refusal
from rlqwen.packing.block_attention import attend_in_blocks
from rlqwen.packing.cascade_attention import MAX_HEAD_DIM, cascade_attention, has_flash_kernel, supports_flash
from rlqwen.packing.row_layout import Layout
from rlqwen.packing.sequence_parallel import SequenceGroup

PACKED_ATTENTION = "rlqwen_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sequence: SequenceGroup | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' interface asks; query (1, H, T, D), key and value (1, H_kv, T, D); return (1, T, H, D).

    With a `sequence` group, T is this rank's slice of the row, and the layout is that of the whole row.
    Raises ValueError without a layout: the model was called outside rlqwen's packed forward; ModelError for attention
    that is more than causal or windowed, see rlqwen.packing.attention_rules.
    """
    if layout is None:
        raise ValueError(f"the attention {PACKED_ATTENTION!r} needs `layout`: call the model through Policy")
    window = read_call(module, attention_mask, kwargs).window
    query_T, key_T, value_T = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if sequence is not None:
        if value_T.shape[2] != query_T.shape[2]:
            raise refusal("parallel.sequence_parallel_size: the model", "has values narrower than its keys")
        query_T, key_T, value_T = sequence.to_heads(query_T, key_T, value_T)
    attended_T = _attend(query_T, key_T, value_T, layout, window, scaling, dropout)
    return (attended_T if sequence is None else sequence.to_slice(attended_T))[None], None


def _attend(
    query_T: Tensor,
    key_T: Tensor,
    value_T: Tensor,
    layout: Layout,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Return (T, H, D) by the fastest way that computes it; rows beyond the layout's are padding, and left out."""
    if query_T.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query_T, key_T, value_T = query_T.to(dtype), key_T.to(dtype), value_T.to(dtype)
    if window is not None and layout.longest <= window:
        window = None
    if window is None and not dropout and has_flash_kernel(query_T, value_T):
        num_tokens = layout.num_tokens
        rows = (query_T[:num_tokens], key_T[:num_tokens], value_T[:num_tokens])
        return cascade_attention(*rows, layout, scaling=scaling)
    return attend_in_blocks(query_T, key_T, value_T, layout, window=window, scaling=scaling, dropout=dropout)


def attention_note(text_config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return a line on the kernels of attention in `dtype` on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    if supports_flash(device, dtype, width):
        kernel = torch.nn.attention.current_flash_attention_impl() or "FA2"
        return f"attention runs in FlashAttention's kernels for rows of many lengths ({kernel})"
    return (
        f"attention runs in padded blocks, which takes longer: FlashAttention needs bf16 or fp16, a GPU from Ampere on, and "
        f"heads whose width is a multiple of 8 up to {MAX_HEAD_DIM}; here it is {str(dtype).removeprefix('torch.')}, and heads "
        f"of width {width} on {torch.cuda.get_device_name(device)}"
    )


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, read_mask)
