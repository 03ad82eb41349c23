"""Call the losses and normalizers that a config names."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from rlqwen.algorithms.loss_metrics import Metric
from rlqwen.algorithms.losses.reduction import Totals
from rlqwen.config import TrainerConfig
from rlqwen.packing.batch import PackedBatch
from rlqwen.plugins.kinds import LOSSES, NORMALIZERS
from rlqwen.plugins.named_call import NamedCall

NORMALIZER_INPUTS = ("lengths", "sequence", "num_tokens", "num_sequences")


class LossCall:
    """Call a loss that is found by name, and return `(losses, metrics)` even if it returns only losses."""

    def __init__(
        self,
        spec: str,
        *,
        inputs: Collection[str],
        settings: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Resolve the loss and check its signature; see NamedCall."""
        self._call = NamedCall.find(LOSSES, spec, inputs=inputs, settings=settings, arguments=arguments)

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Metric]]:
        """Return the losses, one per token or per sequence, and metrics."""
        result = self._call(inputs)
        losses, metrics = result if isinstance(result, tuple) else (result, {})
        return losses, dict(metrics)


class Normalizer:
    """Call a normalizer that is found by name."""

    def __init__(self, spec: str, settings: Mapping[str, Any]) -> None:
        self._call = NamedCall.find(NORMALIZERS, spec, inputs=NORMALIZER_INPUTS, settings=settings)

    def __call__(self, batch: PackedBatch, totals: Totals) -> Tensor:
        """Return the (N,) factors by which the token losses are multiplied."""
        factor_N: Tensor = self._call(
            {
                "lengths": batch.lengths_S,
                "sequence": batch.sequence_N,
                "num_tokens": max(totals.tokens, 1.0),
                "num_sequences": max(totals.sequences, 1.0),
            }
        )
        return factor_N


def settings_of(config: TrainerConfig) -> dict[str, Any]:
    """Return the fields of a config by name; plugins may take them as parameters."""
    return {name: getattr(config, name) for name in type(config).model_fields}
