"""Whether an optimizer's state is still sound."""

import torch
from torch import Tensor
from torch.optim import Optimizer


@torch.no_grad()
def moments_are_finite(optimizer: Optimizer) -> bool:
    """Whether no moment is NaN or infinite: a single one would be in its weight after the next update, or hold it fast
    for ever. Reads the moments once, a fraction of what the update itself takes, and waits for each device once."""
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    sums: dict[torch.device, list[Tensor]] = {}
    for moment in moments:
        sums.setdefault(moment.device, []).append(moment.sum(dtype=torch.float32))
    if all(bool(torch.stack(part).isfinite().all()) for part in sums.values()):
        return True
    # A sum of finite values may overflow.
    return all(bool(moment.isfinite().all()) for moment in moments)
