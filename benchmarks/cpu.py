"""Measure rlqwen on a CPU against TRL, plain matrix products and bare vLLM, and print one table with the bars.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --only sft,dpo

Each ratio is the median over alternations of both sides in one process, after one that warms up: the same weights, rows and
completions; the machine's noise hits both. Losses and gradient norms of both sides are compared in every alternation.
What TRL was given to be as fast as it can stands at the top of each module of `cpu_questions`; in one process with rlqwen it
also gets the malloc setting that rlqwen makes on a CPU. On a machine that others use, set OMP_NUM_THREADS=1. The exit code is 1 if the
losses of two sides differ or a question fails, and 0 whatever bars are missed: this measures, it does not test.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RLQWEN_DISPLAY", "off")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
warnings.simplefilter("ignore")
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

import torch
from cpu_questions import dpo, grpo, pool, products, sft
from cpu_questions.measuring import LOSS_TOLERANCE, TINY, Answer, Sizes, progress

QUESTIONS: dict[str, Callable[[Sizes, Path], Iterator[Answer]]] = {
    "grpo-skewed": lambda sizes, folder: grpo.answer("skewed", sizes, folder),
    "grpo-short": lambda sizes, folder: grpo.answer("short", sizes, folder),
    "sft": sft.answer,
    "dpo": dpo.answer,
    "products": products.answer,
    "pool": pool.answer,
}
HEADS = ("question", "median (min to max)", "bar", "")


def ask(name: str, sizes: Sizes) -> tuple[list[Answer], str | None]:
    """Return the answers to a question, and what stopped it, if anything did."""
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory(prefix="rlqwen-bench-") as folder:
        question = QUESTIONS[name](sizes, Path(folder))
        try:
            while (answer := next(question, None)) is not None:
                answers.append(answer)
                progress("; ".join(filter(None, answer.cells())))
        except Exception:  # noqa: BLE001 - the other questions and the answers so far are kept
            return answers, traceback.format_exc()
    return answers, None


def ask_all(names: list[str], sizes: Sizes) -> tuple[list[Answer], list[str]]:
    """Return all answers, and the names of questions that failed; each is asked in a process of its own, unless tiny."""
    answers: list[Answer] = []
    failed: list[str] = []
    for name in names:
        progress(name)
        if sizes.tiny:
            found, error = ask(name, sizes)
        else:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
                found, error = executor.submit(ask, name, sizes).result()
        answers += found
        if error is not None:
            print(error, file=sys.stderr)
            failed.append(name)
    return answers, failed


def report(answers: list[Answer]) -> None:
    """Print the table, and below it what belongs to its rows."""
    table = [HEADS, *(answer.cells() for answer in answers)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADS))]
    print()
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    for answer in answers:
        notes = [answer.note] if answer.note else []
        if answer.loss_gap is not None:
            notes.append(f"losses and gradient norms differ by at most {answer.loss_gap:.1e} of their size")
        if notes:
            print(f"{answer.question}: {'; '.join(notes)}")


def main() -> int:
    """Ask the questions, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"names of questions, with commas between: {', '.join(QUESTIONS)}")
    parser.add_argument("--rounds", type=int, help="measured alternations per question")
    parser.add_argument("--tiny", action="store_true", help="run with sizes that measure nothing, to try the script")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(QUESTIONS)
    if unknown := set(names) - set(QUESTIONS):
        parser.error(f"--only: no question {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    sizes = TINY if args.tiny else Sizes(rounds=args.rounds or Sizes.rounds)
    started = time.perf_counter()
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, load {load:.1f} at the start; "
        f"hidden {sizes.hidden}, {sizes.layers} layers, vocabulary {sizes.vocab}, float32 unless said otherwise"
    )
    answers, failed = ask_all(names, sizes)
    report(answers)
    print(f"\n{time.perf_counter() - started:.0f} s")
    different = [answer.question for answer in answers if not answer.same_losses]
    for question in different:
        print(f"losses differ by more than {LOSS_TOLERANCE}: {question}", file=sys.stderr)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if different or failed else 0


if __name__ == "__main__":
    sys.exit(main())
