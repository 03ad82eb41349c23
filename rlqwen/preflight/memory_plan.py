"""Compute the memory of one GPU, part by part and phase by phase, from a recipe and the shape of its model."""

from dataclasses import dataclass, field

from rlqwen.config import DistillationConfig, DPOConfig, OnlineConfig, PPOConfig, PreferenceConfig, Recipe, SFTConfig
from rlqwen.config.batch_plan import prompt_room
from rlqwen.packing.logprobs import VOCABULARY_CHUNK
from rlqwen.preflight.activations import (
    ForwardRules,
    attention_outputs,
    checkpoint_bytes,
    decoder_layers,
    head_activations,
    head_width,
    layer_activations,
)
from rlqwen.preflight.model_size import ModelSize, frozen_dtype
from rlqwen.rollout.engine import engine_class
from rlqwen.rollout.engine_placement import SHARED, Machine, shares_gpus, take_turns

GIB = 2**30
LOAD, SAMPLING, BACKWARD, STEP, SYNC = "load", "sampling", "forward/backward", "optimizer step", "weight sync"
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill; PyTorch's allocator leaves gaps. An assumption."""
CONTEXT_BYTES = GIB // 2
"""CUDA context and libraries of one process. An assumption; an H100 takes about that."""
ENGINE_WORKSPACE = 3 * GIB // 2
"""What a vLLM engine needs besides weights and KV cache. An assumption."""
_HEAD_TOKENS = 4096
"""Tokens that TRL's kernels read at a time."""


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch that a recipe can make."""

    tokens: int
    """Tokens of the packed row."""
    targets: int
    longest: int
    """Tokens of the longest sequence, below which a micro-batch cannot be split."""
    is_only: bool
    """Whether an update has no other micro-batch, so that there are no gradients before its backward pass."""

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
        most = train.max_tokens_per_micro_batch
        is_only = train.gradient_accumulation_steps == 1
        if most is not None:
            is_only = is_only and tokens <= most
            tokens = min(tokens, max(most, longest))
        return cls(tokens, min(targets, tokens), longest, is_only)


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


def plan_memory(
    recipe: Recipe, size: ModelSize, *, longest: int | None = None, num_ranks: int = 1, on_gpu: bool = True
) -> MemoryPlan:
    """Return the plan of one of `num_ranks` GPUs, or of a trainer on CPU.

    `longest`: tokens of the longest row of the data, or prompt; None: what the config allows.
    """
    return _Planner(recipe, size, longest, num_ranks, on_gpu).plan()


class _Planner:
    """Compute the parts of a plan; all are bytes on one GPU."""

    def __init__(self, recipe: Recipe, size: ModelSize, longest: int | None, num_ranks: int, on_gpu: bool) -> None:
        self.recipe, self.train, self.size, self.on_gpu = recipe, recipe.train, size, on_gpu
        self.rows = MicroBatch.of(recipe, size.facts.context, longest)
        parallel = self.train.parallel
        self.stage = parallel.zero_stage
        self.tensor_ranks = min(parallel.autotp_size, num_ranks)
        self.row_ranks = min(parallel.sequence_parallel_size, num_ranks)
        self.ranks = max(1, num_ranks // self.tensor_ranks)
        """Ranks that ZeRO shards among."""
        wants_half = self.train.bf16 is not False if on_gpu else bool(self.train.bf16)
        self.half = wants_half or self.train.fp16
        self.rounds_weights = bool(self.stage and self.half)
        """Whether the forward reads half-precision weights, and the optimizer keeps float32 ones."""
        self.width = 2 if self.rounds_weights else 4
        self.has_masters = self.train.master_weights and self.half and not self.stage
        """Whether weights are in bfloat16, with masters and gradients in float32."""
        self.config = size.text_config
        half_weights = (
            self.rounds_weights
            or self.has_masters
            or (size.adapters is not None and frozen_dtype(recipe.model, size.facts) != "float32")
        )
        self.rules = ForwardRules.of(on_gpu=on_gpu, half=self.half, adapters=size.adapters, half_weights=half_weights)

    @property
    def recomputes(self) -> bool:
        """Return whether layers are computed again in the backward pass."""
        checkpointing = self.train.gradient_checkpointing
        return self.on_gpu if checkpointing is None else bool(checkpointing)

    def plan(self) -> MemoryPlan:
        phases = (
            [LOAD, SAMPLING, BACKWARD, STEP, SYNC] if isinstance(self.train, OnlineConfig) else [LOAD, BACKWARD, STEP]
        )
        always = dict.fromkeys(phases, 1.0)
        later = {phase: 1.0 for phase in phases if phase != LOAD}
        weights, loaded, gradients, optimizer = self.states()
        kept, left = self.activations()
        grown = 0.0 if self.rows.is_only else gradients
        at_start = {"gradients": grown, "activations": kept, "head": self.head()}
        at_end = {"gradients": gradients, "activations": left, "head": 0.0}
        backward = max(at_start, at_end, key=lambda moment: sum(moment.values()))
        parts = {
            "weights": {LOAD: loaded} | dict.fromkeys(later, weights),
            "gradients": {BACKWARD: backward["gradients"], STEP: gradients},
            "optimizer": dict.fromkeys(later, optimizer),
            "activations": {BACKWARD: backward["activations"]},
            "head": {BACKWARD: backward["head"]},
            "buffers": {BACKWARD: self.casts(), STEP: self.step_copies(), SYNC: 2 * self._embedding()},
        }
        parts |= self.other_models(always, later, weights, gradients, optimizer)
        share, least, sleeps = self.engine()
        if self.on_gpu:
            processes = {LOAD: 1} | dict.fromkeys(later, 2 if least else 1)
            parts["CUDA contexts"] = {phase: count * CONTEXT_BYTES for phase, count in processes.items()}
        shown = {name: part for name, part in parts.items() if any(part.get(phase) for phase in phases)}
        return MemoryPlan(shown, self.rows, share, least, sleeps, phases)

    def states(self) -> tuple[float, float, float, float]:
        """Return the bytes of weights in training, weights while loading, gradients, and the optimizer's state."""
        trained = self.size.num_trained / self.tensor_ranks
        loaded = weights = 4 * trained + self.size.frozen_bytes
        moments = 2 + 8 / 256 if self.train.has_8bit_optimizer else 8  # with two float32 scales per block of 256
        if self.rounds_weights or self.has_masters:
            weights = 2 * trained + self.size.frozen_bytes
        gradients, optimizer = (
            self.width * trained,
            (moments + (4 if self.rounds_weights or self.has_masters else 0)) * trained,
        )
        if self.stage == 3:
            weights /= self.ranks
        if self.stage >= 2 or self.rounds_weights:
            gradients /= self.ranks
        if self.stage:
            optimizer = 0.0 if self.train.parallel.offload_optimizer else optimizer / self.ranks
        if self.train.parallel.offload_parameters:
            weights = 0.0
        return weights, loaded, gradients, optimizer

    def activations(self) -> tuple[float, float]:
        """Return what is kept for the backward pass: at its start, and what is left at its end."""
        tokens = self.rows.tokens / self.row_ranks
        layers = layer_activations(self.size.model, self.config, self.rules)
        kept = sum(layers)
        if self.recomputes:
            kept = len(layers) * checkpoint_bytes(self.config, self.rules) + max(layers)
            if self.train.gradient_checkpointing == "selective":
                kept += attention_outputs(self.config, self.rules)
        models = 2 if self._has_critic_model() else 1
        return models * tokens * (kept + head_activations(self.config, self.rules)), tokens * max(layers)

    def head(self) -> float:
        """Return the bytes of the logits that exist at a time, and of the gradients that the head adds up."""
        if self.train.trains_scalar_model:
            return 0.0
        targets, vocabulary, width = self.rows.targets / self.row_ranks, self.config.vocab_size, self.config.hidden_size
        has_kernels = self.on_gpu and self.stage < 3 and not isinstance(self.train, DistillationConfig)
        if has_kernels:
            logits = min(targets, _HEAD_TOKENS) * VOCABULARY_CHUNK * self.rules.compute + 4 * targets * width
        else:
            models = 2 if isinstance(self.train, DistillationConfig) else 1
            logits = 3 * models * 4 * min(targets, self.train.logprob_chunk_size) * vocabulary
        return float(logits + (4 * self._embedding() if self.rules.trains_all else 0))

    def casts(self) -> float:
        """Return the bytes of weights that exist for a forward pass alone: autocast's copies, or what ZeRO-3 gathers."""
        layers = decoder_layers(self.size.model, self.config)
        largest = max(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
        if self.stage == 3:
            return self.width * (largest + self._embedding())
        if self.has_masters and self.rules.trains_all:
            return 2 * self._embedding()  # the gradient of the largest weight, before it is added to its master's
        if not self.half or self.rounds_weights or not self.rules.trains_all:
            return 0.0
        return 2 * (largest if self.recomputes else sum(w.numel() for layer in layers for w in layer.parameters()))

    def step_copies(self) -> float:
        """Return what an update needs besides its operands: float32 gradients, or copies of unfused AdamW."""
        if self.rounds_weights:
            return 0.0 if self.train.parallel.offload_optimizer else 4 * self.size.num_trained / self.ranks
        return 4 * self.size.num_trained / self.tensor_ranks if self.train.optim == "adamw_torch" else 0.0

    def other_models(
        self, always: dict[str, float], later: dict[str, float], weights: float, gradients: float, optimizer: float
    ) -> dict[str, dict[str, float]]:
        """Return the parts of reference, critic and teacher."""
        frozen_width = 2 if self.half else 4
        parts: dict[str, dict[str, float]] = {}
        named = self.size.others
        is_precomputed = isinstance(self.train, DPOConfig) and self.train.precompute_ref_log_probs
        if "ref_model" in named or (self.recipe.model.lora is None and self.train.needs_reference):
            size = frozen_width * named.get("ref_model", self.size.total)
            parts["reference"] = {LOAD: size} if is_precomputed else dict.fromkeys(always, size)
        if self._has_critic_model():
            scale = named.get("critic", self.size.total) / self.size.total
            parts["critic"] = {LOAD: scale * weights} | dict.fromkeys(later, scale * (weights + optimizer))
            for phase in (BACKWARD, STEP):
                parts["critic"][phase] += scale * gradients
        if "teacher" in named:
            parts["teacher"] = {phase: float(frozen_width * named["teacher"]) for phase in always}
        return parts

    def engine(self) -> tuple[float, float, bool]:
        """Return the share of the GPU that rollout engines take (0: what is free), the least bytes that one works with, and
        whether engines sleep while the policy trains."""
        train, config = self.train, self.config
        if not isinstance(train, OnlineConfig) or not self.on_gpu:
            return 0.0, 0.0, False
        rollout, engine = train.rollout, engine_class(train.rollout)
        machine = Machine(("0",), trains_on_gpu=True)
        if not engine.in_workers or not shares_gpus(rollout, machine):
            return 0.0, 0.0, False
        sleeps = engine.sleeps and take_turns(rollout, machine, trains_meanwhile=bool(train.train_on_arrival))
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        attending = len(kinds) - list(kinds).count("linear_attention")
        cache = 4 * config.num_key_value_heads * head_width(config) * attending * self.rows.longest
        least = (2 * self.size.total + cache) / rollout.tensor_parallel_size + ENGINE_WORKSPACE
        return rollout.gpu_memory_utilization or (0.0 if sleeps else SHARED), least, sleeps

    def _embedding(self) -> int:
        return int(self.config.vocab_size * self.config.hidden_size)

    def _has_critic_model(self) -> bool:
        return isinstance(self.train, PPOConfig) and self.train.critic.kind == "model"
