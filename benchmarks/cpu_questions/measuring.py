"""Measure two libraries in turn, in one process, and hold what was found."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

LOSS_TOLERANCE = 1e-3
"""Largest relative difference of losses and gradient norms, in float32, with which two updates count as the same."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run of the benchmark."""

    hidden: int = 256
    layers: int = 4
    vocab: int = 8192
    rounds: int = 3
    """Measured alternations, after one that warms up."""
    tiny: bool = False


TINY = Sizes(hidden=64, layers=1, vocab=512, rounds=1, tiny=True)


@dataclass(frozen=True)
class Answer:
    """Hold one row of the table."""

    question: str
    values: Sequence[float]
    """One value per alternation."""
    bar: float | None
    """None: for information."""
    at_most: bool = False
    """Whether the bar is an upper limit."""
    percent: bool = False
    note: str = ""
    loss_gap: float | None = None
    """Largest relative difference of loss or gradient norm between the two sides; None: they compute no loss."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "met" if (self.median <= self.bar if self.at_most else self.median >= self.bar) else "NOT MET"

    @property
    def same_losses(self) -> bool:
        return self.loss_gap is None or self.loss_gap <= LOSS_TOLERANCE

    def show(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:.2f}"

    def cells(self) -> list[str]:
        """Return question, measured, bar, and whether it is met."""
        spread = f"{self.show(self.median)} ({self.show(min(self.values))} to {self.show(max(self.values))})"
        bar = "" if self.bar is None else f"{'<=' if self.at_most else '>='} {self.show(self.bar)}"
        return [self.question, spread, bar, self.verdict]


@dataclass(frozen=True)
class Step:
    """Hold what one training step took, and what it computed."""

    seconds: float
    loss: float
    grad_norm: float


def progress(text: str) -> None:
    """Print a line of progress."""
    print(f"  [{time.strftime('%H:%M:%S')}] {text}", flush=True)


def relative_gap(first: float, second: float) -> float:
    """Return the difference over the larger size, or over 1e-3: GRPO's loss of completions of equal lengths is 0."""
    return abs(first - second) / max(abs(first), abs(second), 1e-3)


@dataclass
class Pairs:
    """Hold the steps of both sides, alternation by alternation; the first one warms up, and counts for losses only."""

    theirs: list[Step] = field(default_factory=list)
    ours: list[Step] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Return their seconds over ours, per measured alternation."""
        pairs = list(zip(self.theirs, self.ours, strict=True))
        return [theirs.seconds / ours.seconds for theirs, ours in pairs[1:]]

    @property
    def loss_gap(self) -> float:
        """Return the largest relative difference of loss and gradient norm over all alternations."""
        return max(
            max(relative_gap(theirs.grad_norm, ours.grad_norm), relative_gap(theirs.loss, ours.loss))
            for theirs, ours in zip(self.theirs, self.ours, strict=True)
        )

    @property
    def seconds(self) -> str:
        theirs, ours = (statistics.median(step.seconds for step in steps[1:]) for steps in (self.theirs, self.ours))
        return f"TRL {theirs:.2f} s, rlqwen {ours:.2f} s"


class AfterEachStep(TrainerCallback):
    """Time the steps of a TRL trainer, and call a function with each step once it is logged.

    A step is timed from `on_step_begin`, after its rows were read and collated, to the end of the optimizer's step.
    """

    def __init__(self, then: Callable[[Step], None], excluded: Callable[[], float] = lambda: 0.0) -> None:
        """Call `then` after each step; `excluded` returns the seconds of the step that do not count, and forgets them."""
        self._then, self._excluded = then, excluded

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._excluded()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._started - self._excluded()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self._then(Step(self._seconds, float(logs["loss"]), float(logs["grad_norm"])))


def alternate(trl_trainer: Any, ours: Callable[[], Step], excluded: Callable[[], float] = lambda: 0.0) -> Pairs:
    """Run the TRL trainer's own loop, and one step of ours after each of its steps."""
    pairs = Pairs()

    def then(step: Step) -> None:
        pairs.theirs.append(step)
        pairs.ours.append(ours())

    _train(trl_trainer, AfterEachStep(then, excluded))
    return pairs


def one_step(trl_trainer: Any, excluded: Callable[[], float] = lambda: 0.0) -> float:
    """Return the seconds of a TRL trainer's only step; it must have been built with `max_steps=1`."""
    steps: list[Step] = []
    _train(trl_trainer, AfterEachStep(steps.append, excluded))
    return steps[0].seconds


def _train(trl_trainer: Any, callback: TrainerCallback) -> None:
    trl_trainer.remove_callback(PrinterCallback)
    trl_trainer.add_callback(callback)
    trl_trainer.train()


def fastest(candidates: Sequence[str], seconds_of: Callable[[str], float]) -> str:
    """Return the fastest candidate of TRL's settings, and print what each took; the first one warms up before."""
    seconds_of(candidates[0])
    took = {candidate: seconds_of(candidate) for candidate in candidates}
    best = min(took, key=lambda candidate: took[candidate])
    shown = ", ".join(f"{candidate} {seconds:.2f} s" for candidate, seconds in took.items())
    progress(f"TRL's settings tried: {shown}; best: {best}")
    return best


def trl_arguments(folder: Any, **more: Any) -> dict[str, Any]:
    """Return the arguments of a TRL config for a CPU that logs loss and gradient norm of each step."""
    return {
        "output_dir": str(folder), "use_cpu": not torch.cuda.is_available(), "bf16": False, "learning_rate": 0.0,
        "gradient_checkpointing": False, "save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "seed": 0, **more,
    }  # fmt: skip


def take_seconds(total: list[float]) -> float:
    """Return the sum, and empty the list."""
    seconds = sum(total)
    total.clear()
    return seconds


def timed(function: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    """Return the function, which then adds its seconds to `total`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            total.append(time.perf_counter() - started)

    return call


def uncovered(start: float, end: float, intervals: Iterable[tuple[float, float]]) -> float:
    """Return the seconds between `start` and `end` that no interval covers."""
    edges = sorted((max(first, start), min(last, end)) for first, last in intervals if last > start and first < end)
    reached = start
    free = 0.0
    for first, last in edges:
        free += max(first - reached, 0.0)
        reached = max(reached, last)
    return free + max(end - reached, 0.0)
