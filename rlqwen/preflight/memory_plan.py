"""Hold the memory of one GPU, part by part and phase by phase, and the largest micro-batch, which bounds it."""

from dataclasses import dataclass, field

from rlqwen.config import OnlineConfig, PreferenceConfig, Recipe, SFTConfig
from rlqwen.config.batch_plan import prompt_room

GIB = 2**30
LOAD, SAMPLING, BACKWARD, STEP, SYNC = "load", "sampling", "forward/backward", "optimizer step", "weight sync"
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill; PyTorch's allocator leaves gaps. An assumption."""
CONTEXT_BYTES = GIB // 2
"""CUDA context and libraries of one process. An assumption; an H100 takes about that."""
ENGINE_WORKSPACE = 3 * GIB // 2
"""What a vLLM engine needs besides weights and KV cache. An assumption."""


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch that a recipe can make."""

    tokens: int
    """Tokens of the packed row."""
    targets: int
    longest: int
    """Tokens of the longest sequence, below which a micro-batch cannot be split."""
    count: int
    """Micro-batches of an update; if there is one, there are no gradients before its backward pass."""

    @classmethod
    def of(cls, recipe: Recipe, context: int, longest: int | None = None) -> "MicroBatch":
        """Bound the micro-batch by the config, and by the data's `longest` row in tokens where it is known."""
        train, count = recipe.train, recipe.train.per_device_train_batch_size
        if isinstance(train, OnlineConfig):
            prompt = min(prompt_room(context, train), longest or context)
            completions = count * train.max_completion_length
            tokens = completions + -(-count // train.num_generations) * prompt
            targets, longest = completions, prompt + train.max_completion_length
        else:
            limit = min(getattr(train, "max_length", None) or context, context)
            is_packed = isinstance(train, SFTConfig) and train.packing
            longest = limit if is_packed or longest is None else min(limit, longest)
            longest *= 2 if isinstance(train, PreferenceConfig) else 1
            tokens = targets = count * longest
        most, number = train.max_tokens_per_micro_batch, train.gradient_accumulation_steps
        if most is not None:
            whole, tokens = tokens, min(tokens, max(most, longest))
            number *= -(-whole // tokens)
        return cls(tokens, min(targets, tokens), longest, number)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU by part and phase, without those of rollout engines."""

    parts: dict[str, dict[str, float]]
    micro_batch: MicroBatch
    engine_share: float = 0.0
    """Share of the GPU that rollout engines take while the trainer is on it; 0 if they are elsewhere, or measure it."""
    engine_bytes: float = 0.0
    """The least that an engine works with: weights, the KV cache of one sequence, and room to compute."""
    engine_sleeps: bool = False
    """Whether engines take their share only in sampling and weight sync."""
    phases: list[str] = field(default_factory=list)

    def total(self, phase: str) -> float:
        """Return the bytes of all parts in a phase."""
        return sum(part.get(phase, 0.0) for part in self.parts.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        """Return the largest total of any phase."""
        return self.total(self.peak_phase)

    @property
    def shared_phases(self) -> set[str]:
        """Return the phases in which engines hold their memory, if there are any on this GPU."""
        return {SAMPLING, SYNC} if self.engine_sleeps else {phase for phase in self.phases if phase != LOAD}

    def engine_memory(self, gpu_bytes: float | None) -> dict[str, float]:
        """Return the bytes of an engine by phase on a GPU of `gpu_bytes`; None: on the smallest that fits."""
        gpu_bytes = self.smallest_gpu if gpu_bytes is None else gpu_bytes
        taken = max(self.engine_share * gpu_bytes, self.engine_bytes) if gpu_bytes < float("inf") else self.engine_bytes
        return dict.fromkeys(self.shared_phases, taken) if self.engine_bytes else {}

    @property
    def smallest_gpu(self) -> float:
        """Return the bytes of the smallest GPU on which everything fits; infinite if engines leave no room."""
        shared = max((self.total(phase) for phase in self.shared_phases), default=0.0)
        alone = max((self.total(phase) for phase in self.phases if phase not in self.shared_phases), default=0.0)
        if self.engine_share:
            room = USABLE - self.engine_share
            beside = max(shared / room, self.engine_bytes / self.engine_share) if room > 0 else float("inf")
        else:
            beside = (shared + self.engine_bytes) / USABLE
        return max(alone / USABLE, beside)
