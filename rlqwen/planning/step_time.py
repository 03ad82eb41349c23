"""Estimate the seconds of an update: products, memory traffic, what ranks send to each other, and pipeline bubbles.

Peaks come from the catalogue of GPUs; how much of them is reached comes from the constants below. They are few, and none is
fitted to a single published figure: tests/planning/test_published_figures.py says how far each measured one is met.
"""

import functools
from dataclasses import dataclass, field

from rlqwen.planning.flops import TokenFlops, token_flops
from rlqwen.planning.gpus import NODE, Cluster
from rlqwen.planning.workload import Workload
from rlqwen.preflight.activations import ForwardRules, layer_activations
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.model_states import StageSize
from rlqwen.preflight.parallel_layout import ParallelLayout

OPTIMIZER_BYTES = 32
"""Bytes that an update moves per trained parameter: weight and two moments read and written, the gradient read twice."""
NODE_LATENCY = 15e-6
"""Seconds that a gather takes per node that its ring passes, however little is gathered. An assumption."""
HOST_LINK, HOST_BANDWIDTH = 25e9, 200e9
"""Bytes per second from a GPU to host memory, and of a node's host memory. Assumptions."""


@dataclass(frozen=True)
class Efficiency:
    """Hold the shares of the peaks that real programs reach."""

    products: float = 0.65
    """Of FLOP/s, in products of wide matrices."""
    narrow: float = 1024.0
    """Width of the residual stream at which products reach half of that."""
    head: float = 0.25
    """Of FLOP/s, in logits and their gradients, which are computed in chunks."""
    memory: float = 0.7
    """Of memory bandwidth."""
    traffic: float = 1.5
    """How often a byte that is kept for the backward pass is moved in each pass over the layers."""
    links: float = 0.7
    """Of the bandwidth between GPUs."""
    overlap: float = 0.8
    """Of computing time, behind which weights are gathered and gradients reduced."""
    layer_overhead: float = 0.5e-3
    """Seconds that a pass over a layer takes at least, for launching its kernels."""

    def of_products(self, width: int) -> float:
        """Return the share of FLOP/s in products with a residual stream of `width`."""
        return self.products * width / (width + self.narrow)


@dataclass(frozen=True)
class UpdateTime:
    """Hold the seconds of one update by part."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Run:
    """Hold what is to be timed: a model on a cluster, and how it is trained."""

    size: ModelSize
    cluster: Cluster
    work: Workload
    recomputes: bool
    efficiency: Efficiency = Efficiency()

    @property
    def trains_all(self) -> bool:
        return self.size.adapters is None

    @functools.cached_property
    def flops(self) -> TokenFlops:
        return token_flops(self.size, self.work.length)

    @functools.cached_property
    def activation_bytes(self) -> float:
        """Return the bytes that all layers keep per token without recomputation, in half precision on a GPU."""
        rules = ForwardRules.of(on_gpu=True, half=True, half_weights=True)
        config = self.size.text_config
        kept = ((layer_activations(shape, config, rules), count) for shape, count in self.size.shapes.items())
        return sum(count * each.per_rank() for each, count in kept)

    @property
    def passes(self) -> int:
        """Return the passes over the layers: forward, backward (which takes twice as long), and again if recomputed."""
        return 3 + self.recomputes


def update_time(run: Run, layout: ParallelLayout, most_tokens: float) -> UpdateTime:
    """Return the time of an update whose micro-batches have at most `most_tokens` tokens."""
    count = run.work.micro_batches(layout, most_tokens)
    tokens = run.work.tokens / run.work.sequences * -(-run.work.sequences // layout.data_ranks) / count
    compute = _compute(run, layout, tokens)
    exchange = _exchange(run, layout, tokens)
    shards = _shards(run, layout)
    hidden = run.efficiency.overlap * (compute["products"] + compute["memory"])
    each = {**compute, **exchange, "weights and gradients": max(0.0, shards.per_micro_batch - hidden)}
    parts = {name: count * seconds for name, seconds in each.items()}
    if layout.pp > 1:
        parts["pipeline bubble"] = (layout.pp - 1) * sum(each.values())
    parts["weights and gradients"] += shards.per_update
    parts["optimizer"] = _optimizer(run, layout)
    return UpdateTime({name: seconds for name, seconds in parts.items() if seconds > 0})


def _compute(run: Run, layout: ParallelLayout, tokens: float) -> dict[str, float]:
    """Return the seconds of a micro-batch on one rank: products, and what is bound by memory or by launching kernels."""
    gpu, share = run.cluster.gpu, run.efficiency
    divided = layout.sp * layout.tp * layout.pp
    targets = run.work.targets / run.work.tokens
    flops = run.flops.training(recomputes=run.recomputes, trains_all=run.trains_all, targets=0.0)
    flops += run.work.forwards * run.flops.forward(targets=0.0)
    logits = targets * run.flops.head * ((4 if run.trains_all else 3) + run.work.forwards)
    reached = share.of_products(run.size.text_config.hidden_size)
    products = (flops / reached + logits / share.head) * tokens / divided / gpu.flops
    passes = run.passes + run.work.forwards
    weights = 2 * sum(
        count * (shape.dense / layout.tp + shape.experts / layout.expert_ranks)
        for shape, count in run.size.shapes.items()
    )
    moved = share.traffic * run.activation_bytes * tokens / (layout.sp * layout.tp) + weights
    memory = passes * moved / layout.pp / (gpu.bandwidth * share.memory)
    launching = passes * share.layer_overhead * run.size.shapes.total() / layout.pp
    return {"products": products, "memory": memory, "launching": max(0.0, launching - products - memory)}


def _exchange(run: Run, layout: ParallelLayout, tokens: float) -> dict[str, float]:
    """Return the seconds of a micro-batch in which ranks wait for tokens of other ranks."""
    config, passes = run.size.text_config, run.passes - 1 + run.work.forwards  # backward sends as much as forward
    layers = run.size.shapes.total() / layout.pp
    own = tokens / layout.sp
    parts = {}
    if layout.tp > 1:
        moved = 2 * 2 * 2 * own * config.hidden_size * (layout.tp - 1) / layout.tp  # two all-reduces of bfloat16
        parts["tensor parallel"] = passes * layers * moved / _ring(run, layout.tp)
    if layout.sp > 1:
        heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parts["sequence parallel"] = (
            passes * layers * _all_to_all(run, 2 * own * heads * width / layout.tp, layout.sp, layout.tp)
        )
    if layout.ep > 1:
        sent = own / (layout.tp if layout.engine == "megatron" else 1) * config.num_experts_per_tok * config.hidden_size
        stride = 1 if layout.engine == "megatron" else layout.tp
        parts["expert parallel"] = passes * layers * 2 * _all_to_all(run, 2 * sent, layout.ep, stride)
    if layout.pp > 1:
        stages = 2 * 2 * own * config.hidden_size / (_link(run, layout.pp, layout.fsdp * layout.tp))
        parts["between stages"] = stages
    return parts


@dataclass(frozen=True)
class _ShardTraffic:
    per_micro_batch: float
    per_update: float


def _shards(run: Run, layout: ParallelLayout) -> _ShardTraffic:
    """Return the seconds in which weights are gathered and gradients reduced."""
    if layout.fsdp == 1:
        return _ShardTraffic(0.0, 0.0)
    stage = StageSize.of(run.size, layout, is_last=True)
    dense = (stage.layers + stage.embedding) / layout.tp
    experts = stage.experts / layout.expert_ranks
    whole = 1 - 1 / layout.fsdp
    gathered = dense * whole / _ring(run, layout.fsdp, layout.tp)
    if (groups := layout.fsdp // layout.ep) > 1:
        gathered += experts * (1 - 1 / groups) / _ring(run, groups, layout.tp * layout.ep)
    reduced = gathered if run.trains_all else run.size.num_trained / stage.total * gathered
    gathers = 2 + run.work.forwards
    nodes = -(-layout.fsdp * layout.tp // NODE)
    waiting = NODE_LATENCY * nodes * run.size.shapes.total() / layout.pp * (gathers + 1)
    if layout.engine == "fsdp2":
        return _ShardTraffic(2 * gathers * gathered + 4 * reduced + waiting, 0.0)
    if layout.engine == "deepspeed" and layout.zero_stage == 3:
        return _ShardTraffic(2 * (gathers + run.recomputes) * gathered + 2 * reduced + waiting, 0.0)
    if layout.engine == "deepspeed" and layout.zero_stage == 2:
        return _ShardTraffic(2 * reduced, 2 * reduced)
    width = 4 if layout.engine == "megatron" or not layout.zero_stage else 2
    return _ShardTraffic(0.0, (width + (2 if layout.zero_stage else width)) * reduced)


def _optimizer(run: Run, layout: ParallelLayout) -> float:
    trained = run.size.total if run.trains_all else run.size.num_trained
    is_divided = layout.engine != "deepspeed" or layout.zero_stage > 0
    held = trained / (layout.tp * layout.pp * (layout.fsdp if is_divided else 1))
    if layout.offload_optimizer or layout.offload_parameters:
        ranks = min(NODE, layout.num_ranks)
        return held * 8 / HOST_LINK + held * OPTIMIZER_BYTES / (HOST_BANDWIDTH / ranks)
    return held * OPTIMIZER_BYTES / (run.cluster.gpu.bandwidth * run.efficiency.memory)


def _link(run: Run, ranks: int, stride: int) -> float:
    return run.cluster.link(ranks, stride) * run.efficiency.links


def _ring(run: Run, ranks: int, stride: int = 1) -> float:
    """Return the bytes per second that a rank gets in a gather: all network cards of a node work for its ranks."""
    gpu, local = run.cluster.gpu, max(1, min(ranks, NODE // stride))
    bandwidth = gpu.link if ranks <= local else min(gpu.link, gpu.network * local)
    return bandwidth * run.efficiency.links


def _all_to_all(run: Run, sent: float, ranks: int, stride: int) -> float:
    """Return the seconds in which each rank sends `sent` bytes to all `ranks` in equal parts."""
    gpu, local = run.cluster.gpu, max(1, min(ranks, NODE // stride))
    inside, outside = sent * (local - 1) / ranks, sent * (ranks - local) / ranks
    return max(inside / gpu.link, outside / gpu.network) / run.efficiency.links
