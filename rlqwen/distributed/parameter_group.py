"""Group weights that are trained together."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(slots=True, frozen=True)
class ParameterGroup:
    """Hold weights that are trained together, such as a critic's; each group's gradient is clipped separately."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float
    names: list[str] = field(default_factory=list)
    """Names of the parameters, in order, under which their optimizer state is saved; none: numbers."""

    module: nn.Module | None = None
    """The module that holds the parameters; forwards go through it, so that sharded weights are gathered."""

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: matrices get weight decay, vectors do not."""
        groups = [
            {
                "params": [p for p in self.parameters if p.ndim >= 2],
                "weight_decay": weight_decay,
                "lr": self.learning_rate,
            },
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0, "lr": self.learning_rate},
        ]
        return [group for group in groups if group["params"]]

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters by names that are unique among all groups."""
        names = self.names or [str(number) for number in range(len(self.parameters))]
        for name, parameter in zip(names, self.parameters, strict=True):
            yield f"{self.name}/{name}", parameter
