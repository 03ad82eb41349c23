"""Compute hidden states at chosen places of a packed row, for any transformers model.

Shapes: T tokens in the row, R requested places, S sequences, C hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlqwen.packing import delta_net
from rlqwen.packing.attention import PACKED_ATTENTION
from rlqwen.packing.batch import PackedBatch
from rlqwen.packing.routing_replay import replay_arguments
from rlqwen.packing.row_layout import ROOT
from rlqwen.packing.sequence_parallel import SequenceGroup

PACKABLE_LAYERS = {"full_attention", "attention", "sliding_attention"}
# Kinds of rotary position embedding that choose their frequencies by the longest sequence of the row.
ROW_WIDE_ROPE = {"dynamic", "longrope"}


def packing_obstacle(config: Any) -> str | None:
    """Return why a model of this configuration cannot share a prefix among sequences; None if it can.

    Attention can, and so can the delta-net layers that rlqwen.packing.delta_net knows. Other layers with state cannot:
    they would carry it from one sequence of the row into the next.
    """
    text = config.get_text_config(decoder=True)
    others = _recurrent_layers(text)
    if delta_net.is_delta_net(text):
        others.discard(delta_net.LAYER)
    if others:
        return f"{text.model_type} has layers of type {', '.join(sorted(others))}"
    row_wide = _rope_types(text) & ROW_WIDE_ROPE
    return f"{text.model_type} has rope_type {', '.join(sorted(row_wide))}" if row_wide else None


def packs_prefixes(config: Any) -> bool:
    """Return whether a model of this configuration can share a prefix; see `packing_obstacle`."""
    return packing_obstacle(config) is None


def cutting_obstacle(config: Any) -> str | None:
    """Return why ranks cannot each forward a slice of a row through a model of this configuration; None if they can."""
    text = config.get_text_config(decoder=True)
    if recurrent := _recurrent_layers(text):
        return f"{text.model_type} has layers that carry a state along the sequence ({', '.join(sorted(recurrent))})"
    return packing_obstacle(config)


def _recurrent_layers(text_config: Any) -> set[str]:
    return set(getattr(text_config, "layer_types", None) or ()) - PACKABLE_LAYERS


def _rope_types(config: Any) -> set[str]:
    """Return the kinds of rotary embedding of the config, which gives one for all layers or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {entry["rope_type"] for entry in each if "rope_type" in entry}


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the text layers of `model` run over packed rows, if the model can share prefixes.

    Raises ModelError if its delta-net layers are not as expected.
    """
    config: Any = model.config
    if not packs_prefixes(config):
        return
    text = config.get_text_config(decoder=True)
    if delta_net.is_delta_net(text):
        delta_net.install(text)
    parts = [name for name in config.sub_configs if getattr(config, name) is text]
    model.set_attn_implementation(dict.fromkeys(parts, PACKED_ATTENTION) if parts else PACKED_ATTENTION)


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model use transformers' default attention inside."""
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
    """Return the (R, C) last hidden states at `index_R` of the row, each within its sequence, `sequence_R` (ascending).

    Makes one forward over the row if the model can share prefixes, else one over each sequence. With a `sequence` group,
    only places in this rank's slice of the row are returned. A given `router_logits` is filled with the (T, E) logits of
    each mixture-of-experts layer, with each token of the row, or of the slice, once.
    """
    if packs_prefixes(model.config):
        return _packed(model, batch, sequence, router_logits)[sequence.own(index_R, batch.num_tokens)[1]]
    return _sequential(model, batch, index_R, sequence_R, router_logits)


def last_tokens(batch: PackedBatch) -> Tensor:
    """Return (S,) the index in the row of each sequence's last token."""
    segments, leaves = batch.layout.segments, batch.layout.leaves[: batch.num_sequences]
    ends = [segments[leaf].end - 1 if leaf != ROOT else -1 for leaf in leaves]
    return torch.tensor(ends, dtype=torch.long, device=batch.input_ids.device)


def _packed(
    model: PreTrainedModel, batch: PackedBatch, sequence: SequenceGroup, router_logits: list[Tensor] | None
) -> Tensor:
    with delta_net.checked(model, batch.layout):
        output = model.base_model(
            input_ids=sequence.cut(batch.input_ids),
            position_ids=sequence.cut(batch.position_ids),
            layout=batch.layout,
            sequence=sequence if sequence.size > 1 else None,
            use_cache=False,
            **_recording(router_logits),
            **replay_arguments(model, _own_experts(batch, sequence)),
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
    """Forward each sequence with its own copy of the prefix, for layers with a state that cannot be forked."""
    layout = batch.layout
    is_recorded_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
    hidden, recorded = [], []
    for sequence, leaf in enumerate(layout.leaves):
        index = index_R[sequence_R == sequence]
        if not len(index) and len(index_R):
            continue
        rows = torch.from_numpy(layout.rows(leaf))
        output = model.base_model(
            input_ids=batch.input_ids[:, rows],
            use_cache=False,
            **_recording(router_logits),
            **replay_arguments(model, None if batch.experts_TLK is None else batch.experts_TLK[rows]),
        )
        hidden.append(output.last_hidden_state[0][torch.searchsorted(rows.to(index.device), index)])
        if router_logits is not None:
            is_new = ~is_recorded_T[rows]
            recorded.append([logits_TE[is_new.to(logits_TE.device)] for logits_TE in output.router_logits])
            is_recorded_T[rows] = True
    if router_logits is not None:
        router_logits += [torch.cat(layer) for layer in zip(*recorded, strict=True)]
    return torch.cat(hidden)


def _own_experts(batch: PackedBatch, sequence: SequenceGroup) -> Tensor | None:
    """Return the recorded experts of this rank's slice of the row; its padding gets those of the row's first token."""
    if batch.experts_TLK is None or sequence.size == 1:
        return batch.experts_TLK
    return batch.experts_TLK[sequence.cut(torch.arange(batch.num_tokens, device=batch.input_ids.device)[None])[0]]


def _recording(router_logits: list[Tensor] | None) -> dict[str, Any]:
    """Return the arguments that record router logits if they are wanted; a model without routers does not accept them."""
    return {} if router_logits is None else {"output_router_logits": True}
