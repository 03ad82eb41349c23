"""Draw the curves of a run into an image."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlqwen.errors import DataError
from rlqwen.reporting.sinks import read_metrics
from rlqwen.terminal import printable

CURVES_FILE = "curves.png"
_SMOOTH_FROM = 40
"""Curves of at least this many points are drawn faint, with a smoothed curve over them."""

_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}


@dataclass(frozen=True)
class Panel:
    """Name the metric keys, which share a unit, of one set of axes."""

    title: str
    ylabel: str
    train_keys: tuple[str, ...]
    eval_keys: tuple[str, ...]


def plot_curves(run_dir: str | Path) -> Path:
    """Draw the curves of a run into `curves.png` of its folder and return that path.

    GRPO and PPO: reward and accuracy; SFT: the loss; DPO: loss, accuracy and margin. Raises DataError if the run has
    logged nothing.
    """
    return plot_pipeline(run_dir, [run_dir])


def plot_pipeline(folder: str | Path, run_dirs: Sequence[str | Path]) -> Path:
    """Draw the curves of several runs, one row per run, into `curves.png` of `folder`."""
    # Imported here, because Matplotlib takes half a second and only the end of a run needs it. Figure without pyplot
    # draws with Agg and does not change the user's backend.
    from matplotlib.figure import Figure

    rows = [(Path(run_dir), read_metrics(run_dir)) for run_dir in run_dirs]
    for run_dir, lines in rows:
        if not lines:
            raise DataError(f"{run_dir}: no metrics were logged, so there are no curves to draw")
    panels = [choose_panels(lines) for _, lines in rows]
    width = max(len(row) for row in panels)
    figure = Figure(figsize=(5.6 * width, 3.6 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for row, ((run_dir, lines), chosen) in enumerate(zip(rows, panels, strict=True)):
        for column in range(width):
            if column < len(chosen):
                _draw(axes[row][column], chosen[column], lines, run_dir.name)
            else:
                axes[row][column].set_visible(False)
    path = Path(folder) / CURVES_FILE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a run's Chinese name; a box is drawn for it
        figure.savefig(path)
    return path


def choose_panels(lines: Sequence[dict[str, Any]]) -> list[Panel]:
    """Choose the axes for a run's metrics: reward and its parts, or loss; accuracy if it was evaluated."""
    keys = {key: None for line in lines for key in line}
    means = tuple(key for key in keys if key.startswith("reward/") and key.endswith("/mean"))
    panels = []
    if "reward/mean" in keys:
        panels.append(Panel("reward", "weighted reward", ("reward/mean",), _known(keys, "eval/reward/mean")))
    elif "rewards/margins" in keys or "eval/rewards/margins" in keys:
        panels += _preference_panels(keys)
    elif "loss" in keys or "eval/loss" in keys:
        panels.append(Panel("loss", "nats per token", _known(keys, "loss"), _known(keys, "eval/loss")))
    accuracy = _known(keys, "reward/accuracy/mean")
    evaluated = _known(keys, "eval/accuracy") or _known(keys, "eval/reward/accuracy/mean")
    if accuracy or evaluated:
        panels.append(Panel("accuracy", "share of correct answers", accuracy, evaluated))
    others = tuple(key for key in means if key not in ("reward/mean", *accuracy))
    if others:
        panels.append(Panel("other rewards", "unweighted reward", others, ()))
    return panels or [Panel("metrics", "value", tuple(key for key in keys if key not in ("step", "nonfinite"))[:1], ())]


def _preference_panels(keys: dict[str, None]) -> list[Panel]:
    """Return the panels of preference runs: loss, share of pairs ranked correctly, and margin."""
    panels = [Panel("loss", "mean over pairs", _known(keys, "loss"), _known(keys, "eval/loss"))]
    ranked, evaluated = _known(keys, "rewards/accuracies"), _known(keys, "eval/rewards/accuracies")
    if ranked or evaluated:
        panels.append(Panel("accuracy", "share of pairs ranked correctly", ranked, evaluated))
    return [*panels, Panel("margin", "reward", _known(keys, "rewards/margins"), _known(keys, "eval/rewards/margins"))]


def _known(keys: dict[str, None], *wanted: str) -> tuple[str, ...]:
    return tuple(key for key in wanted if key in keys)


def _draw(axes: Any, panel: Panel, lines: Sequence[dict[str, Any]], run_name: str) -> None:
    for index, key in enumerate(panel.train_keys):
        steps, values = _series(lines, key)
        label = _label(key) if len(panel.train_keys) > 1 else "training"
        color = f"C{index}"
        smooth = len(values) >= _SMOOTH_FROM
        axes.plot(steps, values, color=color, alpha=0.25 if smooth else 1.0, label=None if smooth else label)
        if smooth:
            axes.plot(steps, _smoothed(values), color=color, linewidth=2, label=f"{label}, smoothed")
    for key in panel.eval_keys:
        steps, values = _series(lines, key)
        axes.plot(steps, values, "o-", color="black", markersize=5, label="evaluation")
        for step, value in {(steps[0], values[0]), (steps[-1], values[-1])}:
            axes.annotate(f"{value:.3g}", (step, value), (0, -14), textcoords="offset points", ha="center", bbox=_PAPER)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.title == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    axes.set_title(f"{printable(run_name)}: {panel.title}", parse_math=False)
    axes.set_xlabel("step (optimizer updates)")
    axes.set_ylabel(panel.ylabel)
    axes.grid(alpha=0.3)
    if panel.train_keys or panel.eval_keys:
        axes.legend(loc="best", fontsize="small")


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values. A step that was rolled back and repeated has its last value."""
    points = {line["step"]: line[key] for line in lines if line.get(key) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Average each point over a centered window, a twentieth of the curve wide, so that the end is not delayed."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _label(key: str) -> str:
    return key.removeprefix("reward/").removesuffix("/mean")
