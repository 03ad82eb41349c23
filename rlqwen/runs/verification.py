"""Test on a user's own recipe whether a run that is killed and resumed equals one that is not.

    comparison = verify_resume(load_recipe("my.yaml"), steps=4, announce=print)
    comparison.is_exact, str(comparison)

Metrics other than times are compared exactly, completions word by word, final weights bit by bit.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from rlqwen.config import Recipe
from rlqwen.config.recipe_yaml import load_recipe, write_resolved
from rlqwen.errors import RlqwenError
from rlqwen.preflight import plan_batch
from rlqwen.reporting.sinks import read_metrics
from rlqwen.run_folder.layout import COMPLETIONS_FOLDER, FINAL_FOLDER, METRICS_FILE
from rlqwen.runs.pairs import sample_pairs

_RUN = "import sys; from rlqwen.cli import main; sys.exit(main(sys.argv[1:]))"
_DIE = "import sys; from rlqwen.runs.verification import train_and_die; train_and_die(sys.argv[1], int(sys.argv[2]))"
_MAX_LISTED = 8


@dataclass(frozen=True)
class Difference:
    """One metric, text or weight that differs between two runs."""

    what: str
    step: float
    """Update that it belongs to; infinite for the final weights."""
    size: float
    """Largest absolute difference; infinite if one side lacks it, or if it is not a number."""

    def __str__(self) -> str:
        where = f"update {self.step:.0f}: " if math.isfinite(self.step) else ""
        return f"{where}{self.what}" + (f" differs by {self.size:.3g}" if math.isfinite(self.size) else "")


@dataclass
class Comparison:
    """The result of comparing two runs: what was compared, and what differs."""

    differences: list[Difference] = field(default_factory=list)
    num_metrics: int = 0
    num_completions: int = 0
    num_weights: int = 0

    @property
    def is_exact(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        compared = (
            f"{self.num_metrics:,} metrics, {self.num_completions:,} completions and {self.num_weights:,} final weights"
        )
        if self.is_exact:
            return f"exact: {compared} are the same, to the bit"
        first = min(self.differences, key=lambda one: one.step)
        lines = [f"not exact: {len(self.differences)} differences in {compared}", f"  it begins with {first}"]
        sized = [one for one in self.differences if math.isfinite(one.size)]
        for what, at_end in (("metric", False), ("weight", True)):
            own = [one for one in sized if math.isinf(one.step) == at_end]
            if own:
                lines.append(f"  the largest of a {what}: {max(own, key=lambda one: one.size)}")
        return "\n".join(lines + [f"  {one}" for one in self.differences if one not in sized][: _MAX_LISTED + 2])


def compare_runs(ours: Path, theirs: Path) -> Comparison:
    """Compare two finished run folders."""
    result = Comparison()
    result.differences += _compare_metrics(read_metrics(ours), read_metrics(theirs), result)
    result.differences += _compare_completions(ours / COMPLETIONS_FOLDER, theirs / COMPLETIONS_FOLDER, result)
    result.differences += _compare_weights(ours / FINAL_FOLDER, theirs / FINAL_FOLDER, result)
    return result


def measures_time(key: str) -> bool:
    """Return whether a metric measures time, and so is never the same twice."""
    return key.startswith("time/") or key.rpartition("/")[2] in ("time", "seconds", "wait_seconds")


def _compare_metrics(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], result: Comparison
) -> Iterator[Difference]:
    for place in range(max(len(ours), len(theirs))):
        if place >= min(len(ours), len(theirs)):
            line = (ours if len(ours) > len(theirs) else theirs)[place]
            yield Difference(f"a line of {METRICS_FILE} is in one run only", line["step"], math.inf)
            continue
        one, other = ours[place], theirs[place]
        for key in sorted({*one, *other}):
            if measures_time(key):
                continue
            result.num_metrics += 1
            first, second = one.get(key), other.get(key)
            if first != second:
                size = math.inf
                if isinstance(first, int | float) and isinstance(second, int | float):
                    size = abs(first - second)
                yield Difference(f"{key} ({first!r} and {second!r})", one["step"], size)


def _compare_completions(ours: Path, theirs: Path, result: Comparison) -> Iterator[Difference]:
    names = {path.name for folder in (ours, theirs) for path in folder.glob("*.jsonl")}
    for name in sorted(names):
        step = int(Path(name).stem.rpartition("-")[2])
        if not ((ours / name).is_file() and (theirs / name).is_file()):
            yield Difference(f"{COMPLETIONS_FOLDER}/{name} is in one run only", step, math.inf)
            continue
        lines = [(folder / name).read_text("utf-8").splitlines() for folder in (ours, theirs)]
        result.num_completions += len(lines[0])
        different = sum(first != second for first, second in zip(*lines, strict=False)) + abs(
            len(lines[0]) - len(lines[1])
        )
        if different:
            yield Difference(f"{different} of {len(lines[0])} completions in {name} are others", step, math.inf)


def _compare_weights(ours: Path, theirs: Path, result: Comparison) -> Iterator[Difference]:
    files = {path.relative_to(root) for root in (ours, theirs) for path in root.rglob("*.safetensors")}
    for file in sorted(files):
        if not ((ours / file).is_file() and (theirs / file).is_file()):
            yield Difference(f"{FINAL_FOLDER}/{file} is in one run only", math.inf, math.inf)
            continue
        first, second = load_file(ours / file), load_file(theirs / file)
        for name in sorted({*first, *second}):
            one, other = first.get(name), second.get(name)
            if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
                yield Difference(f"weight {name} is of another shape, or in one run only", math.inf, math.inf)
                continue
            result.num_weights += one.numel()
            if not torch.equal(one, other):
                size = (one.double() - other.double()).abs().max().item()
                yield Difference(f"weight {name}", math.inf, size)


def verify_resume(recipe: Recipe, *, steps: int, announce: Callable[[str], None]) -> Comparison:
    """Train `recipe` for `steps` steps twice, once killed in the middle and resumed, and compare both runs.

    Both happen in a temporary folder, in processes of their own. Raises RlqwenError with the end of the output if one
    of them fails.
    """
    with tempfile.TemporaryDirectory(prefix="rlqwen-verify-") as scratch:
        folder = Path(scratch)
        recipe = sample_pairs(recipe.model_copy(update={"output_dir": scratch}), announce)
        per_step = plan_batch(recipe.train, 1_000_000).updates_per_step
        half = max(steps // 2, 1) * per_step
        changes = {
            "max_steps": steps * per_step,
            "save_strategy": "steps",
            "save_steps": half,
            "save_only_model": False,
            "logging_steps": 1,
            "report_to": "none",
            "resume_from_checkpoint": None,
            "overwrite_output_dir": False,
        }
        files = []
        for name in ("straight", "killed"):
            train = recipe.train.model_copy(update=changes | {"output_dir": str(folder / name)})
            one = recipe.model_copy(update={"train": train, "output_dir": str(folder / name), "resume": None})
            files.append(folder / f"{name}.yaml")
            write_resolved(one, files[-1])
        announce(f"{recipe.algorithm}: {steps * per_step} updates without a break")
        _run([_RUN, "run", str(files[0])], folder, expected=0)
        announce(f"again, killed after update {half + per_step} or as soon as it is logged")
        _run([_DIE, str(files[1]), str(half + 1)], folder, expected=-signal.SIGKILL)
        announce(f"going on from the checkpoint after update {half}")
        _run([_RUN, "run", "--resume", str(files[1])], folder, expected=0)
        return compare_runs(folder / "straight", folder / "killed")


def _run(arguments: list[str], folder: Path, *, expected: int) -> None:
    log = folder / "output.log"
    with log.open("wb") as output:
        code = subprocess.run([sys.executable, "-c", *arguments], stdout=output, stderr=output, check=False).returncode
    if code != expected:
        lines = log.read_text("utf-8", errors="replace").splitlines()[-15:]
        raise RlqwenError("\n".join([f"verify-resume: a run ended with exit code {code}, not {expected}:", *lines]))


class _Killer(TrainerCallback):
    """Kill this process, as a kernel that is out of memory would, once the metrics of update `step` are logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(recipe_file: str, step: int) -> None:
    """Train a recipe, and kill this process after update `step`."""
    from rlqwen.trainers.factory import build_trainer

    trainer = build_trainer(load_recipe(recipe_file))
    trainer.callbacks.append(_Killer(step))
    trainer.train()
