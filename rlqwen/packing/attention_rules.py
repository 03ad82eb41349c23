"""Check that packed rows can compute a model's attention: causal, over all tokens or over a window of the last ones.

transformers' models say what they need twice: by the mask that they ask for, and by the arguments of the attention
function. Both are read here. Anything unknown is refused by name, because an ignored argument changes every gradient.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlqwen.errors import ModelError

_HARMLESS = frozenset(
    {
        "cache_position",
        "head_mask",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that pass through the model to the attention function, and change nothing in it."""


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Take the place of a mask tensor; packed attention makes its masks from the layout."""

    window: int | None
    """How many tokens up to itself a query sees; None: all."""


def refusal(model_type: str, what: str) -> ModelError:
    """Return the error for a model that packed rows would compute wrongly; `what` continues the model's type."""
    return ModelError(
        f"{model_type} {what}, which rlqwen does not compute; it trains decoders with causal or sliding-window attention "
        "and a plain language-model head, such as Qwen, Llama and Mistral: choose one of these, or train this one with TRL"
    )


def read_mask(*, mask_function: Callable[..., Any], config: Any, **options: Any) -> CausalMask:
    """Return the rule that the model asks for, in place of a mask tensor: the mask function of transformers' interface.

    Raises ModelError for a rule that is neither causal nor a causal window.
    """
    window = None
    for part in _parts(mask_function):
        name = part.__qualname__.partition(".")[0]
        if name == "sliding_window_overlay":
            window = inspect.getclosurevars(part).nonlocals["sliding_window"]
        elif name not in ("causal_mask_function", "packed_sequence_mask_function"):
            raise refusal(config.model_type, f"masks its attention with {name}")
    return CausalMask(window)


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the conditions that `and_masks` has joined."""
    if mask_function.__qualname__ == "and_masks.<locals>.and_mask":
        for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]:
            yield from _parts(part)
    else:
        yield mask_function


def read_call(module: nn.Module, mask: Any, arguments: Mapping[str, Any]) -> CausalMask:
    """Return the rule of one attention call, from its `mask` and its further `arguments`.

    Raises ModelError for an argument that packed attention would have to ignore.
    """
    model_type = getattr(getattr(module, "config", None), "model_type", "the model")
    caller = f"({type(module).__name__})"
    if not isinstance(mask, CausalMask):
        given = "no mask" if mask is None else f"a mask of its own ({type(mask).__name__})"
        raise refusal(model_type, f"attends with {given} {caller}")
    if arguments.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise refusal(model_type, f"attends to later tokens (is_causal=False) {caller}")
    window = arguments.get("sliding_window")
    if window and window != mask.window:
        raise refusal(model_type, f"asks for sliding_window={window} with a mask of window {mask.window} {caller}")
    for name, value in arguments.items():
        if name not in _HARMLESS | {"is_causal", "sliding_window"} and value is not None:
            shown = f"={value}" if isinstance(value, (int, float, str)) else ""
            raise refusal(model_type, f"gives its attention {name}{shown} {caller}")
    return mask
