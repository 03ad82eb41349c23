"""Compare the speed of rlqwen's GRPOTrainer with TRL's under the same conditions, alternating in one process.

    python benchmarks/grpo_vs_trl.py [--steps 5] [--workload short|skewed] [--hidden 256] [--layers 4]

Both train the same model on the same prompts with the same limits, dtype and threads. TRL's trainer runs its own loop,
and after each of its steps each rlqwen trainer makes one step. The learning rate is 0, so that the distribution of lengths
does not change.

Engines: on a CPU, TRL samples with transformers' `generate`, because its vLLM modes do not run there. Its rollout is
compared with rlqwen's transformers engine (the same method) and with rlqwen's vLLM worker (what users of rlqwen get).
`update` is the whole step without sampling and rewards: logprobs, loss, backward pass and optimizer. rlqwen's step
includes weight syncs.

Workloads: `short` has prompts of 32 tokens and completions of 32 tokens. `skewed` has prompts of 128 to 256 tokens and
completions that end at a random token, with geometrically distributed lengths up to 256. The model's weights are random;
its head is changed so that the end-of-turn token has the same chosen probability at every position.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RLQWEN_DISPLAY", "off")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.simplefilter("ignore")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from rlqwen import GRPOConfig, GRPOTrainer
from rlqwen.config import RolloutConfig
from rlqwen.models.tiny import build_tiny_qwen3

NUM_PROMPTS, NUM_GENERATIONS = 4, 8
PHASES = ("step", "rollout", "update")
WORKLOADS: dict[str, dict[str, Any]] = {
    "short": {"prompt": (32, 32), "completion": 32, "mean_length": None},
    "skewed": {"prompt": (128, 256), "completion": 256, "mean_length": 64},
}


def parity_reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Return rewards that differ within a group and cost no time; both libraries use this function."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_model(folder: Path, args: argparse.Namespace, mean_length: int | None) -> None:
    """Build a random Qwen3 that ends a completion with probability 1 / mean_length at each token, or never (None)."""
    heads = args.hidden // 64
    build_tiny_qwen3(
        folder, hidden_size=args.hidden, num_layers=args.layers, intermediate_size=3 * args.hidden, num_heads=heads,
        num_kv_heads=max(1, heads // 2), head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.resize_token_embeddings(args.vocab)
    stop_ids = model.generation_config.eos_token_id
    with torch.no_grad():
        # Give all hidden states a common direction, by which the head can raise or lower one token at every position.
        model.model.embed_tokens.weight += 0.05
        ids = torch.randint(0, len(tokenizer), (8, 128))
        hidden = model.model(ids).last_hidden_state.flatten(0, 1)
        common = hidden.mean(0)
        logit = (
            -30.0
            if mean_length is None
            else torch.logsumexp(hidden @ model.lm_head.weight.T, 1).mean()
            - torch.log(torch.tensor(float(mean_length)))
        )
        for token in stop_ids:
            model.lm_head.weight[token] = common * (-30.0 / common.square().sum())
        model.lm_head.weight[stop_ids[0]] = common * (logit / common.square().sum())
    model.save_pretrained(folder)


def make_rows(tokenizer: Any, bounds: tuple[int, int], count: int = 64) -> list[dict[str, str]]:
    """Return text prompts with lengths spread evenly between the bounds."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        length = bounds[0] + (bounds[1] - bounds[0]) * index // max(count - 1, 1)
        digits = torch.randint(0, 10, (length,), generator=generator).tolist()
        text = "".join(map(str, digits))
        assert len(tokenizer(text).input_ids) == length
        rows.append({"prompt": text})
    return rows


class Stopwatch:
    """Hold the seconds of each library and phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {}

    def add(self, library: str, **phases: float) -> None:
        for phase, seconds in phases.items():
            self.seconds.setdefault(library, {}).setdefault(phase, []).append(seconds)


class Alternate(TrainerCallback):
    """Time each step of TRL's loop, and then one step of every rlqwen trainer."""

    def __init__(self, watch: Stopwatch, ours: dict[str, GRPOTrainer]) -> None:
        self.watch, self.ours = watch, ours
        self.rollout = 0.0

    def time_rollout(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.rollout += time.perf_counter() - started
            return result

        return timed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = time.perf_counter() - self.started
        self.watch.add("trl", step=step, rollout=self.rollout, update=step - self.rollout)
        for name, trainer in self.ours.items():
            started = time.perf_counter()
            metrics = trainer._train_on_next_rows()
            step = time.perf_counter() - started
            rollout = metrics["time/rollout"] + metrics["time/reward"]
            self.watch.add(name, step=step, rollout=rollout, update=metrics["time/train"])
        self.rollout, self.started = 0.0, time.perf_counter()


def shared_arguments(folder: Path, completion: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": NUM_PROMPTS * NUM_GENERATIONS,
        "num_generations": NUM_GENERATIONS, "max_completion_length": completion, "learning_rate": 0.0,
        "gradient_checkpointing": False, "bf16": False, "save_strategy": "no", "logging_steps": 1, "seed": 0,
    }  # fmt: skip


def make_ours(model: Path, rows: list[dict[str, str]], folder: Path, completion: int, engine: str) -> GRPOTrainer:
    arguments = shared_arguments(folder, completion)
    trainer = GRPOTrainer(
        str(model), parity_reward, GRPOConfig(**arguments, max_steps=10_000, rollout=RolloutConfig(engine=engine)), rows
    )
    trainer._begin(None)
    return trainer


def make_trl(model: PreTrainedModel, tokenizer: Any, rows: list[dict[str, str]], arguments: dict[str, Any]) -> Any:
    import trl
    from datasets import Dataset

    return trl.GRPOTrainer(
        model,
        parity_reward,
        args=trl.GRPOConfig(
            **arguments | {"logging_strategy": "no"},
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def measure(name: str, args: argparse.Namespace, folder: Path) -> Stopwatch:
    workload = WORKLOADS[name]
    model_folder = folder / name / "model"
    make_model(model_folder, args, workload["mean_length"])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = make_rows(tokenizer, workload["prompt"])
    watch = Stopwatch()
    ours = {
        f"rlqwen ({engine})": make_ours(model_folder, rows, folder / name / engine, workload["completion"], engine)
        for engine in args.engines
    }
    arguments = shared_arguments(folder / name / "trl", workload["completion"]) | {"max_steps": args.steps + 1}
    theirs = make_trl(AutoModelForCausalLM.from_pretrained(model_folder), tokenizer, rows, arguments)
    callback = Alternate(watch, ours)
    theirs._generate_single_turn = callback.time_rollout(theirs._generate_single_turn)
    theirs.add_callback(callback)
    try:
        theirs.train()
    finally:
        for trainer in ours.values():
            trainer.close()
    return watch


def report(name: str, watch: Stopwatch) -> None:
    """Print medians without the first step, which warms up, and the ratios of the two libraries' steps with their range."""
    print(f"\n{name}: {NUM_PROMPTS} prompts x {NUM_GENERATIONS} completions")
    print(f"{'':24}{'':10}{'seconds':>10}{'TRL / rlqwen: median (min to max)':>40}")
    for library, phases in watch.seconds.items():
        for phase in PHASES:
            seconds = phases[phase][1:]
            ratios = [theirs / ours for theirs, ours in zip(watch.seconds["trl"][phase][1:], seconds, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(
                f"{library:24}{phase:10}{statistics.median(seconds):>10.3f}"
                + (f"{spread:>40}" if library != "trl" else "")
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps per library, after one step that warms up")
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {args.hidden}, layers {args.layers}")
    with tempfile.TemporaryDirectory() as folder:
        for name in WORKLOADS if args.workload == "all" else [args.workload]:
            report(name, measure(name, args, Path(folder)))


if __name__ == "__main__":
    main()
