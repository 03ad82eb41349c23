"""Run gated delta-net layers (Qwen3-Next, Qwen3.5 and later) over a packed row: fork a prefix's state to its branches.

transformers' layers call two functions of their module that mix tokens: a causal convolution and the gated delta rule
(arXiv 2412.06464). `install` replaces them by functions that know the row's layout, which is passed as a keyword of the
model's forward. Without a layout, as in generation, the functions are unchanged.

The convolution is that of transformers, over a row in which each sequence is preceded by the tokens that it continues.
The rule runs in chunks: everything inside a chunk is computed for all chunks of the row at once, then one scan over
their depths carries states from prefixes into branches. On a GPU with flash-linear-attention its kernel runs instead,
over the segments that begin trees first, then from their states over those that continue them, and so on. Gradients
flow back the same ways.

Shapes: T tokens in the row, N chunks of C tokens, H value heads, K and V widths of keys and values, D channels.
"""

import contextlib
import functools
import importlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlqwen.errors import ModelError
from rlqwen.packing.delta_plan import DeltaPlan
from rlqwen.packing.row_layout import Layout

MODULES = {
    "qwen3_next": "transformers.models.qwen3_next.modeling_qwen3_next",
    "qwen3_5_text": "transformers.models.qwen3_5.modeling_qwen3_5",
    "qwen3_5_moe_text": "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
}
"""`model_type` of the text config -> module of its layers."""
LAYER = "linear_attention"
CONVOLUTION, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
_PARAMETERS = {
    CONVOLUTION: ["hidden_states", "weight", "bias", "activation"],
    RULE: ["query", "key", "value", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"],
}
_CALLS = "delta_net_calls"
_HUB_KERNELS = "transformers.integrations.hub_kernels"


def is_delta_net(text_config: Any) -> bool:
    """Return whether `install` knows the recurrent layers of a model with this configuration."""
    return getattr(text_config, "model_type", None) in MODULES


def install(text_config: Any) -> None:
    """Let layers of this configuration's class fork states by the layout of a packed row; later calls change nothing.

    Raises ModelError if transformers' module is not built as expected, because results would be wrong.
    """
    module = importlib.import_module(MODULES[text_config.model_type])
    layers = [cls for name, cls in vars(module).items() if name.endswith("GatedDeltaNet") and inspect.isclass(cls)]
    problems = [f"{len(layers)} classes *GatedDeltaNet instead of 1"] if len(layers) != 1 else _unlike(layers[0])
    for name, parameters in _PARAMETERS.items():
        function = getattr(module, name, None)
        # The package `kernels` replaces functions by modules.
        called = function.forward if isinstance(function, nn.Module) else function
        known = [] if called is None else list(inspect.signature(called).parameters)
        if getattr(function, "is_packed", False) is False and not set(parameters) <= set(known):
            problems.append(f"no function {name}({', '.join(parameters)})")
    if problems:
        import transformers

        raise ModelError(
            f"transformers {transformers.__version__}: {module.__name__} has {' and '.join(problems)}, so that packed "
            "rows cannot run through its delta-net layers; install the transformers version that rlqwen names"
        )
    logging.getLogger(_HUB_KERNELS).addFilter(_is_no_fallback)
    for name, packed in ((CONVOLUTION, packed_convolution), (RULE, packed_rule)):
        function = getattr(module, name)
        if not getattr(function, "is_packed", False):
            setattr(module, name, _with_layout(function, name, packed))


def _is_no_fallback(record: logging.LogRecord) -> bool:
    """Filter transformers' advice to install kernels, which do not run on a CPU; `kernel_note` gives it on a GPU."""
    return "is falling back to its reference PyTorch implementation" not in record.getMessage()


def kernel_note(text_config: Any, device_type: str) -> str | None:
    """Return a note on what would make the delta-net layers faster on a device; None if nothing would."""
    if device_type != "cuda" or not is_delta_net(text_config) or _kernel(device_type) is not None:
        return None
    return (
        "delta-net layers are computed by PyTorch's operations, exactly but slower than by flash-linear-attention's "
        "kernels: pip install flash-linear-attention"
    )


def _unlike(layer: type) -> list[str]:
    """Return how the layer's forward differs from what is expected."""
    forward = inspect.unwrap(layer.forward)  # type: ignore[attr-defined]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(forward).parameters.values()):
        return [f"a {layer.__name__}.forward without **kwargs"]
    missing = [name for name in _PARAMETERS if name not in forward.__code__.co_names]
    return [f"a {layer.__name__}.forward that does not call {name}" for name in missing]


def _with_layout(original: Callable[..., Any], name: str, packed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def function(*args: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return original(*args, **kwargs)
        if _CALLS in layout.computed:
            layout.computed[_CALLS][name] += 1
        return packed(original, layout, *args, **kwargs)

    function.is_packed = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def checked(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Check that a forward of `model` inside runs each of its delta-net layers by `layout`; ModelError if not.

    A layer replaced by a kernel library or a wrapper would otherwise treat the row as one long sequence.
    """
    config = model.config.get_text_config(decoder=True)
    expected = list(getattr(config, "layer_types", None) or []).count(LAYER) if is_delta_net(config) else 0
    calls = layout.computed[_CALLS] = Counter[str]()
    yield
    del layout.computed[_CALLS]
    for name in _PARAMETERS:
        if calls[name] != expected:
            raise ModelError(
                f"{calls[name]} of the {expected} delta-net layers of {type(model).__name__} called {name} with the packed "
                "row's layout, so that sequences would run into each other: load the model without use_kernels, and "
                "with transformers' own layers"
            )


def _plan(layout: Layout, num_tokens: int, device: torch.device) -> DeltaPlan:
    plan: DeltaPlan | None = layout.computed.get("delta_plan")
    if plan is None or plan.device != device:
        plan = layout.computed["delta_plan"] = DeltaPlan(layout, num_tokens, device)
    return plan


def packed_convolution(
    original: Callable[..., Tensor],
    layout: Layout,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """Apply `original`, a causal convolution on (1, D, T) with `weight` (D, width), to each sequence after its prefix."""
    row_TD = hidden_states[0].transpose(0, 1)
    order = _plan(layout, len(row_TD), row_TD.device).halos(weight.shape[-1])
    spread = order.spread(row_TD).transpose(0, 1)[None]
    convolved_LD = original(spread, weight, bias, activation=activation)[0].transpose(0, 1)
    return order.collect(convolved_LD).transpose(0, 1)[None]


def packed_rule(
    original: Callable[..., Any],
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the gated delta rule's (1, T, H, V) outputs for each sequence from its prefix's state.

    query and key (1, T, H, K), value (1, T, H, V), g (log of the decay) and beta (1, T, H). Raises ValueError with a
    state from outside the row.
    """
    if initial_state is not None or output_final_state:
        raise ValueError(
            "a packed row runs through delta-net layers without a cache: call the model with use_cache=False"
        )
    plan = _plan(layout, query.shape[1], query.device)
    kernel = _kernel(query.device.type)
    if kernel is not None:
        return staged_rule(kernel, plan, query, key, value, g, beta, use_qk_l2norm_in_kernel), None
    row = (query[0], key[0], value[0], g[0], beta[0])
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        output_THV = chunked_rule(plan, *(tensor.to(exact) for tensor in row), normalize=use_qk_l2norm_in_kernel)
    return output_THV[None].to(query.dtype), None


@functools.cache
def _kernel(device_type: str) -> Callable[..., Any] | None:
    """Return flash-linear-attention's kernel, found as transformers finds it; None if it is missing, or on a CPU."""
    if device_type == "cpu":
        return None
    try:
        module: Any = importlib.import_module("fla.ops.gated_delta_rule")
    except (ImportError, RuntimeError, OSError, AttributeError):
        return None
    kernel: Callable[..., Any] | None = getattr(module, "chunk_gated_delta_rule", None)
    return kernel


def staged_rule(
    kernel: Callable[..., Any],
    plan: DeltaPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    normalize: bool,
) -> Tensor:
    """Return the (1, T, H, V) outputs of a kernel that takes sequences' lengths and states: one call per stage."""
    stages, home_T = plan.stages()
    outputs, states = [], None
    for number, stage in enumerate(stages):
        tokens = (tensor.index_select(1, stage.source_L) for tensor in (query, key, value, g, beta))
        output, states = kernel(
            *tokens,
            initial_state=None if stage.parent is None or states is None else states.index_select(0, stage.parent),
            output_final_state=number + 1 < len(stages),
            use_qk_l2norm_in_kernel=normalize,
            cu_seqlens=stage.cu_seqlens,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1).index_select(1, home_T)


def chunked_rule(
    plan: DeltaPlan, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *, normalize: bool
) -> Tensor:
    """Return the (T, H, V) outputs of the rule; query and key (T, H, K), value (T, H, V), g and beta (T, H).

    With S the state (K, V) before a chunk, A the decay between two of its tokens, and d the decay since the chunk's
    start, a chunk adds beta_i k_i (v_i - what the state already holds under k_i) per token i. The new values solve a
    triangular system (the UT transform of arXiv 2406.06484), so that all of a chunk is a few matrix products.
    """
    num_heads = query.shape[1]
    order, depths = plan.chunks(num_heads)
    if normalize:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    chunk = len(order.source_L) // num_heads // depths[-1].end

    def chunks(x: Tensor) -> Tensor:
        return order.spread(x.reshape(-1, *x.shape[2:])).view(-1, num_heads, chunk, *x.shape[2:])

    query, key, value, g, beta = map(chunks, (query * query.shape[-1] ** -0.5, key, value, g, beta))
    since_start = g.cumsum(-1)
    to_end = (since_start[..., -1:] - since_start).exp().unsqueeze(-1)
    from_start = since_start.exp().unsqueeze(-1)
    # The decay from a token to itself is the constant 1: gradients that cancel would add rounding errors to those of g.
    fixed = torch.full((chunk, chunk), float("-inf"), device=g.device, dtype=g.dtype).triu(1)
    is_fixed = torch.ones(chunk, chunk, dtype=torch.bool, device=g.device).triu()
    decay = torch.where(is_fixed, fixed, since_start.unsqueeze(-1) - since_start.unsqueeze(-2)).exp()

    learned_key = key * beta.unsqueeze(-1)
    key_T = key.transpose(-1, -2)
    right = torch.cat([value * beta.unsqueeze(-1), learned_key * from_start], dim=-1)
    solved = torch.linalg.solve_triangular((learned_key @ key_T) * decay, right, upper=False, unitriangular=True)
    new_value, old_key = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    attention = (query @ key_T) * decay
    outputs = _scan(depths, query * from_start, old_key, new_value, attention, key * to_end, from_start[..., -1:, :])
    return order.collect(outputs.flatten(0, 2)).view(-1, num_heads, value.shape[-1])


def _scan(
    depths: list[Any], query: Tensor, old_key: Tensor, new_value: Tensor, attention: Tensor, key: Tensor, decay: Tensor
) -> Tensor:
    """Return the (N, H, C, V) outputs of all chunks, each from the state after the chunk before it; see `chunked_rule`.

    decay (N, H, 1, 1): decay of the state over a whole chunk.
    """
    sizes = [
        depth.end - depth.start for depth in depths
    ]  # split, because the gradient of each slice would be as large as the row
    parts = zip(*(tensor.split(sizes) for tensor in (query, old_key, new_value, attention, key, decay)), strict=True)
    outputs: list[Tensor] = []
    states = new_value  # states of the parents, one depth before; not read at the first depth
    for depth, (own_query, own_old_key, added, own_attention, own_key, own_decay) in zip(depths, parts, strict=True):
        count = depth.num_parents
        if depth.parent is None:
            output = own_attention @ added
        else:
            states = states.index_select(0, depth.parent)
            added = added - own_old_key @ states
            output = own_query @ states + own_attention @ added
        outputs.append(output)
        if count:
            update = own_key[:count].transpose(-1, -2) @ added[:count]
            states = update if depth.parent is None else states[:count] * own_decay[:count] + update
    return torch.cat(outputs)
