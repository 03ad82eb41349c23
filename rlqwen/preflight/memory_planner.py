"""Compute the memory of one GPU from a recipe, the shape of its model and the layout of its ranks."""

from rlqwen.config import DistillationConfig, DPOConfig, OnlineConfig, PPOConfig, Recipe
from rlqwen.packing.logprobs import VOCABULARY_CHUNK
from rlqwen.preflight.activations import (
    ForwardRules,
    attention_outputs,
    checkpoint_bytes,
    head_activations,
    head_width,
    layer_activations,
)
from rlqwen.preflight.memory_plan import (
    BACKWARD,
    CONTEXT_BYTES,
    ENGINE_WORKSPACE,
    LOAD,
    SAMPLING,
    STEP,
    SYNC,
    MemoryPlan,
    MicroBatch,
)
from rlqwen.preflight.model_size import ModelSize, frozen_dtype
from rlqwen.preflight.model_states import ModelStates, Precision, StageSize, model_states
from rlqwen.preflight.parallel_layout import ParallelLayout
from rlqwen.rollout.engine import Engine, engine_class
from rlqwen.rollout.engine_placement import SHARED, Machine, shares_gpus, take_turns

_HEAD_TOKENS = 4096
"""Tokens that TRL's kernels read at a time."""


def plan_memory(
    recipe: Recipe,
    size: ModelSize,
    *,
    longest: int | None = None,
    num_ranks: int = 1,
    layout: ParallelLayout | None = None,
    on_gpu: bool = True,
    engine: type[Engine] | None = None,
) -> MemoryPlan:
    """Return the plan of one of `num_ranks` GPUs, or of a trainer on CPU.

    `longest`: tokens of the longest row of the data, or prompt; None: what the config allows. `layout`: how ranks divide
    the model; None: as the recipe says. `engine`: the rollout engine; None: look it up. Of a pipeline it is the plan of the
    first or last stage, whichever needs more.
    """
    layout = layout or ParallelLayout.of(recipe.train.parallel, num_ranks)
    stages = (False, True) if layout.pp > 1 else (True,)
    planners = [_Planner(recipe, size, longest, layout, on_gpu=on_gpu, is_last=is_last) for is_last in stages]
    plans = [planner.plan(engine) for planner in planners]
    return max(plans, key=lambda plan: plan.peak)


class _Planner:
    """Compute the parts of a plan; all are bytes on one GPU."""

    def __init__(
        self,
        recipe: Recipe,
        size: ModelSize,
        longest: int | None,
        layout: ParallelLayout,
        *,
        on_gpu: bool,
        is_last: bool,
    ) -> None:
        self.recipe, self.train, self.size, self.layout = recipe, recipe.train, size, layout
        self.on_gpu, self.is_last = on_gpu, is_last
        self.rows = MicroBatch.of(recipe, size.facts.context, longest)
        self.stage = StageSize.of(size, layout, is_last=is_last)
        self.zero = layout.zero_stage if layout.engine == "deepspeed" else 0
        wants_half = self.train.bf16 is not False if on_gpu else bool(self.train.bf16)
        self.half = wants_half or self.train.fp16
        is_own = layout.engine == "deepspeed" or layout.num_ranks == 1
        self.precision = Precision(
            rounds_weights=bool(self.zero and self.half),
            has_masters=self.train.master_weights and self.half and is_own and not self.zero,
            eight_bit_moments=self.train.has_8bit_optimizer,
        )
        self.width = 2 if self.precision.rounds_weights else 4
        self.config = size.text_config
        half_weights = (
            self.precision.masters > 0
            or not is_own
            or (size.adapters is not None and frozen_dtype(recipe.model, size.facts) != "float32")
        )
        self.rules = ForwardRules.of(on_gpu=on_gpu, half=self.half, adapters=size.adapters, half_weights=half_weights)

    @property
    def recomputes(self) -> bool:
        """Return whether layers are computed again in the backward pass."""
        checkpointing = self.train.gradient_checkpointing
        return self.on_gpu if checkpointing is None else bool(checkpointing)

    @property
    def largest_layer(self) -> tuple[float, float]:
        """Return the parameters of the largest layer on a rank, as it is computed, and in all."""
        layout = self.layout
        computed = max(shape.dense / layout.tp + shape.experts / layout.expert_ranks for shape in self.size.shapes)
        return computed, max(shape.total for shape in self.size.shapes)

    def plan(self, engine: type[Engine] | None = None) -> MemoryPlan:
        phases = (
            [LOAD, SAMPLING, BACKWARD, STEP, SYNC] if isinstance(self.train, OnlineConfig) else [LOAD, BACKWARD, STEP]
        )
        always = dict.fromkeys(phases, 1.0)
        later = {phase: 1.0 for phase in phases if phase != LOAD}
        states = model_states(self.size, self.layout, self.stage, self.precision)
        kept, left = self.activations()
        grown = 0.0 if self.rows.count == 1 else states.gradients
        at_start = {"gradients": grown, "activations": kept, "head": self.head()}
        at_end = {"gradients": states.gradients, "activations": left, "head": 0.0}
        backward = max(at_start, at_end, key=lambda moment: sum(moment.values()))
        parts = {
            "weights": {LOAD: states.loaded} | dict.fromkeys(later, states.weights),
            "gradients": {BACKWARD: backward["gradients"], STEP: states.gradients},
            "optimizer": dict.fromkeys(later, states.optimizer),
            "activations": {BACKWARD: backward["activations"]},
            "head": {BACKWARD: backward["head"]},
            "buffers": {BACKWARD: self.casts() + self.dispatch(), STEP: self.step_copies(), SYNC: self.sync_copies()},
        }
        parts |= self.other_models(always, later, states)
        share, least, sleeps = self.engine(engine)
        if self.on_gpu:
            processes = {LOAD: 1} | dict.fromkeys(later, 2 if least else 1)
            parts["CUDA contexts"] = {phase: count * CONTEXT_BYTES for phase, count in processes.items()}
        shown = {name: part for name, part in parts.items() if any(part.get(phase) for phase in phases)}
        return MemoryPlan(shown, self.rows, share, least, sleeps, phases)

    def activations(self) -> tuple[float, float]:
        """Return what is kept for the backward pass: at its start, and what is left at its end.

        The first stage of a pipeline keeps as many micro-batches as there are stages (1F1B), the last stage one.
        """
        layout, rules = self.layout, self.rules
        tokens = self.rows.tokens / layout.sp
        divides_residual = layout.tp if layout.engine == "megatron" else 1
        shapes = self.size.shapes
        each = {shape: layer_activations(shape, self.config, rules) for shape in shapes}
        sizes = {
            shape: kept.per_rank(layout.tp) if divides_residual == 1 else (kept.whole + kept.divided) / layout.tp
            for shape, kept in each.items()
        }
        in_flight = 1 if self.is_last else min(layout.pp, self.rows.count)
        stored: float = sum(count * sizes[shape] for shape, count in shapes.items()) / layout.pp
        working = 0.0
        if self.recomputes:
            stored = shapes.total() / layout.pp * checkpoint_bytes(self.config, rules) / divides_residual
            if self.train.gradient_checkpointing == "selective":
                stored += attention_outputs(self.config, rules) / (layout.pp * layout.tp)
            working = max(sizes.values())
        kept = in_flight * stored + working + (head_activations(self.config, rules) if self.is_last else 0)
        models = 2 if self._has_critic_model() else 1
        return models * tokens * kept, tokens * max(sizes.values())

    def head(self) -> float:
        """Return the bytes of the logits that exist at a time, and of the gradients that the head adds up."""
        if self.train.trains_scalar_model or not self.is_last:
            return 0.0
        targets, vocabulary, width = self.rows.targets / self.layout.sp, self.config.vocab_size, self.config.hidden_size
        if self.layout.engine == "megatron":  # logits of all tokens, and their softmax in float32
            return float((2 + 4) * targets * vocabulary / self.layout.tp)
        has_kernels = self.on_gpu and self.zero < 3 and not isinstance(self.train, DistillationConfig)
        if has_kernels:
            logits = min(targets, _HEAD_TOKENS) * VOCABULARY_CHUNK * self.rules.compute + 4 * targets * width
        else:
            models = 2 if isinstance(self.train, DistillationConfig) else 1
            logits = 3 * models * 4 * min(targets, self.train.logprob_chunk_size) * vocabulary
        return float(logits + (4 * self._embedding() / self._head_ranks if self.rules.trains_all else 0))

    def casts(self) -> float:
        """Return the bytes of weights that exist for a forward pass alone: autocast's copies, or what is gathered.

        FSDP2 gathers the layer that is computed, the next one, and embedding and head; a layer's gradients are whole in
        half precision, and again in float32, until they are reduced.
        """
        computed, largest = self.largest_layer
        compute = self.rules.compute
        if self.layout.is_sharded:
            gathered = compute * (2 * computed + self.stage.embedding / self._head_ranks)
            return gathered + ((compute + 4) * computed if self.rules.trains_all else 0)
        if self.zero == 3:
            return self.width * (largest + self._embedding())
        if self.precision.has_masters and self.rules.trains_all:
            return 2 * self._embedding()  # the gradient of the largest weight, before it is added to its master's
        is_cast = self.half and not self.precision.rounds_weights and self.layout.engine != "megatron"
        if not is_cast or not self.rules.trains_all:
            return 0.0
        whole = sum(count * shape.total for shape, count in self.size.shapes.items())
        return 2 * (largest if self.recomputes else whole)

    def dispatch(self) -> float:
        """Return the bytes of what expert parallel ranks send and receive in one layer, if experts are evenly chosen."""
        if self.layout.ep == 1:
            return 0.0
        tokens = self.rows.tokens / self.layout.sp / (self.layout.tp if self.layout.engine == "megatron" else 1)
        return float(2 * self.rules.compute * tokens * self.config.num_experts_per_tok * self.config.hidden_size)

    def step_copies(self) -> float:
        """Return what an update needs besides its operands: float32 gradients, or copies of unfused AdamW."""
        layout = self.layout
        trained = self.stage.total if self.size.adapters is None else self.size.num_trained / layout.pp
        if self.precision.rounds_weights:
            return 0.0 if layout.offload_optimizer else 4 * trained / layout.fsdp
        if self.train.optim != "adamw_torch" or (layout.is_sharded and layout.offload_optimizer):
            return 0.0
        return 4 * trained / (layout.states_rank if layout.is_sharded else layout.tp)

    def sync_copies(self) -> float:
        """Return what is copied while weights are sent: embedding or head, and whole layers that FSDP2 gathers."""
        layers = 2 * 2 * self.largest_layer[1] if self.layout.is_sharded else 0.0
        return max(2.0 * self._embedding(), layers) if layers else 2.0 * self._embedding()

    def other_models(
        self, always: dict[str, float], later: dict[str, float], states: ModelStates
    ) -> dict[str, dict[str, float]]:
        """Return the parts of reference, critic and teacher, which FSDP2 shards as the policy."""
        frozen_width = (2 if self.half else 4) / (self.layout.num_ranks if self.layout.is_sharded else 1)
        parts: dict[str, dict[str, float]] = {}
        named = self.size.others
        is_precomputed = isinstance(self.train, DPOConfig) and self.train.precompute_ref_log_probs
        if "ref_model" in named or (self.recipe.model.lora is None and self.train.needs_reference):
            size = frozen_width * named.get("ref_model", self.size.total)
            parts["reference"] = {LOAD: size} if is_precomputed else dict.fromkeys(always, size)
        if self._has_critic_model():
            scale = named.get("critic", self.size.total) / self.size.total
            held = scale * (states.weights + states.optimizer)
            parts["critic"] = {LOAD: scale * states.weights} | dict.fromkeys(later, held)
            for phase in (BACKWARD, STEP):
                parts["critic"][phase] += scale * states.gradients
        if "teacher" in named:
            parts["teacher"] = {phase: float(frozen_width * named["teacher"]) for phase in always}
        return parts

    def engine(self, known: type[Engine] | None) -> tuple[float, float, bool]:
        """Return the share of the GPU that rollout engines take (0: what is free), the least bytes that one works with, and
        whether engines sleep while the policy trains."""
        train, config = self.train, self.config
        if not isinstance(train, OnlineConfig) or not self.on_gpu:
            return 0.0, 0.0, False
        rollout, engine = train.rollout, known or engine_class(train.rollout)
        machine = Machine(("0",), trains_on_gpu=True)
        if not engine.in_workers or not shares_gpus(rollout, machine):
            return 0.0, 0.0, False
        sleeps = engine.sleeps and take_turns(rollout, machine, trains_meanwhile=bool(train.train_on_arrival))
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        attending = len(kinds) - list(kinds).count("linear_attention")
        cache = 4 * config.num_key_value_heads * head_width(config) * attending * self.rows.longest
        least = (2 * self.size.total + cache) / rollout.tensor_parallel_size + ENGINE_WORKSPACE
        return rollout.gpu_memory_utilization or (0.0 if sleeps else SHARED), least, sleeps

    @property
    def _head_ranks(self) -> int:
        """Return the ranks that divide embedding and head: DeepSpeed's AutoTP leaves them whole."""
        return 1 if self.layout.engine == "deepspeed" else self.layout.tp

    def _embedding(self) -> int:
        return int(self.config.vocab_size * self.config.hidden_size)

    def _has_critic_model(self) -> bool:
        return isinstance(self.train, PPOConfig) and self.train.critic.kind == "model"
