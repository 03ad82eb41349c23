"""Recompute activations in the backward pass: all of them, or all but the outputs of attention.

Attention is the only part of a layer whose cost per token grows with the length of the sequence, and its output is about a
twelfth of what a layer of Qwen3 keeps for the backward pass. `selective` keeps that output, and recomputes the rest.
"""

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Recomputation = bool | Literal["selective"]
ATTENTION_OPS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_flash_attention_forward",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""Kernels of attention whose outputs `selective` keeps."""


def recompute_activations(model: PreTrainedModel, kind: Recomputation) -> None:
    """Let the decoder layers of `model` compute their activations again in the backward pass; False: let them not."""
    if not kind:
        model.gradient_checkpointing_disable()
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE
