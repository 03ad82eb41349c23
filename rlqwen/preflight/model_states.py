"""Compute the bytes of weights, gradients and optimizer states on one rank, for every engine."""

from dataclasses import dataclass

from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.parallel_layout import ParallelLayout

_EIGHT_BIT_MOMENTS = 2 + 8 / 256
"""Bytes per parameter of two moments, with two float32 scales per block of 256."""


@dataclass(frozen=True)
class Precision:
    """Say which copies of trained weights there are."""

    rounds_weights: bool
    """The forward reads half-precision weights, and DeepSpeed's optimizer keeps float32 ones."""
    has_masters: bool
    """Weights are in bfloat16, with masters and gradients in float32, without DeepSpeed."""
    eight_bit_moments: bool = False

    @property
    def moments(self) -> float:
        return _EIGHT_BIT_MOMENTS if self.eight_bit_moments else 8

    @property
    def masters(self) -> int:
        return 4 if self.rounds_weights or self.has_masters else 0


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank."""

    weights: float
    loaded: float
    """Weights while the model loads."""
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class StageSize:
    """Parameters of the base model on one pipeline stage."""

    layers: float
    """Those of the stage's layers that expert parallel ranks do not divide, and the last norm."""
    experts: float
    embedding: float
    """Those of embedding and head, as far as the stage has them."""

    @classmethod
    def of(cls, size: ModelSize, layout: ParallelLayout, *, is_last: bool) -> "StageSize":
        """Return the size of the first or the last stage; they are the same if there is only one."""
        parts = size.counts.parts
        embedding, head, experts = parts.get("embedding", 0), parts.get("head", 0), parts.get("routed experts", 0)
        layers = size.total - embedding - head - experts
        ends = embedding + head if layout.pp == 1 else (head or embedding) if is_last else embedding
        return cls(layers / layout.pp, experts / layout.pp, ends)

    @property
    def total(self) -> float:
        return self.layers + self.experts + self.embedding

    def held(self, layout: ParallelLayout) -> float:
        """Return the parameters that a rank computes with, if nothing else is divided."""
        return (self.layers + self.embedding) / layout.tp + self.experts / layout.expert_ranks

    def sharded(self, layout: ParallelLayout) -> float:
        """Return the parameters in a rank's shard."""
        return self.total / layout.states_rank


def model_states(size: ModelSize, layout: ParallelLayout, stage: StageSize, precision: Precision) -> ModelStates:
    """Return the bytes of the trained model on one rank of a stage."""
    frozen = size.frozen_bytes * stage.total / size.total
    if size.adapters is None:
        held, shard = stage.held(layout), stage.sharded(layout)
    else:
        held = size.num_trained / (layout.pp * layout.tp)
        shard = held / layout.fsdp
    if layout.is_sharded:
        # An adapter is put on a base that lies in parts already, and stays whole.
        return _fsdp2_states(size, layout, frozen, shard if size.adapters is None else held, precision)
    if layout.engine == "megatron":
        return ModelStates(2 * held + frozen, 2 * held + frozen, 4 * held, 12 * shard)
    return _deepspeed_states(layout, frozen, held, shard, precision)


def _fsdp2_states(
    size: ModelSize, layout: ParallelLayout, frozen: float, trained: float, precision: Precision
) -> ModelStates:
    """Return float32 weights, gradients and moments of the trained parameters that a rank holds.

    While loading there are also two layers that are being read.
    """
    largest = max(shape.dense / layout.tp + shape.experts / layout.expert_ranks for shape in size.shapes)
    weights = 4 * trained + frozen / layout.states_rank
    loaded = weights + 2 * 4 * largest
    if layout.offload_optimizer or layout.offload_parameters:
        return ModelStates(0.0, 2 * 4 * largest, 0.0, 0.0)
    return ModelStates(weights, loaded, 4 * trained, precision.moments * trained)


def _deepspeed_states(
    layout: ParallelLayout, frozen: float, held: float, shard: float, precision: Precision
) -> ModelStates:
    """Return what a single process holds, or a rank with DeepSpeed, which loads the whole model first."""
    is_half = precision.rounds_weights or precision.has_masters
    loaded = 4 * held + frozen
    weights = (2 if is_half else 4) * held + frozen
    gradients = (2 if precision.rounds_weights else 4) * held
    optimizer = (precision.moments + precision.masters) * held
    if layout.zero_stage == 3:
        weights /= layout.fsdp
    if layout.zero_stage >= 2 or precision.rounds_weights:
        gradients *= shard / held
    if layout.zero_stage:
        optimizer = 0.0 if layout.offload_optimizer else optimizer * shard / held
    return ModelStates(0.0 if layout.offload_parameters else weights, loaded, gradients, optimizer)
