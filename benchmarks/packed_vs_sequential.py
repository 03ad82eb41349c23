"""Compare the packed forward and backward pass with one sequence at a time, alternating in one process.

    python benchmarks/packed_vs_sequential.py --rounds 5 [--models qwen3_5_text ...] [--workload skewed|short]

The batches have the lengths of `grpo_vs_trl.py`: 4 prompts with 8 completions each, with random lengths of the same
distribution, and a new batch in each round. An update is the logprobs of all completions and their backward pass, in
float32 (with `--bf16` under autocast), with the same weights on both sides. It excludes the optimizer's step, which is the
same for both. `sequential` sends prompt and completion through transformers' own layers, one sequence at a time, as rlqwen
does for models with recurrent layers that it cannot pack.
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.simplefilter("ignore")

import torch
from grpo_vs_trl import NUM_GENERATIONS, NUM_PROMPTS, WORKLOADS
from transformers import AutoModelForCausalLM

from rlqwen import GRPOConfig
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack

SEQUENTIAL = mock.patch("rlqwen.packing.forward.packing_obstacle", return_value="the benchmark measures it")


def make_batch(workload: dict[str, Any], seed: int) -> PackedBatch:
    rng = random.Random(seed)
    low, high = workload["prompt"]
    trees = []
    for number in range(NUM_PROMPTS):
        prompt = low + (high - low) * number // max(NUM_PROMPTS - 1, 1)
        lengths = [completion_length(rng, workload) for _ in range(NUM_GENERATIONS)]
        trees.append(Tree(tokens(rng, prompt), [Branch(tokens(rng, length)) for length in lengths]))
    return pack(trees)


def completion_length(rng: random.Random, workload: dict[str, Any]) -> int:
    """Return the maximum length, or a length drawn with the probability 1 / mean_length that a token is the last."""
    mean, limit = workload["mean_length"], workload["completion"]
    return limit if mean is None else next((n for n in range(1, limit) if rng.random() < 1 / mean), limit)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(256) for _ in range(count)]


def make_policies(model_type: str, args: argparse.Namespace, folder: Path) -> dict[str, Policy]:
    heads = max(1, args.hidden // 64)
    linear = {"linear_head_dim": args.linear_head_dim, "linear_num_key_heads": max(1, args.hidden // 128)}
    linear |= {"linear_num_value_heads": max(1, args.hidden // 64)}
    build_tiny_qwen3(
        folder, model_type=model_type, hidden_size=args.hidden, num_layers=args.layers, num_heads=heads,
        intermediate_size=3 * args.hidden, num_kv_heads=max(1, heads // 2), head_dim=64, tie_word_embeddings=False,
        **(linear if model_type.startswith(("qwen3_5", "qwen3_next")) else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(args.vocab)
    config = GRPOConfig(bf16=args.bf16, gradient_checkpointing=args.gradient_checkpointing)
    policies = {"packed": Policy(copy.deepcopy(model), config)}
    with SEQUENTIAL:
        policies["sequential"] = Policy(model, config)
    return policies


def update(name: str, policy: Policy, batch: PackedBatch) -> float:
    """Return the seconds of one update."""
    policy.model.zero_grad()
    started = time.perf_counter()
    with SEQUENTIAL if name == "sequential" else mock.MagicMock():
        logp_N, _ = policy.logprobs(batch)
        logp_N.sum().backward()
    return time.perf_counter() - started


def measure(model_type: str, args: argparse.Namespace, folder: Path) -> None:
    policies = make_policies(model_type, args, folder)
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    counts = []
    for round_ in range(args.rounds + 1):
        batch = make_batch(WORKLOADS[args.workload], seed=round_)
        counts.append(batch.num_tokens)
        for name, policy in policies.items():
            seconds[name].append(update(name, policy, batch))
    ratios = [slow / fast for slow, fast in zip(seconds["sequential"][1:], seconds["packed"][1:], strict=True)]
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(
        f"{model_type:18} packed {medians['packed']:.3f} s  sequential {medians['sequential']:.3f} s  "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
        f"{statistics.median(counts):.0f} packed tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen3"])
    parser.add_argument("--workload", choices=[*WORKLOADS], default="skewed")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one round that warms up")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--linear-head-dim", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {args.hidden}, layers {args.layers}")
    for model_type in args.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(model_type, args, Path(folder))


if __name__ == "__main__":
    main()
