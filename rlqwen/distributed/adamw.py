"""Build AdamW: PyTorch's, or that of bitsandbytes, whose moments have 8 bits."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rlqwen.config import TrainerConfig
from rlqwen.distributed.parameter_group import ParameterGroup
from rlqwen.errors import ConfigError


def build_adamw(groups: Sequence[ParameterGroup], args: TrainerConfig) -> torch.optim.Optimizer:
    """Return the AdamW that `args.optim` names, over all parameter groups; ConfigError if its library is missing."""
    parameters = [one for group in groups for one in group.groups(args.weight_decay)]
    betas = (args.adam_beta1, args.adam_beta2)
    if args.has_8bit_optimizer:
        require_8bit(args)
        library: Any = import_module("bitsandbytes.optim")
        optimizer: torch.optim.Optimizer = library.AdamW8bit(
            parameters, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon
        )
        return optimizer
    return torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=args.optim == "adamw_torch_fused"
    )


def require_8bit(args: TrainerConfig) -> None:
    """Raise ConfigError if `args` names an optimizer of bitsandbytes, and that is missing."""
    if args.has_8bit_optimizer and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optim={args.optim!r} needs bitsandbytes, which is not installed: pip install 'rlqwen[quantization]', or set "
            "it to 'adamw_torch_fused'"
        )


def state_to_save(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the tensors of a parameter's state; a number, and a table that parameters share, as one of its own."""
    state = optimizer.state.get(parameter, {})
    tensors = {key: torch.as_tensor(value).detach().cpu().contiguous() for key, value in state.items()}
    return {key: value.clone() if key.startswith("qmap") else value for key, value in tensors.items()}


def restore_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
    """Restore what `state_to_save` returned.

    Raises ConfigError if another kind of AdamW has saved it.
    """
    is_8bit = not isinstance(optimizer, torch.optim.AdamW)
    if ("state1" in saved) is not is_8bit:
        raise ConfigError(
            f"the checkpoint's optimizer has moments of {'8' if 'state1' in saved else '32'} bits, and that of this run of "
            f"{'8' if is_8bit else '32'}: set optim to what it was, or start from the checkpoint's weights (model.path)"
        )
    state = {key: value.to(parameter.device) for key, value in saved.items()}
    optimizer.state[parameter] = state | {"step": int(state["step"])} if is_8bit else state
