"""Configure how many processes hold a row, or a weight, together."""

from typing import Any, Literal

from pydantic import Field, model_validator

from rlqwen.config.base import PathText, Section
from rlqwen.config.deepspeed_keys import unused_note
from rlqwen.errors import ConfigError


class ParallelConfig(Section):
    """Configure the ranks of a run, which are data-parallel except for the groups configured here."""

    engine: Literal["deepspeed", "fsdp2"] = "deepspeed"
    """What holds the weights of several ranks. `fsdp2`: PyTorch's FSDP2; each rank holds a part of every matrix, of its
    gradient and of its optimizer state, for policy, reference and critic alike. `deepspeed`: ZeRO at `zero_stage`, which at
    stage 0 shards nothing."""
    deepspeed: PathText | dict[str, Any] | None = None
    """A ds_config in DeepSpeed's own form, or the path of one in JSON. Values `"auto"` are filled in from this config;
    other values fill in fields that this config leaves unset, and must not contradict it. None: no ds_config."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What data-parallel ranks shard besides the batch (DeepSpeed ZeRO, arXiv 1910.02054): 0 nothing, 1 the optimizer's
    state, 2 also gradients, 3 also weights."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in CPU memory and update there. Needs stage 1, 2 or 3."""
    offload_parameters: bool = False
    """Keep each rank's shard of the weights in CPU memory between uses. Needs stage 3."""
    sequence_parallel_size: int = Field(default=1, ge=1)
    """Ranks that forward each row together, one slice of its tokens each (DeepSpeed Ulysses, arXiv 2309.14509), for
    contexts whose activations do not fit on one. It must divide the ranks and the model's attention heads."""
    autotp_size: int = Field(default=1, ge=1)
    """Ranks that hold each layer together, one shard of its matrices each (DeepSpeed AutoTP). It must divide the ranks,
    the model's heads, key-value heads and intermediate size. For dense models without an adapter, with rollouts by
    vLLM; checkpoints hold the weights alone."""

    timeout: float = Field(default=600.0, gt=0)
    """Seconds that a rank waits for the others within an update before the run ends."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> "ParallelConfig":
        if self.offload_optimizer and self.zero_stage < 1:
            raise ValueError("offload_optimizer=true needs zero_stage 1, 2 or 3, but zero_stage is 0")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(f"offload_parameters=true needs zero_stage 3, but zero_stage is {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _one_engine(self) -> "ParallelConfig":
        if self.engine == "fsdp2":
            for name in ("deepspeed", "zero_stage", "offload_optimizer", "offload_parameters"):
                if (value := getattr(self, name)) not in (None, 0):
                    shown = f"={value}" if isinstance(value, int) else ""
                    raise ValueError(f"{name}{shown} is of DeepSpeed, and engine is fsdp2: leave one of them out")
            if self.autotp_size > 1:
                raise ValueError(
                    f"autotp_size={self.autotp_size} is of DeepSpeed, and engine is fsdp2, which shards the layers among all "
                    "ranks: leave autotp_size out"
                )
        return self

    @model_validator(mode="after")
    def _layers_in_shards_alone(self) -> "ParallelConfig":
        if self.autotp_size > 1 and self.zero_stage:
            raise ValueError(
                f"autotp_size={self.autotp_size} and zero_stage={self.zero_stage}: ZeRO would add up the gradients of "
                "different shards; set zero_stage to 0, or autotp_size to 1"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_group(self) -> "ParallelConfig":
        if self.sequence_parallel_size > 1 and self.autotp_size > 1:
            raise ValueError(
                f"sequence_parallel_size={self.sequence_parallel_size} and autotp_size={self.autotp_size} would both "
                "deal the attention heads out: set one of them"
            )
        return self

    def unused_note(self) -> str | None:
        """Return one line that names the ds_config keys that change nothing; None if all have an effect."""
        return unused_note(self.deepspeed, self.zero_stage) if isinstance(self.deepspeed, dict) else None

    def check_ranks(self, num_ranks: int) -> None:
        """Raise ConfigError if a run's ranks cannot be divided into the groups that see the same rows."""
        if num_ranks % self.ranks_per_row == 0:
            return
        name = "autotp_size" if self.autotp_size > 1 else "sequence_parallel_size"
        wanted = -(-num_ranks // self.ranks_per_row) * self.ranks_per_row
        raise ConfigError(
            f"parallel.{name}={self.ranks_per_row} must divide the number of ranks, which is {num_ranks}: start the run "
            f"with --nproc-per-node {wanted}, or set {name} to a divisor of {num_ranks}"
        )

    @property
    def cut_by(self) -> str:
        """Return the setting by which ranks share weights or optimizer state, as it is written; empty if none does."""
        if self.engine == "fsdp2":
            return "parallel.engine=fsdp2"
        return f"parallel.zero_stage={self.zero_stage}" if self.zero_stage else ""

    @property
    def ranks_per_row(self) -> int:
        """Return how many ranks see the same rows."""
        return self.sequence_parallel_size * self.autotp_size
