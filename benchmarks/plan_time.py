"""Compare how long a plan says that updates take with how long they take, on a CPU that one product calibrates.

    python benchmarks/plan_time.py

The "GPU" of the plan is one core of this machine: its peak is the rate of one matrix product, its bandwidth that of one
copy, both measured first. Times are processor seconds of this process, so that other work on the machine counts less. A
core reaches some share of its peak, the same at all shapes if the plan is right: that is what the last column shows.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from rlqwen import SFTConfig, SFTTrainer
from rlqwen.config import Recipe
from rlqwen.models.tiny import resolve_model_path
from rlqwen.planning.gpus import Cluster, Gpu
from rlqwen.planning.step_time import Efficiency, Run, update_time
from rlqwen.planning.workload import Workload
from rlqwen.preflight.model_check import ConfigFacts
from rlqwen.preflight.model_size import ModelSize
from rlqwen.preflight.parallel_layout import ParallelLayout

ROWS = 2
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dense, 256 wide, 6 layers": (Qwen3ForCausalLM, Qwen3Config, {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64}),
    "dense, 768 wide, 3 layers": (Qwen3ForCausalLM, Qwen3Config, {
        "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 3, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64}),
    "8 experts, 512 wide, 4 layers": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 512, "num_experts": 8,
        "num_experts_per_tok": 2}),
}  # fmt: skip
CPU = Efficiency(products=1.0, narrow=0.0, head=1.0, memory=1.0, layer_overhead=0.0)
"""One product is the measure: a core reaches about the same share of its peak at all of these widths."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=6, help="updates of each shape; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all shapes, of which the median is taken")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a packed row, of which an update has two")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rate, bandwidth = product_rate(ROWS * options.tokens), copy_rate()
    print(f"one core: {rate / 1e9:.1f} GFLOP/s in a product, {bandwidth / 1e9:.1f} GB/s in a copy")
    gpu = Gpu("core", rate, 1e12, bandwidth, 1e9, 1e9)
    measured: dict[str, list[float]] = {name: [] for name in SHAPES}
    sizes: dict[str, ModelSize] = {}
    for _ in range(options.rounds):
        for name in SHAPES:
            seconds, sizes[name] = measure(name, options.updates, options.tokens)
            measured[name].append(seconds)
    tokens = float(ROWS * options.tokens)
    work = Workload(ROWS, tokens, tokens, options.tokens, 0.0)
    planned = {
        name: update_time(
            Run(size, Cluster(gpu, 1), work, recomputes=False, efficiency=CPU), ParallelLayout(), tokens
        ).total
        for name, size in sizes.items()
    }
    medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
    mean = statistics.geometric_mean(planned[name] / medians[name] for name in SHAPES)
    print("shape | measured s | planned s | planned / measured | the same over the mean of the shapes")
    for name, times in measured.items():
        ratio = planned[name] / medians[name]
        spread = f"{medians[name]:.3f} ({min(times):.3f} to {max(times):.3f})"
        print(f"{name} | {spread} | {planned[name]:.3f} | {ratio:.2f} | {ratio / mean:.2f}")


def measure(name: str, updates: int, length: int) -> tuple[float, ModelSize]:
    """Return the median processor seconds of an update, and the size of the model."""
    torch.manual_seed(0)
    model_class, config_class, widths = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("builtin:tiny-qwen3", f"{folder}/tiny"))
        model = model_class(
            config_class(vocab_size=8192, max_position_embeddings=2048, tie_word_embeddings=True, **widths)
        )
        values: dict[str, Any] = {
            "max_length": length, "per_device_train_batch_size": ROWS, "packing": True, "max_steps": updates, "bf16": False,
            "gradient_checkpointing": False, "save_strategy": "no", "use_cpu": True, "output_dir": f"{folder}/run", "logging_steps": 1000,
        }  # fmt: skip
        rows = [{"text": " ".join(str(first + i) for i in range(1000))} for first in range(8 * updates)]
        clock = Clock()
        trainer = SFTTrainer(
            model, args=SFTConfig(**values), train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
        )
        trainer.train()
    recipe = Recipe.parse(
        {
            "algorithm": "sft",
            "model": {"path": "x"},
            "data": {"train": {"path": "builtin:questions"}},
            "output_dir": "x",
        }
    )
    size = ModelSize.measure(recipe, ConfigFacts("", {}, model.config, 2048, "float32", 0))
    return statistics.median(
        after - before for before, after in zip(clock.times[1:-1], clock.times[2:], strict=True)
    ), size


class Clock(TrainerCallback):
    """Note the processor time at the end of each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.times.append(time.process_time())


def product_rate(tokens: int) -> float:
    """Return the FLOP/s of a float32 product as large as those of the shapes, the median of many."""
    left, right = torch.randn(tokens, 768), torch.randn(768, 2304)
    seconds = statistics.median(timed(lambda: left @ right) for _ in range(30))
    return 2 * left.shape[0] * left.shape[1] * right.shape[1] / seconds


def copy_rate() -> float:
    """Return the bytes per second of a copy, read and written together."""
    source, target = torch.randn(16 * 2**20), torch.empty(16 * 2**20)
    return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source)) for _ in range(10))


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
