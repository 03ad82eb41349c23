"""Compare the speed of DPO with TRL's on the same pairs: prompts of 512 tokens, two answers of 128 each.

Both sides compute the reference in the step; it is another model, so that the loss depends on every token. TRL's settings:
its fused head, the fastest of several micro-batch sizes. Its padding-free rows are switched off in 1.16.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from grpo_vs_trl import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpu_questions.measuring import (
    Answer,
    Sizes,
    Step,
    alternate,
    fastest,
    one_step,
    progress,
    trl_arguments,
)
from rlqwen import DPOConfig, DPOTrainer

NUM_PAIRS = 8
PROMPT, ANSWER = 512, 128


def pairs_of(count: int, prompt: int, answer_length: int) -> list[dict[str, str]]:
    """Return pairs of digits, each of which is a token."""
    rng = random.Random(5)

    def digits(length: int) -> str:
        return "".join(str(rng.randrange(10)) for _ in range(length))

    # Both libraries append the end-of-turn token.
    return [
        {"prompt": digits(prompt), "chosen": digits(answer_length - 1), "rejected": digits(answer_length - 1)}
        for _ in range(count)
    ]


def answer(sizes: Sizes, folder: Path) -> Iterator[Answer]:
    """Yield the answer."""
    shape = argparse.Namespace(hidden=sizes.hidden, layers=sizes.layers, vocab=sizes.vocab)
    model, reference = folder / "model", folder / "reference"
    torch.manual_seed(0)
    make_model(model, shape, None)
    _make_other(model, reference)
    rows = pairs_of(4, 16, 8) if sizes.tiny else pairs_of(NUM_PAIRS, PROMPT, ANSWER)
    ours = _ours(model, reference, rows, folder)
    candidates = ("2", "1") if sizes.tiny else ("4", "2", "1")
    best = fastest(candidates, lambda size: one_step(_trl(model, reference, rows, folder, int(size), 1)))

    def step() -> Step:
        metrics = ours._train_on_next_rows()
        return Step(metrics["time/step"], metrics["loss"], metrics["grad_norm"])

    try:
        pairs = alternate(_trl(model, reference, rows, folder, int(best), sizes.rounds + 1), step)
    finally:
        ours.close()
    progress(f"{pairs.seconds} for {len(rows)} pairs; losses differ by at most {pairs.loss_gap:.1e}")
    yield Answer(
        f"DPO, prompts {PROMPT}, answers {ANSWER}: our pairs/s over TRL's", pairs.ratios, 1.8,
        note=f"{pairs.seconds} for {len(rows)} pairs; TRL's micro-batch {best}", loss_gap=pairs.loss_gap,
    )  # fmt: skip


def _make_other(model: Path, folder: Path) -> None:
    """Write a model whose weights are a little off those of `model`."""
    other = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    other.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def _ours(model: Path, reference: Path, rows: list[dict[str, str]], folder: Path) -> DPOTrainer:
    args = DPOConfig(
        output_dir=str(folder / "ours"), learning_rate=0.0, gradient_checkpointing=False, bf16=False,
        save_strategy="no", max_steps=10_000, max_length=None, per_device_train_batch_size=len(rows),
        dataset_num_proc=1,
    )  # fmt: skip
    trainer = DPOTrainer(str(model), str(reference), args, rows)
    trainer._begin(None)
    return trainer


def _trl(model: Path, reference: Path, rows: list[dict[str, str]], folder: Path, size: int, steps: int) -> Any:
    """Return a TRL trainer whose updates train on all pairs."""
    import trl
    from datasets import Dataset

    args = trl.DPOConfig(**trl_arguments(
        folder / "trl", max_steps=steps, max_length=None, per_device_train_batch_size=size,
        gradient_accumulation_steps=len(rows) // size,
    ))  # fmt: skip
    return trl.DPOTrainer(
        str(model),
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
