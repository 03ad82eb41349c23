"""Hidden states at chosen places of a packed row, for any transformers model: what every packed forward begins with.

Shapes: T tokens in the row, R places asked for, S sequences, C hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlqwen.attention import PACKED_ATTENTION
from rlqwen.batch import PackedBatch
from rlqwen.sequence import SequenceGroup

# Layers whose state runs through the sequence cannot see a prefix that lies elsewhere in the row.
PACKABLE_LAYERS = {"full_attention", "attention", "sliding_attention"}
# Kinds of rotary position embedding that choose their frequencies by the longest sequence of the row.
ROW_WIDE_ROPE = {"dynamic", "longrope"}


def packs_prefixes(config: Any) -> bool:
    """Whether a model of this configuration can share a prefix; linear or recurrent layers cannot."""
    config = config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None)
    return (layers is None or set(layers) <= PACKABLE_LAYERS) and not _rope_types(config) & ROW_WIDE_ROPE


def _rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary embedding of the config, which gives one for all layers or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {entry["rope_type"] for entry in each if "rope_type" in entry}


def use_packed_attention(model: PreTrainedModel) -> None:
    """Have the model attend as packed rows need it, where it can share prefixes."""
    if packs_prefixes(model.config):
        model.set_attn_implementation(PACKED_ATTENTION)


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have the model attend as transformers has it by default, inside."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        use_packed_attention(model)


def hidden_states(
    model: PreTrainedModel,
    batch: PackedBatch,
    index_R: Tensor,
    sequence_R: Tensor,
    *,
    sequence: SequenceGroup,
    router_logits: list[Tensor] | None = None,
) -> Tensor:
    """(R, C) last hidden states at `index_R` of the row, each as its sequence, `sequence_R` (ascending), sees it.

    One forward over the row where the model can share prefixes, else one over each sequence. With a `sequence` group,
    of this rank's slice of the row alone: the places that are in it. `router_logits`, where given, is filled with each
    mixture-of-experts layer's (T, E), each token of the row, or of the slice, once.
    """
    if packs_prefixes(model.config):
        return _packed(model, batch, sequence, router_logits)[sequence.own(index_R, batch.num_tokens)[1]]
    return _sequential(model, batch, index_R, sequence_R, router_logits)


def last_tokens(batch: PackedBatch) -> Tensor:
    """(S,) index in the row of each sequence's last token."""
    spans = batch.layout.spans[: batch.num_sequences]
    ends = [(span.end if span.end > span.start else span.prefix_end) - 1 for span in spans]
    return torch.tensor(ends, dtype=torch.long, device=batch.input_ids.device)


def _packed(
    model: PreTrainedModel, batch: PackedBatch, sequence: SequenceGroup, router_logits: list[Tensor] | None
) -> Tensor:
    output = model.base_model(
        input_ids=sequence.cut(batch.input_ids),
        position_ids=sequence.cut(batch.position_ids),
        layout=batch.layout,
        sequence=sequence if sequence.size > 1 else None,
        use_cache=False,
        **_recording(router_logits),
    )
    if router_logits is not None:
        real = sequence.num_real(batch.num_tokens)
        router_logits += [logits_TE[:real] for logits_TE in output.router_logits]
    hidden_TC: Tensor = output.last_hidden_state[0]
    return hidden_TC


def _sequential(
    model: PreTrainedModel,
    batch: PackedBatch,
    index_R: Tensor,
    sequence_R: Tensor,
    router_logits: list[Tensor] | None,
) -> Tensor:
    """Prefix and branch forwarded again for each sequence: for layers that carry a state along."""
    hidden, recorded, seen = [], [], set()
    for sequence, span in enumerate(batch.layout.spans):
        prefix = batch.input_ids[:, span.prefix_start : span.prefix_end]
        branch = batch.input_ids[:, span.start : span.end]
        index = index_R[sequence_R == sequence]
        if not len(index) and len(index_R):
            continue
        output = model.base_model(
            input_ids=torch.cat([prefix, branch], dim=1), use_cache=False, **_recording(router_logits)
        )
        inside = index - span.start + prefix.shape[1]
        hidden.append(output.last_hidden_state[0][torch.where(index < span.start, prefix.shape[1] - 1, inside)])
        if router_logits is not None:
            known = prefix.shape[1] if span.prefix_start in seen else 0
            recorded.append([logits_TE[known:] for logits_TE in output.router_logits])
            seen.add(span.prefix_start)
    if router_logits is not None:
        router_logits += [torch.cat(layer) for layer in zip(*recorded, strict=True)]
    return torch.cat(hidden)


def _recording(router_logits: list[Tensor] | None) -> dict[str, Any]:
    """Arguments of the forward: a model without routers does not know this one."""
    return {} if router_logits is None else {"output_router_logits": True}
