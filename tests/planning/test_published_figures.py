"""Compare plans with published figures and with rlqwen's own measurements, and say how far each is met.

Sources:
    automodel: NVIDIA's article on fine-tuning with NeMo AutoModel (huggingface.co/blog/nvidia/
        accelerating-fine-tuning-nvidia-nemo-automodel, 2026-06-24): Qwen3-30B-A3B, 8 H100, one sequence of 4,096 tokens per
        GPU: transformers v5 with FSDP2 takes 68.2 GiB and makes 3,075 tokens/s per GPU, AutoModel with 8 expert parallel ranks
        48.1 GiB and 11,340.
    automodel-table: NVIDIA-NeMo/Automodel, docs/performance-summary.md (2025-10-02): Qwen3 MoE 30B, 8 H100, 512 sequences of
        4,096 tokens in micro-batches of 4: 21.773 s, 277 TFLOP/s and 12,040 tokens/s per GPU.
    ms-swift: modelscope/ms-swift, best practice for Qwen3 (2025-05): Qwen3-30B-A3B on 16 A800, Megatron with TP 2, EP 8, 16
        packed sequences of 8,192 tokens, everything recomputed: 9.6 s/it, 60 GiB.
    torchtitan: pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: Llama 3.1 8B, FSDP without compilation, two
        sequences of 8,192 tokens per GPU: 5,762 tokens/s per GPU on 8 H100 (with 2.4 TB/s and 500 W), 5,605 on 128.
    nemo-rl: NVIDIA-NeMo/RL r0.4, docs/about/performance-summary.md: GRPO on H100 with Megatron and vLLM.
    rlqwen: benchmarks/RESULTS.md, 2026-11-27: one H200.
"""

from dataclasses import replace
from typing import Any

import pytest
from transformers import Qwen3Config

from rlqwen.config import Recipe
from rlqwen.planning.flops import token_flops
from rlqwen.planning.gpus import GPUS, Cluster, Gpu
from rlqwen.planning.published_models import published_config
from rlqwen.planning.run_plan import RunPlanner
from rlqwen.planning.step_time import Efficiency, Run, update_time
from rlqwen.planning.workload import Workload
from rlqwen.preflight.memory_plan import CONTEXT_BYTES, GIB
from rlqwen.preflight.memory_planner import plan_memory
from rlqwen.preflight.model_check import ConfigFacts
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.parallel_layout import ParallelLayout
from tests.planning.models import sft, size_of

MOE = "Qwen3-30B-A3B"


def peak_gib(text: str, ranks: int, tokens: int, **train: Any) -> float:
    layout = ParallelLayout.parse(text, ranks)
    return plan_memory(sft(MOE, tokens, train=train), size_of(MOE), layout=layout).peak / GIB


def test_flops_per_token_are_those_of_the_table() -> None:
    published = 277e12 / 12_040  # automodel-table: 23.0 GFLOP
    assert token_flops(size_of(MOE), 4096).model == pytest.approx(published, rel=0.01)


def test_memory_is_within_six_percent_of_fsdp2_and_of_expert_parallel() -> None:
    # The article says neither the dtype of optimizer states nor whether activations are recomputed, nor whether the CUDA
    # context is counted. Taken here: recomputed, no context.
    context = CONTEXT_BYTES / GIB
    assert peak_gib("fsdp=8", 8, 4096) - context == pytest.approx(68.2, rel=0.06)  # automodel: 5.5% too low
    divided = peak_gib("fsdp=8,ep=8", 8, 4096) - context
    # Sixteen bytes per parameter alone are 56.9 GiB, so AutoModel has fewer; taken here: twelve, as with weights and
    # gradients in bfloat16 and moments in float32. That is a guess, so what this shows is the rest of the sum.
    spared = 4 * size_of(MOE).total / 8 / GIB
    assert divided - spared == pytest.approx(48.1, rel=0.06)  # automodel: 5.3% too low


def test_memory_is_within_fifteen_percent_of_megatron() -> None:
    peak = peak_gib("engine=megatron,tp=2,ep=8", 16, 8192, gradient_accumulation_steps=2)
    assert peak == pytest.approx(60, rel=0.15)  # ms-swift, read from nvidia-smi, with what the allocator keeps: too low


def custom(config: Any) -> ModelSize:
    return ModelSize.measure(sft(MOE, 4096), ConfigFacts("", {}, config, 40_960, "bfloat16", 0))


def four_layers() -> ModelSize:
    config: Any = published_config(MOE)
    config.num_hidden_layers = 4
    return custom(config)


def llama() -> ModelSize:
    """Return a model of the widths of Llama 3.1 8B."""
    widths: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "vocab_size": 128_256,
    }
    heads: dict[str, Any] = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    return custom(Qwen3Config(**widths, **heads))


def rows(count: int, tokens: int, length: int) -> Workload:
    return Workload(count, count * tokens, count * tokens, length, 0.0)


H200, H100, A800 = (GPUS[name] for name in ("H200-141G", "H100-80G", "A800-80G"))
META = Gpu("H100-96G", H100.flops, 96 * GIB, 2.4e12, H100.link, H100.network)
UPDATES: dict[str, tuple[float, Any, Gpu, int, Workload, str, bool, int]] = {
    # name -> seconds, model, GPU, GPUs, rows, layout, whether layers are recomputed, tokens per micro-batch
    "rlqwen, 0.6B": (0.328, "Qwen3-0.6B", H200, 1, rows(1, 14_530, 500), "", True, 14_530),
    "rlqwen, 0.6B, all kept": (0.280, "Qwen3-0.6B", H200, 1, rows(1, 14_530, 500), "", False, 14_530),
    "rlqwen, 4 layers of experts": (0.241, four_layers, H200, 1, rows(1, 14_940, 500), "", False, 14_940),
    "torchtitan, 8": (16_384 / 5762, llama, META, 8, rows(16, 8192, 8192), "", True, 16_384),
    "torchtitan, 128": (16_384 / 5605, llama, META, 128, rows(256, 8192, 8192), "", True, 16_384),
    "automodel, transformers v5": (4096 / 3075, MOE, H100, 8, rows(8, 4096, 4096), "", True, 4096),
    "automodel, expert parallel": (4096 / 11_340, MOE, H100, 8, rows(8, 4096, 4096), "ep=8", False, 4096),
    "automodel-table": (21.773, MOE, H100, 8, rows(512, 4096, 4096), "ep=8", False, 16_384),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_takes_within_a_quarter_of_what_was_measured(name: str) -> None:
    """All constants of `Efficiency` were chosen to meet these eight together."""
    seconds, model, gpu, count, work, text, recomputes, most = UPDATES[name]
    # transformers v5 sets no prefetch.
    efficiency = replace(Efficiency(), overlap=0.0) if "v5" in name else Efficiency()
    size = size_of(model) if isinstance(model, str) else model()
    run = Run(size, Cluster(gpu, count), work, recomputes, efficiency)
    layout = ParallelLayout.parse(text, count)
    ratio = update_time(run, layout, most).total / seconds
    assert 0.8 < ratio < 1.25


def test_megatron_on_a800_was_three_times_as_slow_as_a_plan() -> None:
    """ms-swift's 9.6 s/it, 6% of peak FLOP/s, were not used to choose constants, and are not met."""
    layout = ParallelLayout.parse("engine=megatron,tp=2,ep=8", 16)
    run = Run(size_of(MOE), Cluster(A800, 16), rows(16, 8192, 8192), recomputes=True)
    assert update_time(run, layout, 8192).total == pytest.approx(9.6 / 2.8, rel=0.05)


@pytest.mark.parametrize(
    ("model", "engine_ranks", "count", "completions", "longest", "mean", "text", "seconds", "ratio"),
    [
        ("Qwen3-32B", 4, 32, 2048, 4096, 3206, "engine=megatron,tp=4,pp=4", 393, 0.82),
        (MOE, 4, 32, 2048, 4096, 3154, "engine=megatron,tp=2,ep=8", 225, 0.48),
        ("Qwen3-235B-A22B", 16, 128, 512, 8192, 5671, "engine=megatron,tp=4,pp=2,ep=16", 506, 0.33),
    ],
)
def test_steps_of_grpo_are_a_third_to_four_fifths_of_what_was_measured(
    model: str,
    engine_ranks: int,
    count: int,
    completions: int,
    longest: int,
    mean: int,
    text: str,
    seconds: int,
    ratio: float,
) -> None:
    """nemo-rl was not used to choose constants: a plan of GRPO is a lower bound, above all with experts."""
    layout, prompt = ParallelLayout.parse(text, count), 200
    values = {
        "algorithm": "grpo",
        "model": {"path": model},
        "data": {"train": {"path": "builtin:questions", "columns": {"prompt": "question", "solution": "answer"}}},
        "rewards": ["accuracy"],
        "rollout": {"engine": "transformers", "tensor_parallel_size": engine_ranks, "max_num_seqs": 512},
        "train": {
            "max_prompt_length": 256, "max_completion_length": longest - 256, "num_generations": 32, "beta": 0.01,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 512 // layout.data_ranks,
            "steps_per_generation": completions // layout.data_ranks,
        },
        "output_dir": "runs/plan",
    }  # fmt: skip
    recipe, size = Recipe.parse(values), size_of(model)
    work = Workload.of(recipe, 40_960, layout, mean=mean - prompt)
    plan = RunPlanner(recipe, size, Cluster(H100, count), work).plan(layout)
    assert plan.step_seconds / seconds == pytest.approx(ratio, abs=0.05)
