"""Draw docs/images/quickstart.svg from the metrics of a quickstart run.

make quickstart
python docs/images/quickstart.py runs/quickstart docs/images/quickstart.svg
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

from rlqwen.reporting import read_metrics

matplotlib.use("svg")
import matplotlib.pyplot as plt

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quickstart",  # the same metrics give the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
TRAIN, EVAL = "#9db4d3", "#c0392b"


def points(run: Path, key: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a metric was logged, and its values."""
    rows = [row for row in read_metrics(run) if row.get(key) is not None]
    return [row["step"] for row in rows], [row[key] for row in rows]


def draw(run: Path, target: Path) -> None:
    """Draw the loss of SFT and the accuracy of GRPO side by side."""
    with plt.rc_context(STYLE):  # type: ignore[arg-type]  # it lists all keys
        figure, (sft, grpo) = plt.subplots(1, 2, figsize=(8.6, 2.9), layout="constrained")
        sft.plot(*points(run / "sft", "loss"), color=TRAIN, label="training batches")
        sft.plot(*points(run / "sft", "eval/loss"), "o-", color=EVAL, label="held-out sums")
        sft.set(title="1. SFT imitates a sloppy teacher", xlabel="update", ylabel="loss", yscale="log")
        grpo.plot(*points(run / "grpo", "reward/accuracy/mean"), color=TRAIN, label="training prompts")
        steps, values = points(run / "grpo", "eval/reward/accuracy/mean")
        grpo.plot(steps, values, "o-", color=EVAL, label="held-out sums")
        for step, value in zip(steps, values, strict=True):
            grpo.annotate(f"{value:.2f}", (step, value), (-5, 8), textcoords="offset points", ha="center", color=EVAL)
        grpo.set(
            title="2. GRPO corrects what imitation taught", xlabel="update", ylabel="right answers", ylim=(0.5, 1.06)
        )
        for axes in (sft, grpo):
            axes.legend(frameon=False, loc="best")
        figure.savefig(target, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
