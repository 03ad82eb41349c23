"""Estimate the seconds of sampling a step's completions with vLLM, and of sending weights to the engines."""

from dataclasses import dataclass

from rlqwen.config import OnlineConfig
from rlqwen.planning.step_time import Run, UpdateTime
from rlqwen.preflight.activations import head_width
from rlqwen.preflight.parameter_counts import chosen_experts

STEP_OVERHEAD = 4e-3
"""Seconds of a decoding step besides reading weights and keys: scheduling, sampling, kernels. An assumption."""
KV_SHARE = 0.85
"""Share of a GPU's memory for weights and keys and values. An assumption."""
ALL_REDUCE_LATENCY = 15e-6
"""Seconds of an all-reduce of a few tokens. An assumption."""


@dataclass(frozen=True)
class Engines:
    """The vLLM engines of a run."""

    count: int
    tensor_ranks: int
    batch: int
    """Completions that each decodes at a time."""


def engines_of(run: Run, train: OnlineConfig, num_gpus: int) -> Engines:
    """Return the engines that fill `num_gpus`, and how many completions their memory lets each decode at a time."""
    tensor_ranks = min(train.rollout.tensor_parallel_size, num_gpus)
    count = max(1, num_gpus // tensor_ranks)
    share = train.rollout.gpu_memory_utilization or KV_SHARE
    room = share * run.cluster.gpu.memory * tensor_ranks - 2 * run.size.total
    fitting = int(room / max(_cache_bytes(run) * run.work.length, 1.0))
    waiting = -(-run.work.completions_per_step // count)
    return Engines(count, tensor_ranks, max(1, min(train.rollout.max_num_seqs, fitting, waiting)))


def rollout_time(run: Run, engines: Engines) -> UpdateTime:
    """Return the seconds of sampling one step's completions: prompts, decoding, and the tail of the longest."""
    gpu, share, work = run.cluster.gpu, run.efficiency, run.work
    each = -(-work.completions_per_step // engines.count)
    flops = run.flops.forward(targets=0.0)
    prompts = work.prompt * each / max(1, run.work.completions_per_step // max(1, round(_prompts(run))))
    prefill = flops * prompts / (gpu.flops * share.products * engines.tensor_ranks)
    step = decode_step(run, engines)
    rounds = each / engines.batch
    parts = {"prompts": prefill, "decoding": rounds * work.completion * step}
    # At the end a few long completions are decoded alone; reading weights then bounds each token.
    alone = decode_step(run, Engines(engines.count, engines.tensor_ranks, 1))
    parts["tail"] = (work.longest_completion - work.completion) * alone
    return UpdateTime({name: seconds for name, seconds in parts.items() if seconds > 0})


def decode_step(run: Run, engines: Engines) -> float:
    """Return the seconds of one token for all completions that an engine decodes at a time."""
    gpu, share, ranks = run.cluster.gpu, run.efficiency, engines.tensor_ranks
    read = 2 * _touched_parameters(run, engines.batch) + engines.batch * _cache_bytes(run) * run.work.length
    flops = engines.batch * run.flops.forward()
    bound = max(read / (gpu.bandwidth * share.memory), flops / (gpu.flops * share.products)) / ranks
    exchange = 2 * run.size.shapes.total() * ALL_REDUCE_LATENCY if ranks > 1 else 0.0
    return bound + exchange + STEP_OVERHEAD


def sync_time(run: Run, engines: Engines, *, is_adapter: bool = False) -> float:
    """Return the seconds of sending the weights in bfloat16 to all engines: each gets all of them, layer by layer."""
    sent = 2 * (run.size.num_trained if is_adapter else run.size.total)
    inside = run.cluster.nodes == 1
    gpu = run.cluster.gpu
    bandwidth = gpu.link if inside else min(gpu.link, gpu.network * 8)
    return sent / engines.tensor_ranks / (bandwidth * run.efficiency.links)


def _touched_parameters(run: Run, batch: int) -> float:
    """Return the parameters that are read for `batch` tokens: of the experts, those that any token chooses."""
    chosen, experts = chosen_experts(run.size.text_config)
    routed = run.size.counts.parts.get("routed experts", 0)
    share = 1 - (1 - chosen / experts) ** batch if experts else 1.0
    return run.size.total - routed * (1 - share)


def _cache_bytes(run: Run) -> float:
    """Return the bytes of keys and values per token, in bfloat16."""
    config = run.size.text_config
    attending = sum(count for shape, count in run.size.shapes.items() if shape.kind == "full_attention")
    return float(2 * 2 * config.num_key_value_heads * head_width(config) * attending)


def _prompts(run: Run) -> float:
    """Return the prompts of a step."""
    work = run.work
    shared = (work.tokens - work.sequences * work.completion) / max(work.prompt, 1.0)
    return max(1.0, shared * work.completions_per_step / work.sequences)
