"""Whether an optimizer's state is still sound."""

import math

import torch
from torch.optim import Optimizer


@torch.no_grad()
def moments_are_finite(optimizer: Optimizer) -> bool:
    """Whether no moment is NaN or infinite: a single one would be in its weight after the next update, or hold it fast
    for ever. Reads the moments once, and waits for the device once."""
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0
    ]
    if not moments:
        return True
    # The largest magnitude cannot overflow as a sum would; NaN goes through it.
    largest = torch._foreach_norm(moments, math.inf)
    return all(bool(torch.stack(part).isfinite().all()) for part in _by_device(largest).values())


def _by_device(values: list[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for value in values:
        parts.setdefault(value.device, []).append(value.float())
    return parts
