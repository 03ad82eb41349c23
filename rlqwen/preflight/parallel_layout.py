"""Describe how ranks divide a model and its rows, for plans of memory and time."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rlqwen.config import ParallelConfig
from rlqwen.errors import ConfigError

Engine = Literal["fsdp2", "deepspeed", "megatron"]
"""`megatron`: for comparison with runs of Megatron-LM, which rlqwen does not run: ZeRO 1 with float32 gradients, and tensor
parallel ranks that also divide the residual stream."""
_SIZES = ("fsdp", "tp", "ep", "sp", "pp")


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the groups of ranks. There are `fsdp` x `tp` x `pp` ranks; `ep` and `sp` divide the `fsdp` ranks further."""

    engine: Engine = "fsdp2"
    fsdp: int = 1
    """Ranks that share the weights of a stage, or with DeepSpeed what `zero_stage` says."""
    tp: int = 1
    """Ranks that divide the matrices of each layer (tensor parallel)."""
    ep: int = 1
    """Ranks that divide the experts of each layer, and send tokens to each other (expert parallel)."""
    sp: int = 1
    """Ranks that divide the tokens of each row (sequence parallel)."""
    pp: int = 1
    """Stages that divide the layers (pipeline parallel)."""
    zero_stage: int = 3
    """DeepSpeed's stage; FSDP2 always divides everything."""
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig, num_ranks: int) -> "ParallelLayout":
        """Return the layout of `num_ranks` ranks under a recipe's `parallel` section.

        A group that is larger than the number of ranks counts as all of them.
        """
        tp = min(max(parallel.autotp_size, getattr(parallel, "tp", 1)), num_ranks)
        pp = min(getattr(parallel, "pp", 1), num_ranks // tp)
        fsdp = max(1, num_ranks // (tp * pp))
        return cls(
            engine=parallel.engine,
            fsdp=fsdp,
            tp=tp,
            ep=min(getattr(parallel, "ep", 1), fsdp),
            sp=min(max(parallel.sequence_parallel_size, getattr(parallel, "sp", 1)), num_ranks),
            pp=pp,
            zero_stage=parallel.zero_stage if parallel.engine == "deepspeed" else 3,
            offload_optimizer=parallel.offload_optimizer,
            offload_parameters=parallel.offload_parameters,
        )

    @classmethod
    def parse(cls, text: str, num_ranks: int) -> "ParallelLayout":
        """Read `fsdp=16,ep=8`, or `engine=deepspeed,zero=2,offload=true`; a missing `fsdp` is what the others leave.

        Raises ConfigError if it does not make `num_ranks` ranks.
        """
        values: dict[str, Any] = {}
        for word in filter(None, (word.strip() for word in text.split(","))):
            key, _, value = word.partition("=")
            if key == "engine" and value in get_args(Engine):
                values[key] = value
            elif key in _SIZES and value.isdecimal() and int(value) > 0:
                values[key] = int(value)
            elif key == "zero" and value in ("0", "1", "2", "3"):
                values["zero_stage"] = int(value)
            elif key == "offload" and value in ("true", "false"):
                values["offload_optimizer"] = value == "true"
            else:
                raise ConfigError(
                    f"--layout: {word[:200]!r} is none of fsdp=, tp=, ep=, sp=, pp= with a number from 1 on, "
                    "engine=fsdp2|deepspeed|megatron, zero=0|1|2|3, offload=true|false"
                )
        if "zero_stage" in values and values.setdefault("engine", "deepspeed") != "deepspeed":
            raise ConfigError("--layout: zero= is for engine=deepspeed; fsdp2 divides weights, gradients and optimizer")
        divided = values.get("tp", 1) * values.get("pp", 1)
        layout = cls(**({"fsdp": max(1, num_ranks // divided)} | values))
        if layout.num_ranks != num_ranks:
            raise ConfigError(
                f"--layout: {text[:200]!r} makes fsdp={layout.fsdp} x tp={layout.tp} x pp={layout.pp} = "
                f"{layout.num_ranks} ranks, and there are {num_ranks} GPUs (ep and sp divide the fsdp ranks)"
            )
        return layout

    @property
    def num_ranks(self) -> int:
        return self.fsdp * self.tp * self.pp

    @property
    def data_ranks(self) -> int:
        """Return how many ranks, or groups of them, see different rows."""
        return max(1, self.fsdp // self.sp)

    @property
    def expert_ranks(self) -> int:
        """Return among how many ranks a layer's experts are divided as they compute; Megatron's `tp` leaves them whole."""
        return self.ep * (1 if self.engine == "megatron" else self.tp)

    @property
    def is_sharded(self) -> bool:
        """Return whether FSDP2 shards the model: it does nothing on a single rank."""
        return self.engine == "fsdp2" and self.num_ranks > 1

    @property
    def missing(self) -> list[str]:
        """Return the sizes that a recipe cannot ask for, because this version of rlqwen does not have such groups."""
        return [key for key in ("tp", "ep", "pp") if getattr(self, key) > 1 and key not in ParallelConfig.model_fields]

    @property
    def is_runnable(self) -> bool:
        """Return whether this version of rlqwen trains with the layout."""
        return self.engine == "deepspeed" or (self.engine == "fsdp2" and not self.missing)

    @property
    def keys(self) -> str:
        """Return the layout as keys of a recipe, if it is one that runs, else as the option of `rlqwen plan`."""
        if not self.is_runnable:
            return f"--layout {self}"
        words = [f"parallel.{key}={getattr(self, key)}" for key in ("tp", "ep", "pp") if getattr(self, key) > 1]
        if self.engine == "deepspeed":
            words = [f"parallel.zero_stage={self.zero_stage}"]
            words += [f"parallel.autotp_size={self.tp}"] if self.tp > 1 else []
            words += ["parallel.offload_optimizer=true"] if self.offload_optimizer else []
        elif self.num_ranks > 1:
            words = ["parallel.engine=fsdp2", *words]
        return " ".join([*words, *([f"parallel.sequence_parallel_size={self.sp}"] if self.sp > 1 else [])])

    @property
    def states_rank(self) -> int:
        """Return among how many ranks optimizer states of dense weights are divided."""
        return self.tp * self.fsdp

    def faults(self, config: Any) -> list[str]:
        """Return why a model cannot be divided so; `config`: that of its text model."""
        experts = int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0)
        counted = [
            ("sp", self.sp, "the fsdp ranks", self.fsdp),
            ("ep", self.ep, "the fsdp ranks", self.fsdp),
            ("tp", self.tp, "the attention heads", config.num_attention_heads),
            ("tp", self.tp, "the key-value heads", config.num_key_value_heads),
            ("sp", self.sp, "the attention heads", config.num_attention_heads),
            ("pp", self.pp, "the layers", config.num_hidden_layers),
        ]
        if getattr(config, "linear_num_key_heads", None):
            counted.append(("tp", self.tp, "the key heads of delta-net layers", config.linear_num_key_heads))
        found = [f"{key}={size} does not divide {what} ({whole})" for key, size, what, whole in counted if whole % size]
        if self.ep > 1 and not experts:
            found.append(f"ep={self.ep}: the model has no experts")
        elif self.ep > 1 and experts % self.ep:
            found.append(f"ep={self.ep} does not divide the experts of a layer ({experts})")
        if self.engine == "deepspeed":
            found += [
                f"{key}={size} needs engine=fsdp2" for key, size in (("ep", self.ep), ("pp", self.pp)) if size > 1
            ]
            if self.tp > 1 and self.zero_stage:
                found.append(f"tp={self.tp} with DeepSpeed needs zero=0")
        return found

    def check(self, config: Any) -> None:
        """Raise ConfigError if a model cannot be divided so."""
        if found := self.faults(config):
            raise ConfigError(f"layout {self}: {'; '.join(found)}")

    def with_sizes(self, **sizes: Any) -> "ParallelLayout":
        return replace(self, **sizes)

    def __str__(self) -> str:
        sizes = [f"{key}={getattr(self, key)}" for key in _SIZES if key == "fsdp" or getattr(self, key) > 1]
        if self.engine == "deepspeed":
            sizes = [f"zero={self.zero_stage}", *sizes]
        if self.engine != "fsdp2":
            sizes = [f"engine={self.engine}", *sizes]
        if self.offload_optimizer or self.offload_parameters:
            sizes.append("offload=true")
        return ",".join(sizes)
