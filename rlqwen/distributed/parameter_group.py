"""Weights that are trained together."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(slots=True, frozen=True)
class ParameterGroup:
    """Weights that are trained together and whose gradient is clipped apart from other parts': a policy, a critic."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float
    names: list[str] = field(default_factory=list)
    """Of the parameters, in order, by which an optimiser's state finds them again; numbers where none are given."""

    module: nn.Module | None = None
    """What holds the parameters; a forward on them goes through it, for weights in shards to be put together."""

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser: matrices decay, vectors don't."""
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
        """Parameters by names that are unique among all parts."""
        names = self.names or [str(number) for number in range(len(self.parameters))]
        for name, parameter in zip(names, self.parameters, strict=True):
            yield f"{self.name}/{name}", parameter
