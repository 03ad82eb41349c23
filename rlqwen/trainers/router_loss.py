"""Weigh the load-balancing loss of a mixture's routers over the micro-batches of an update."""

from collections.abc import Sequence

from torch import Tensor

from rlqwen.distributed import Ranks
from rlqwen.models.packed_model import PackedModel
from rlqwen.packing.batch import PackedBatch
from rlqwen.trainers.micro_batching import count_tokens


class RouterLoss:
    """Return the routers' loss of the forward just made; 0 for a dense model.

    Each micro-batch's loss counts by its share of the update's tokens. The load is the micro-batch's own, so unlike other
    losses this one depends on the split, as it does in TRL.
    """

    def __init__(self, policy: PackedModel, ranks: Ranks) -> None:
        self._policy = policy
        self._ranks = ranks
        self._counted: Sequence[PackedBatch] | None = None
        """The micro-batches that `_tokens_per_update` counts."""
        self._tokens_per_update = 0.0

    def __call__(
        self, micro: PackedBatch, micro_batches: Sequence[PackedBatch], model: PackedModel | None = None
    ) -> Tensor | float:
        """Return the weighted loss of the forward of `model` (None: the policy) on `micro`.

        `micro_batches`: all of this rank's in the update.
        """
        model = model or self._policy
        if not model.routers.coefficient:
            return 0.0
        return model.router_loss(self.token_share(micro, micro_batches))

    def token_share(self, micro: PackedBatch, micro_batches: Sequence[PackedBatch]) -> float:
        """Return the micro-batch's share of the tokens that the update has on all ranks, each prefix counted once."""
        if self._counted is not micro_batches:
            self._counted = micro_batches
            self._tokens_per_update = self._ranks.sum({"tokens": count_tokens(micro_batches)})["tokens"]
        return count_tokens([micro]) / self._tokens_per_update
