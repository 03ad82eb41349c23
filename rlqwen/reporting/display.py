"""Show a run while it trains: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Protocol

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlqwen.reporting.console import TerminalConsole
from rlqwen.terminal import echo

_PHASES = ("rollout", "reward", "train", "sync")
_EVALUATION_NAMES = {
    "reward/mean": "reward",
    "accuracy": "accuracy",
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "perplexity": "perplexity",
    "bleu": "bleu",
    "chrf": "chrf",
    "rouge_1": "rouge-1",
    "rouge_2": "rouge-2",
    "rouge_l": "rouge-L",
    "exact_match": "exact match",
    "label/accuracy": "label accuracy",
    "label/macro_f1": "macro F1",
    "label/micro_f1": "micro F1",
    "label/unparsable": "no label",
    "completions/mean_length": "len",
    "completions/truncated": "cut off",
}
_PACE_STEPS = 2
"""Steps needed after the first one, which imports, compiles and starts engines, for an estimate of the time left."""
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_POINTS = 32


class Display(Protocol):
    """Show the metrics of logged steps."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def show_evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None:
        """Show a line of text without breaking the rest of the display."""

    def close(self) -> None: ...


class PlainDisplay:
    """Print one compact line per logged step, at most one per `interval` seconds.

    Evaluations, the first and the last step are always printed. `write` prints a line; `clock` returns seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        interval: float = 5.0,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._interval = interval
        self._write = write or echo
        self._clock = clock
        self._progress = Progress(total_steps, clock)
        self._last_shown = float("-inf")
        self._held: tuple[int, Mapping[str, float]] | None = None

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.advance(step)
        now = self._clock()
        if now - self._last_shown < self._interval and step < self._total_steps:
            self._held = (step, metrics)
            return
        self._show_now(step, metrics)
        self._last_shown = now

    def show_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write(f"{self._position(step)}  {format_evaluation(metrics)}")

    def note(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        if self._held:
            self._show_now(*self._held)

    def _show_now(self, step: int, metrics: Mapping[str, float]) -> None:
        self._held = None
        parts = [self._position(step), *headline(metrics), *details(metrics), *speed(metrics)]
        remaining = self._progress.remaining()
        self._write("  ".join([*parts, *([] if remaining is None else [f"eta {format_duration(remaining)}"])]))

    def _position(self, step: int) -> str:
        width = len(str(self._total_steps))
        return f"step {step:>{width}}/{self._total_steps}"


class LiveDisplay:
    """Show a panel at the bottom of the terminal; other output scrolls above it."""

    def __init__(self, total_steps: int, title: str, console: TerminalConsole | None = None) -> None:
        self._total_steps = total_steps
        self._title = title
        self._progress = Progress(total_steps, time.monotonic)
        self._step = 0
        self._metrics: Mapping[str, float] = {}
        self._evaluations: list[tuple[int, Mapping[str, float]]] = []
        self._history: list[float] = []
        # Live redirects standard output and error, so that a user's print does not break the panel.
        self._live = Live(
            get_renderable=self._render, console=console or TerminalConsole(), refresh_per_second=4, transient=False
        )
        self._live.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.advance(step)
        self._step, self._metrics = step, metrics
        curve = metrics.get("reward/mean", metrics.get("loss"))
        if curve is not None:
            self._history.append(curve)

    def show_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show an evaluation; the first one stays visible beside the latest."""
        self._evaluations = [*self._evaluations[:1], (step, metrics)]

    def note(self, text: str) -> None:
        self._live.console.print(text)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Panel:
        position = Table.grid(padding=(0, 2), expand=True)
        position.add_column(no_wrap=True)
        position.add_column(ratio=1)
        position.add_column(no_wrap=True)
        position.add_row(
            f"step {self._step}/{self._total_steps}",
            ProgressBar(total=max(self._total_steps, 1), completed=self._step),
            f"{format_duration(self._progress.elapsed())} elapsed · {format_duration(self._progress.remaining())} left",
        )
        lines = [
            Text.assemble(("  ".join(headline(self._metrics)), "bold"), "  ", (sparkline(self._history), "cyan")),
            Text("  ".join(details(self._metrics))),
            Text("  ".join(speed(self._metrics)), style="dim"),
            *(Text(f"step {step}  {format_evaluation(found)}", style="green") for step, found in self._evaluations),
        ]
        return Panel(Group(position, *(line for line in lines if line.plain.strip())), title=Text(self._title))


class Progress:
    """Measure elapsed and remaining time. The pace is that of the steps after the first, which excludes start-up."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._start = clock()
        self._first: tuple[int, float] | None = None
        self._latest = (0, self._start)

    def advance(self, step: int) -> None:
        self._latest = (step, self._clock())
        self._first = self._first or self._latest

    def elapsed(self) -> float:
        return self._clock() - self._start

    def remaining(self) -> float | None:
        """Return the seconds left, 0 at the end; None until two steps follow the first one seen (warm-up)."""
        step, now = self._latest
        if step >= self._total_steps:
            return 0.0
        if self._first is None or step < self._first[0] + _PACE_STEPS:
            return None
        first_step, first_time = self._first
        return (self._total_steps - step) * (now - first_time) / (step - first_step)


def headline(metrics: Mapping[str, float]) -> list[str]:
    """Format the main metrics: the reward and each reward's mean, or the loss and how well pairs are ranked."""
    if "reward/mean" not in metrics:
        formats = {"loss": ".4f", "rewards/accuracies": ".3f", "rewards/margins": ".4f"}
        return [f"{_EVALUATION_NAMES[key]} {metrics[key]:{form}}" for key, form in formats.items() if key in metrics]
    parts = [f"reward {metrics['reward/mean']:.3f}"]
    for key, value in metrics.items():
        if key.startswith("reward/") and key.endswith("/mean") and key != "reward/mean":
            parts.append(f"{key.removeprefix('reward/').removesuffix('/mean')} {value:.3f}")
    return parts


def details(metrics: Mapping[str, float]) -> list[str]:
    """Format lengths, KL, entropy, gradient norm and learning rate, as far as the step has them."""
    parts = []
    if "completions/mean_length" in metrics:
        parts.append(f"len {metrics['completions/mean_length']:.1f}")
    if metrics.get("completions/truncated"):
        parts.append(f"cut off {metrics['completions/truncated']:.0%}")
    for key, label, form in (
        ("kl", "kl", ".2g"),
        ("entropy", "entropy", ".3f"),
        ("grad_norm", "grad", ".3g"),
        ("learning_rate", "lr", ".2g"),
    ):
        if key in metrics:
            parts.append(f"{label} {metrics[key]:{form}}")
    return parts


def speed(metrics: Mapping[str, float]) -> list[str]:
    """Format tokens per second over the whole step, and the share of each phase of the step's time."""
    parts = []
    seconds = metrics.get("time/step", 0.0)
    tokens = metrics.get("tokens/generated", metrics.get("tokens/trained"))
    if seconds > 0 and tokens is not None:
        parts.append(f"{tokens / seconds:,.0f} tok/s")
    spent = {phase: metrics[f"time/{phase}"] for phase in _PHASES if f"time/{phase}" in metrics}
    if seconds > 0 and len(spent) > 1:
        parts.append(" ".join(f"{phase} {value / seconds:.0%}" for phase, value in spent.items()))
    return parts


def evaluation_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the main metrics of an evaluation by short names, and failures if there are any.

    Times, counts and standard deviations are left out; the files hold them.
    """
    shown = {}
    for key, value in metrics.items():
        name = key.removeprefix("eval/")
        if name in _EVALUATION_NAMES:
            shown[_EVALUATION_NAMES[name]] = value
        elif name.startswith("reward/") and name.endswith("/mean"):
            shown[name.removeprefix("reward/").removesuffix("/mean")] = value
        elif value and name.endswith(("/missing", "/timeout", "/error", "/invalid", "/restarts")):
            shown[name.removeprefix("reward/")] = value
    return shown


def format_evaluation(metrics: Mapping[str, float]) -> str:
    """Format an evaluation in one line, such as `eval  reward 0.611  accuracy 0.520  len 6.1`."""
    return "eval  " + "  ".join(f"{name} {value:.4g}" for name, value in evaluation_metrics(metrics).items())


def format_duration(seconds: float | None) -> str:
    """Format seconds as `1:02:03` or `2:03`; None as `-`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: list[float]) -> str:
    """Draw a curve in at most 32 characters, each the mean over an equal number of steps."""
    values = [value for value in values if value - value == 0]
    if len(values) < 2:
        return ""
    width = min(_SPARK_POINTS, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)
