"""Compare an update with the plain matrix products of the same shapes, at hidden size 1024, in float32 and bfloat16.

The products are those of the linear layers and the head, on as many tokens: forward, gradient of the input, gradient of the
weight. Attention, norms, the second forward of the head, the optimizer, casts of weights to bfloat16 and packing count as
the update's overhead. The update is one of GRPO on the skewed completions, two layers deep, so that the head has its share.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from cpu_questions.grpo import Workload, update
from cpu_questions.measuring import Answer, Sizes, progress
from rlqwen import GRPOTrainer
from rlqwen.packing.batch import PackedBatch


def answer(sizes: Sizes, folder: Path) -> Iterator[Answer]:
    """Yield the answers for both dtypes."""
    wide = sizes if sizes.tiny else replace(sizes, hidden=1024, layers=2)
    workload = Workload("skewed", wide, folder)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        trainer = workload.fixed(name, bf16=dtype == torch.bfloat16)
        shares = []
        try:
            for round_ in range(sizes.rounds + 1):
                counts, seconds = _update(trainer)
                plain = sum(_seconds(*shape, dtype) for shape in _shapes(trainer.policy.base_model, *counts))
                progress(f"{name}: update {seconds:.2f} s, products {plain:.2f} s, {counts[0]} tokens")
                if round_:
                    shares.append(plain / seconds)
        finally:
            trainer.close()
        yield Answer(
            f"plain matrix products over the update, hidden {wide.hidden}, {name}", shares, 0.7,
            note=f"the last of {counts[0]} tokens, {counts[1]} of them with a loss",
        )  # fmt: skip


def _update(trainer: GRPOTrainer) -> tuple[tuple[int, int], float]:
    """Make an update; return its packed tokens, its target tokens, and its seconds."""
    seen: list[PackedBatch] = []
    logprobs = trainer.policy.logprobs

    def counted(batch: PackedBatch, **options: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(batch)
        return logprobs(batch, **options)

    with mock.patch.object(trainer.policy, "logprobs", counted):
        seconds = update(trainer).seconds
    return (sum(batch.num_tokens for batch in seen), sum(batch.num_targets for batch in seen)), seconds


def _shapes(model: nn.Module, num_tokens: int, num_targets: int) -> Iterator[tuple[int, int, int]]:
    """Yield rows, inputs and outputs of each linear layer; the head reads the target tokens alone."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield (
                num_targets if name.endswith("lm_head") else num_tokens,
                module.in_features,
                module.out_features,
            )


def _seconds(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """Return the seconds of the three products of a linear layer."""
    x, weight, gradient = (
        torch.randn(shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    started = time.perf_counter()
    _ = x @ weight.T, gradient @ weight, gradient.T @ x
    return time.perf_counter() - started
