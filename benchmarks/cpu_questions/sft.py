"""Compare the speed of supervised fine-tuning with TRL's on the same conversations, in tokens per second.

One update trains on all conversations. TRL's settings: its fused loss, and the fastest of packed rows (best fit, without
padding, one row per forward) and padded batches of several sizes, sorted by length. rlqwen packs.
"""

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_vs_trl import make_model
from transformers import AutoTokenizer

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
from rlqwen import SFTConfig, SFTTrainer

NUM_CONVERSATIONS = 32
MAX_LENGTH = 1024
MEDIAN_LENGTH = 180
"""Characters, which are tokens here, of a conversation without its template; lengths are log-normal."""
BATCH_OF = {"packed": 1, "padded 8": 8, "padded 4": 4, "padded 2": 2}


def conversations(count: int, longest: int, median: int) -> list[dict[str, Any]]:
    """Return conversations of one to three turns whose lengths are spread as those of people's are, around `median`."""
    rng = random.Random(3)
    rows = []
    for _ in range(count):
        length = min(max(int(rng.lognormvariate(math.log(median), 0.9)), 8), longest)
        num_turns = rng.choice((1, 2, 3))
        messages = []
        for _ in range(num_turns):
            for role, share in (("user", 0.3), ("assistant", 0.7)):
                text = "".join(str(rng.randrange(10)) for _ in range(max(int(length * share / num_turns), 1)))
                messages.append({"role": role, "content": text})
        rows.append({"messages": messages})
    return rows


def answer(sizes: Sizes, folder: Path) -> Iterator[Answer]:
    """Yield the answer."""
    model = folder / "model"
    make_model(model, argparse.Namespace(hidden=sizes.hidden, layers=sizes.layers, vocab=sizes.vocab), None)
    count, longest, median = (4, 40, 20) if sizes.tiny else (NUM_CONVERSATIONS, MAX_LENGTH - 124, MEDIAN_LENGTH)
    rows = conversations(count, longest, median)
    ours = _ours(model, rows, folder)
    candidates = ("packed", "padded 2") if sizes.tiny else tuple(BATCH_OF)
    best = fastest(candidates, lambda name: one_step(_trl(model, rows, folder, name, 1)))
    tokens: list[float] = []

    def step() -> Step:
        metrics = ours._train_on_next_rows()
        tokens.append(metrics["tokens/trained"])
        return Step(metrics["time/step"], metrics["loss"], metrics["grad_norm"])

    trl_trainer = _trl(model, rows, folder, best, sizes.rounds + 1)
    try:
        pairs = alternate(trl_trainer, step)
    finally:
        ours.close()
    theirs = trl_trainer._total_train_tokens / (sizes.rounds + 1)
    if theirs != tokens[0]:
        raise ValueError(f"TRL trained on {theirs} tokens, rlqwen on {tokens[0]}: not the same rows")
    progress(f"{pairs.seconds} for {theirs:.0f} tokens; losses differ by at most {pairs.loss_gap:.1e}")
    yield Answer(
        "SFT with packing, conversations of mixed length: our tokens/s over TRL's", pairs.ratios, 1.5,
        note=f"{pairs.seconds} for {theirs:.0f} tokens; TRL {best}", loss_gap=pairs.loss_gap,
    )  # fmt: skip


def _ours(model: Path, rows: list[dict[str, Any]], folder: Path) -> SFTTrainer:
    args: dict[str, Any] = {
        "output_dir": str(folder / "ours"), "learning_rate": 0.0, "gradient_checkpointing": False, "bf16": False,
        "save_strategy": "no", "max_steps": 10_000, "max_length": MAX_LENGTH, "packing": True,
        "assistant_only_loss": False, "max_tokens_per_micro_batch": 4 * MAX_LENGTH, "dataset_num_proc": 1,
    }  # fmt: skip
    counted = SFTTrainer(str(model), SFTConfig(**args), rows)
    args |= {"per_device_train_batch_size": len(counted.train_rows), "output_dir": str(folder / "ours-all")}
    trainer = SFTTrainer(str(model), SFTConfig(**args), rows)
    trainer._begin(None)
    return trainer


def _trl(model: Path, rows: list[dict[str, Any]], folder: Path, name: str, steps: int) -> Any:
    """Return a TRL trainer whose updates train on all rows."""
    import trl
    from datasets import Dataset

    packing = name == "packed"
    tokenizer = AutoTokenizer.from_pretrained(model)

    def build(accumulation: int) -> Any:
        args = trl.SFTConfig(**trl_arguments(
            folder / "trl", max_steps=steps, max_length=MAX_LENGTH, packing=packing, assistant_only_loss=False,
            per_device_train_batch_size=BATCH_OF[name], gradient_accumulation_steps=accumulation,
            train_sampling_strategy="random" if packing else "group_by_length",
        ))  # fmt: skip
        return trl.SFTTrainer(str(model), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    num_rows = len(build(1).train_dataset)
    return build(math.ceil(num_rows / BATCH_OF[name]))
