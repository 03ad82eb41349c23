"""How many processes hold a row, or a weight, together."""

from pydantic import Field, model_validator

from rlqwen.config.base import ArgumentsConfig


class ParallelConfig(ArgumentsConfig):
    """Ranks of the run: data parallel, but for the groups that are asked for here."""

    sequence_parallel_size: int = Field(default=1, ge=1)
    """Ranks that forward each row together, a slice of its tokens each (DeepSpeed Ulysses, arXiv 2309.14509): for
    contexts whose activations are too many for one. It must divide the ranks and the model's attention heads."""
    autotp_size: int = Field(default=1, ge=1)
    """Ranks that hold each layer together, a shard of its matrices each (DeepSpeed AutoTP). It must divide the ranks, the
    model's heads, key-value heads and intermediate size. Dense models without an adapter; rollouts by vLLM; checkpoints
    hold the weights alone."""

    @model_validator(mode="after")
    def _one_kind_of_group(self) -> "ParallelConfig":
        if self.sequence_parallel_size > 1 and self.autotp_size > 1:
            raise ValueError(
                f"sequence_parallel_size={self.sequence_parallel_size} and autotp_size={self.autotp_size} would both "
                "deal the attention heads out: set one of them"
            )
        return self

    @property
    def ranks_per_row(self) -> int:
        """Ranks that see the same rows."""
        return self.sequence_parallel_size * self.autotp_size
