"""Compare GRPO with TRL: the update alone on the same completions, then whole steps, in which both sides sample.

TRL's settings: its fused head (it knows no other), SDPA attention, no gradient checkpointing, no logs of completions; the
fastest of several micro-batch sizes with gradient accumulation. Its GRPO has neither packing nor padding-free rows.

TRL samples with transformers on a CPU. Its colocated vLLM starts there, but its weights cannot be replaced (vLLM's CPU
kernels keep repacked ones), and its server needs NCCL. The last row is a TRL that nobody can have there: colocated vLLM
whose weight sync is left out.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from grpo_vs_trl import NUM_GENERATIONS, NUM_PROMPTS, WORKLOADS, make_model, make_rows, parity_reward
from transformers import AutoTokenizer

from cpu_questions import fixed_engine
from cpu_questions.measuring import (
    Answer,
    Pairs,
    Sizes,
    Step,
    alternate,
    fastest,
    one_step,
    progress,
    take_seconds,
    timed,
    trl_arguments,
    uncovered,
)
from rlqwen import GRPOConfig, GRPOTrainer
from rlqwen.config import RolloutConfig

BATCH = NUM_PROMPTS * NUM_GENERATIONS
MICRO_BATCHES = {"skewed": ("32", "8"), "short": ("32", "16", "8", "4")}
"""Those of TRL that are tried; 16 and 4 were slower than 32 on skewed lengths too, which take long."""
TINY_WORKLOAD = {"prompt": (4, 8), "completion": 8, "mean_length": 4}


class Workload:
    """Hold the model, the prompts and the drawn completions of one workload, and make trainers for them."""

    def __init__(self, name: str, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        given = WORKLOADS[name] | (TINY_WORKLOAD if sizes.tiny else {})
        self.limit: int = given["completion"]
        self.model = folder / "model"
        make_model(
            self.model,
            argparse.Namespace(hidden=sizes.hidden, layers=sizes.layers, vocab=sizes.vocab),
            given["mean_length"],
        )
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.rows = make_rows(self.tokenizer, given["prompt"], NUM_PROMPTS * (sizes.rounds + 1))
        self.longest = given["prompt"][1] + self.limit
        self.drawn_path = folder / "completions.json"
        self.drawn = fixed_engine.draw_completions(
            self.drawn_path, len(self.rows), NUM_GENERATIONS, self.limit, given["mean_length"]
        )

    def ours(self, name: str, rollout: RolloutConfig, *, bf16: bool = False) -> GRPOTrainer:
        """Return a trainer of rlqwen that is ready to make steps."""
        args = GRPOConfig(
            output_dir=str(self.folder / name), per_device_train_batch_size=BATCH, num_generations=NUM_GENERATIONS,
            max_completion_length=self.limit, learning_rate=0.0, gradient_checkpointing=False, bf16=bf16,
            save_strategy="no", max_steps=10_000, shuffle_dataset=False, rollout=rollout,
        )  # fmt: skip
        trainer = GRPOTrainer(str(self.model), parity_reward, args, self.rows)
        trainer._begin(None)
        return trainer

    def fixed(self, name: str = "fixed", *, bf16: bool = False) -> GRPOTrainer:
        """Return a trainer of rlqwen to which the drawn completions are handed."""
        engine = f"{Path(fixed_engine.__file__).resolve()}:FixedEngine"
        return self.ours(name, RolloutConfig(engine=engine, engine_args={"path": str(self.drawn_path)}), bf16=bf16)

    def trl(self, micro_batch: int, steps: int, **more: Any) -> Any:
        """Return a TRL trainer."""
        import trl
        from datasets import Dataset

        rollout_func = more.pop("rollout_func", None)
        args = trl.GRPOConfig(**trl_arguments(
            self.folder / "trl", per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=BATCH // micro_batch, num_generations=NUM_GENERATIONS,
            max_completion_length=self.limit, shuffle_dataset=False, max_steps=steps, **more,
        ))  # fmt: skip
        return trl.GRPOTrainer(
            str(self.model),
            parity_reward,
            args=args,
            train_dataset=Dataset.from_list(self.rows),
            processing_class=self.tokenizer,
            rollout_func=rollout_func,
        )

    def trl_fixed(self, micro_batch: int, steps: int) -> tuple[Any, Callable[[], float]]:
        """Return a TRL trainer that is handed the drawn completions, and the seconds per step outside its update."""
        rollouts = fixed_engine.FixedRollouts([row["prompt"] for row in self.rows], self.drawn)
        trainer = self.trl(micro_batch, steps, rollout_func=rollouts)
        outside: list[float] = []
        trainer._generate_and_score_completions = timed(trainer._generate_and_score_completions, outside)
        return trainer, lambda: take_seconds(outside)


def answer(name: str, sizes: Sizes, folder: Path) -> Iterator[Answer]:
    """Yield the answers for one workload, `skewed` or `short`."""
    workload = Workload(name, sizes, folder)
    skewed = name == "skewed"
    candidates = ("8", "4") if sizes.tiny else MICRO_BATCHES[name]
    micro_batch = int(fastest(candidates, lambda size: one_step(*workload.trl_fixed(int(size), 1))))
    pairs = _updates(workload, micro_batch)
    progress(f"update: {pairs.seconds}; losses and gradient norms differ by at most {pairs.loss_gap:.1e}")
    yield Answer(
        f"GRPO update, {name} lengths: TRL's time over ours", pairs.ratios, 10.0 if skewed else 3.0,
        note=f"{pairs.seconds}; TRL's micro-batch {micro_batch}", loss_gap=pairs.loss_gap,
    )  # fmt: skip
    engine = "transformers" if sizes.tiny else "vllm"
    ours = workload.ours("ours", RolloutConfig(engine=engine))
    try:
        shares: list[float] = []
        pairs = alternate(workload.trl(micro_batch, sizes.rounds + 1), lambda: whole_step(ours, shares))
        progress(f"step: {pairs.seconds}")
        yield Answer(
            f"GRPO step, {name} lengths: TRL's time over ours", pairs.ratios, 4.0 if skewed else 2.0,
            note=f"{pairs.seconds}; rlqwen samples with {engine}, TRL with transformers",
        )  # fmt: skip
        yield Answer(
            f"GRPO step, {name} lengths: outside sampling and forward, backward, optimizer", shares[1:], 0.05,
            at_most=True, percent=True,
        )  # fmt: skip
        if not sizes.tiny:
            with colocated_without_sync():
                trl = workload.trl(
                    micro_batch, sizes.rounds + 1, use_vllm=True, vllm_max_model_length=workload.longest + 1,
                    vllm_gpu_memory_utilization=0.1,
                )  # fmt: skip
                pairs = alternate(trl, lambda: whole_step(ours, shares))
            progress(f"step, TRL with vLLM: {pairs.seconds}")
            yield Answer(
                f"the same, if TRL's vLLM worked on CPU (no weight sync), {name} lengths", pairs.ratios, None,
                note=pairs.seconds,
            )  # fmt: skip
    finally:
        ours.close()


def _updates(workload: Workload, micro_batch: int) -> Pairs:
    trainer = workload.fixed()
    trl, outside = workload.trl_fixed(micro_batch, workload.sizes.rounds + 1)
    try:
        return alternate(trl, lambda: update(trainer), outside)
    finally:
        trainer.close()


def update(trainer: GRPOTrainer) -> Step:
    """Make one step of rlqwen, and return what its update took, packing included."""
    metrics = trainer._train_on_next_rows()
    return Step(metrics["time/train"], metrics["loss"], metrics["grad_norm"])


def whole_step(trainer: GRPOTrainer, shares: list[float]) -> Step:
    """Make one step of rlqwen's loop, logs and checks included.

    Append the share of its time in which nothing was sampled and no forward, backward or optimizer step ran.
    """
    busy: list[tuple[float, float]] = []
    last: dict[str, float] = {}
    trainer.state.max_steps = trainer.state.global_step + 1
    step = trainer._train_on_next_rows

    def keep() -> dict[str, float]:
        last.update(step())
        return last

    with _recording(trainer, busy), mock.patch.object(trainer, "_train_on_next_rows", keep):
        started = time.perf_counter()
        trainer._run_loop()
        ended = time.perf_counter()
    shares.append(uncovered(started, ended, busy) / (ended - started))
    return Step(ended - started, last["loss"], last["grad_norm"])


@contextmanager
def _recording(trainer: GRPOTrainer, busy: list[tuple[float, float]]) -> Iterator[None]:
    """Record in `busy` when the engine samples and when the update computes.

    The canary of a weight sync is a forward too, but none of the update's: it does not count.
    """

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            busy.append((started, time.perf_counter()))
            return result

        return call

    def outside_sync(*args: Any, **kwargs: Any) -> Any:
        return (recorded(logprobs) if torch.is_grad_enabled() else logprobs)(*args, **kwargs)

    engine = trainer.rollouts.require_sampler().engine
    generate, logprobs = engine.generate, trainer.policy.logprobs

    def sampled(*args: Any, **kwargs: Any) -> Iterator[Any]:
        started = time.perf_counter()
        yield from generate(*args, **kwargs)
        busy.append((started, time.perf_counter()))

    with (
        mock.patch.object(engine, "generate", sampled),
        mock.patch.object(trainer.policy, "logprobs", outside_sync),
        mock.patch.object(trainer, "loss", recorded(trainer.loss)),
        mock.patch.object(trainer.optimizer, "backward", recorded(trainer.optimizer.backward)),
        mock.patch.object(trainer.optimizer, "step", recorded(trainer.optimizer.step)),
    ):
        yield


@contextmanager
def colocated_without_sync() -> Iterator[None]:
    """Let TRL's colocated vLLM start on a CPU, as rlqwen's worker starts it, and leave out its weight sync."""
    from trl.generation.vllm_generation import VLLMGeneration

    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with mock.patch.dict(os.environ, settings), mock.patch.object(VLLMGeneration, "sync_weights"):
        yield
