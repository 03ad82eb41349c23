"""Measure how fast many rows are prepared, and with how much memory, by rlqwen's SFTTrainer and by TRL's.

    python benchmarks/data_scale.py [--sizes 10000 100000] [--trl-sizes 10000] [--processes 2] [--rounds 1]

The rows are generated conversations of about 300 words in a JSONL file. The tokenizer is a BPE of 8,000 tokens trained
on them, or that of `--tokenizer FOLDER`. Each measurement runs in its own process with empty caches, and the two libraries
alternate. The process reads the file and makes the trainer, which tokenizes all rows with `--processes` processes. With
rlqwen it then trains three updates, because these make the order of all rows. The reported time is that of reading the
file and making the trainer, which includes loading a tiny model.

Memory is the private memory of the process and all its children: the sum of Pss_Anon and Pss_Shmem in
/proc/PID/smaps_rollup. Pages that processes share are counted once, and pages of mapped files are not counted. It is
sampled ten times per second, and the peak is reported. `bytes per row` is the growth of the peak from the smallest number
of rows to each other one, per additional row.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil

WORDS_PER_TURN = (100, 200)
SAMPLE_S = 0.1


def make_rows(path: Path, count: int) -> None:
    """Write conversations of invented words; frequent words are short, as in a natural language."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=1 + min(rank // 300, 3))) for rank in range(5000)]
    weights = list(accumulate(1 / (rank + 2) for rank in range(len(words))))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            lengths = [int(size * rng.uniform(0.5, 1.5)) for size in WORDS_PER_TURN]
            question, answer = (" ".join(rng.choices(words, cum_weights=weights, k=length)) for length in lengths)
            messages = [
                {"role": "user", "content": f"{number}: {question}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def make_model(folder: Path, rows: Path, tokenizer_folder: str | None) -> None:
    """Build a tiny random model with a tokenizer of realistic size."""
    from transformers import AutoTokenizer

    from rlqwen.models.tiny import build_tiny_qwen3

    build_tiny_qwen3(folder, hidden_size=32, num_layers=1, intermediate_size=64, num_heads=1, num_kv_heads=1)
    given = AutoTokenizer.from_pretrained(tokenizer_folder or folder)
    if tokenizer_folder is None:
        with rows.open(encoding="utf-8") as file:
            texts = [line for _, line in zip(range(2000), file, strict=False)]
        template = given.chat_template
        given = given.train_new_from_iterator(texts, vocab_size=8000)
        given.chat_template = template
    given.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(given)}), "utf-8")
    (folder / "model.safetensors").unlink()
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def prepare_rlqwen(model: str, rows: str, processes: int, output: str) -> tuple[float, int]:
    """Return the seconds until the trainer is made, and its number of rows; then train three updates."""
    from rlqwen import SFTConfig, SFTTrainer
    from rlqwen.config import DataConfig
    from rlqwen.data import load_recipe_data

    started = time.monotonic()
    data = load_recipe_data(DataConfig.parse({"train": {"path": rows}}))
    args = SFTConfig(
        output_dir=output,
        dataset_num_proc=processes,
        max_steps=3,
        per_device_train_batch_size=2,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = SFTTrainer(model, args, data.train)
    seconds = time.monotonic() - started
    trainer.train()
    return seconds, len(trainer.train_rows)


def prepare_trl(model: str, rows: str, processes: int, output: str) -> tuple[float, int]:
    """Do the same with TRL, as in its documentation, without training."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    started = time.monotonic()
    dataset = load_dataset("json", data_files=rows, split="train")
    args = SFTConfig(
        output_dir=output, dataset_num_proc=processes, max_steps=3, report_to="none", use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(model, args=args, train_dataset=dataset)
    prepared: Any = trainer.train_dataset
    return time.monotonic() - started, len(prepared)


def private_bytes(root: psutil.Process) -> int:
    """Return the private memory of a process and its children."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text("ascii").splitlines()
        except (OSError, psutil.Error):
            continue  # the process has ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024
    return total


def measure(side: str, model: Path, rows: Path, processes: int) -> dict[str, float]:
    """Run one library in its own process, and return its measurements and its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "RLQWEN_CACHE": f"{scratch}/rlqwen",
            "HF_DATASETS_CACHE": f"{scratch}/datasets",
            "HF_HUB_OFFLINE": "1",
            "RLQWEN_DISPLAY": "off",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        arguments = [side, str(model), str(rows), str(processes), f"{scratch}/run"]
        with subprocess.Popen(
            [sys.executable, __file__, "--side", *arguments],
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as child:
            process, peak = psutil.Process(child.pid), 0
            while child.poll() is None:
                peak = max(peak, private_bytes(process))
                time.sleep(SAMPLE_S)
            assert child.stdout is not None
            output = child.stdout.read()
        if child.returncode:
            raise SystemExit(f"{side} ended with exit code {child.returncode}; VERBOSE=1 shows why")
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result | {"peak": float(peak)}


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one line per library and number of rows, with medians over the rounds."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {size: folder / f"rows-{size}.jsonl" for size in {*args.sizes, *args.trl_sizes}}
        for size, path in files.items():
            make_rows(path, size)
        make_model(folder / "model", files[max(files)], args.tokenizer)
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for size in sorted(files):
                for side in ("rlqwen", "trl"):
                    if size in (args.sizes if side == "rlqwen" else args.trl_sizes):
                        result = measure(side, folder / "model", files[size], args.processes)
                        runs.setdefault((side, size), []).append(result)
                        print(f"{side} {size} {result}", file=sys.stderr, flush=True)
    first: dict[str, tuple[int, float]] = {}
    for (side, size), several in runs.items():
        seconds = statistics.median(one["seconds"] for one in several)
        peak = statistics.median(one["peak"] for one in several)
        before = first.setdefault(side, (size, peak))
        growth = (peak - before[1]) / (size - before[0]) if size != before[0] else None
        lines.append({"side": side, "rows": size, "seconds": seconds, "rows_per_second": size / seconds})
        lines[-1] |= {"peak_bytes": peak, "bytes_per_row": growth}
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--trl-sizes", type=int, nargs="*", default=[10_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokenizer")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, model, rows, processes, output = args.side
        prepare = {"rlqwen": prepare_rlqwen, "trl": prepare_trl}[side]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds, kept = prepare(model, rows, int(processes), output)
        print(json.dumps({"seconds": seconds, "kept": kept}))
        return
    print("side      rows  seconds  rows/s  peak MB  bytes per row")
    for line in compare(args):
        growth = "" if line["bytes_per_row"] is None else f"{line['bytes_per_row']:.0f}"
        print(
            f"{line['side']:6} {line['rows']:8,} {line['seconds']:8.1f} {line['rows_per_second']:7.0f} "
            f"{line['peak_bytes'] / 1e6:8.1f}  {growth}"
        )


if __name__ == "__main__":
    main()
