"""Check that rlqwen computes a model as transformers does: by its config, and by a test forward over a few tokens."""

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlqwen.errors import ModelError
from rlqwen.packing.attention_rules import refusal
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack

_SCALED_LOGITS = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_mup_width_multiplier": 1.0,
}
"""Config field by which transformers changes the logits after the head -> the value that changes nothing."""
_CAPPED_SCORES = ("attn_logit_softcapping", "attention_logit_cap")
_SINKS = frozenset({"gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash", "openai_privacy_filter"})
"""Model types whose attention has sinks: learned scores that join those of the tokens in the softmax."""

_TREES = ((5, (6, 3)), (0, (4,)))
"""The row of the check: tokens of each prefix, and of each of its branches."""
_PASSED: set[tuple[str, str, bool]] = set()
_TOLERANCE = 0.005
_HALF_TOLERANCE = 0.1
"""Largest relative gap allowed between our logits and the model's own, in float32 and in half precision or quantized."""


def check_config(config: Any) -> None:
    """Raise ModelError if a model of this config computes attention or logits in a way that rlqwen does not support."""
    text = config.get_text_config(decoder=True)
    model_type = text.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise refusal(config.model_type, "is an encoder with a decoder")
    if model_type in _SINKS:
        raise refusal(model_type, "has attention sinks")
    for field in _CAPPED_SCORES:
        if getattr(text, field, None):
            raise refusal(model_type, f"caps attention scores ({field}={getattr(text, field)})")
    for field, neutral in _SCALED_LOGITS.items():
        value = getattr(text, field, None)
        if value is not None and value != neutral:
            raise refusal(model_type, f"scales or caps its logits ({field}={value})")


def check_head(model: PreTrainedModel) -> None:
    """Raise ModelError if the language-model head is more than one matrix."""
    head = model.get_output_embeddings()
    if head is None:
        raise refusal(model.config.model_type, "has no language-model head")
    if getattr(head, "bias", None) is not None:
        raise refusal(model.config.model_type, "has a language-model head with a bias")


def check_forward(
    model: PreTrainedModel,
    packed: Callable[[PackedBatch], Tensor],
    own: Callable[[list[list[int]]], Tensor],
    *,
    exact: bool,
) -> None:
    """Compare, on a row of a few tokens, the outputs of the packed forward with those of the model itself.

    Args:
        model: the model; its name appears in the error, and it gives vocabulary and device.
        packed: function of a batch; returns (S, V) outputs at each sequence's last token.
        own: function of the token ids of each sequence; returns the same outputs from the model itself.
        exact: whether the forward is in float32, so that only rounding may differ.

    Raises ModelError with the gap if they disagree. A model whose own output is not finite passes, because packing
    is not the cause. A class and config that passed are not tested again in this process.
    """
    tried = (type(model).__qualname__, model.config.to_json_string(), exact)
    if tried in _PASSED:
        return
    trees = _trees(model.config.get_text_config().vocab_size)
    own_SV = own([tree.prefix + branch.token_ids for tree in trees for branch in tree.branches]).float()
    if not own_SV.isfinite().all():
        return
    try:
        packed_SV = packed(pack(trees).to(model.device)).float()
    except (TypeError, ValueError, AttributeError) as error:  # of a forward that does not know our arguments
        raise refusal(model.config.model_type, f"cannot forward packed rows ({error})") from error
    spread_S = (own_SV - own_SV.mean(-1, keepdim=True)).norm(dim=-1)
    gap = float(((packed_SV - own_SV).norm(dim=-1) / spread_S.clamp(min=1e-6)).median())
    tolerance = _TOLERANCE if exact else _HALF_TOLERANCE
    if not gap <= tolerance:
        raise ModelError(
            f"{model.config.model_type}: on a few tokens, the packed forward differs from the model's own by {gap:.2g} of "
            f"what the answers spread (rounding makes less than {tolerance}), so that {type(model).__name__} has layers or "
            "a head that rlqwen does not compute; train it with TRL"
        )
    _PASSED.add(tried)


def _trees(vocabulary: int) -> list[Tree]:
    """Return the trees of the test row; tokens are from the middle of the vocabulary, which has no special ones."""
    ids = (vocabulary // 3 + place * 7 % max(1, vocabulary // 3) for place in itertools.count())
    return [
        Tree(list(itertools.islice(ids, prefix)), [Branch(list(itertools.islice(ids, count))) for count in branches])
        for prefix, branches in _TREES
    ]
