"""Print the report at the end of `rlqwen run`: metrics before and after, files, samples, the next command."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlqwen.reporting.completions import read_completions
from rlqwen.reporting.console import TerminalConsole
from rlqwen.reporting.curves import CURVES_FILE
from rlqwen.reporting.display import evaluation_metrics, format_duration
from rlqwen.reporting.summary import SUMMARY_FILE, read_summary
from rlqwen.run_folder.layout import COMPLETIONS_FOLDER, FINAL_FOLDER, METRICS_FILE, RECIPE_FILE

_FILES = {
    SUMMARY_FILE: "the metrics above, and versions",
    CURVES_FILE: "the curves",
    METRICS_FILE: "every logged step",
    COMPLETIONS_FOLDER: "completions with their rewards",
    RECIPE_FILE: "the recipe with every default filled in",
    FINAL_FOLDER: "the trained model, for {auto_class}.from_pretrained",
}


def show_report(
    run_dirs: Sequence[str | Path], console: TerminalConsole, *, next_command: str, num_samples: int = 4
) -> None:
    """Print the results of finished runs from their run folders, and the next command (see TrainerConfig.next_command)."""
    for run_dir in map(Path, run_dirs):
        summary = read_summary(run_dir)
        took = format_duration(summary["wall_time_s"])
        console.print()
        console.rule(f"{run_dir}: {summary['algorithm']}, {summary['steps']} steps in {took}", align="left")
        table = evaluation_table(summary)
        console.print(table if table else "No evaluation was requested (train.eval_strategy).")
        if summary.get("watch"):
            console.print(
                Group(
                    Text("\nAlerts of the monitor (train.watch)", style="bold yellow"), *alert_lines(summary["watch"])
                )
            )
    last = Path(run_dirs[-1])
    samples = pick_samples(read_completions(last), num_samples)
    if samples:
        console.print(Group(Text("\nSample completions", style="bold"), *map(sample_lines, samples)))
    console.print(Group(Text("\nFiles", style="bold"), files_table(run_dirs)))
    console.print(Text("\nNext", style="bold"))
    command = next_command.format(
        final=shlex.quote(str(last / FINAL_FOLDER)), recipe=shlex.quote(str(last / RECIPE_FILE))
    )
    console.print(f"  {command}", soft_wrap=True)


def evaluation_table(summary: Mapping[str, Any]) -> Table | None:
    """Build a table of each evaluation metric before and after; None if nothing was evaluated."""
    before, after = (evaluation_metrics(summary[key] or {}) for key in ("initial_eval", "final_eval"))
    names = list(before | after)
    if not names:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("evaluation")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name in names:
        old, new = before.get(name), after.get(name)
        change = f"{new - old:+.3f}" if old is not None and new is not None else ""
        table.add_row(name, _format_value(old), _format_value(new), change)
    return table


def alert_lines(alerts: Sequence[Mapping[str, Any]], count: int = 8) -> list[Text]:
    """Format the first `count` alerts of a run: symptom, cause, and the recipe lines to change."""
    lines = []
    for alert in alerts[:count]:
        lines.append(Text(f"  step {alert['step']}: {alert['symptom']} ({alert['action']}): {alert['cause']}"))
        lines += [Text(f"      {advice}", style="cyan") for advice in alert["advice"]]
    if len(alerts) > count:
        lines.append(Text(f"  and {len(alerts) - count} more, in {METRICS_FILE}"))
    return lines


def pick_samples(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Pick rows evenly spread over the file, each of a different prompt."""
    first_of = {row["prompt_index"]: row for row in reversed(rows)}
    firsts = [first_of[index] for index in sorted(first_of)]
    picked = min(count, len(firsts))
    return [firsts[index * len(firsts) // picked] for index in range(picked)]


def sample_lines(row: Mapping[str, Any]) -> RenderableType:
    """Format prompt, completion and rewards, each shortened to one line."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = next((str(turn.get("content")) for turn in reversed(prompt) if turn.get("role") == "user"), "")
    rewards = "  ".join(
        f"{name} {'missing' if value is None else format(value, '.2f')}" for name, value in row["rewards"].items()
    )
    return Text.assemble(
        "  ",
        (_one_line(prompt), "dim"),
        " → ",
        _one_line(row["completion"]),
        "   ",
        (f"[{rewards}]" if rewards else "", "cyan"),
    )


def files_table(run_dirs: Sequence[str | Path]) -> Table:
    """Build a table of the files that the runs wrote, the combined files of a pipeline first."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    folders = [Path(run_dir) for run_dir in run_dirs]
    parent = pipeline_folder(folders)
    shown = [parent / name for name in (SUMMARY_FILE, CURVES_FILE)] if parent else []
    shown += [folder / name for folder in folders[-1:] for name in _FILES]
    shown += [folder / FINAL_FOLDER for folder in folders[:-1]]
    for path in shown:
        if path.exists():
            of_pipeline = " of all stages" if parent and path.parent == parent else ""
            what = _FILES[path.name].format(auto_class=auto_class(path)) + of_pipeline
            table.add_row(f"  {path}{'/' if path.is_dir() else ''}", what)
    return table


def auto_class(folder: Path) -> str:
    """Return the transformers class that loads the model in a folder; reward models have a different head."""
    try:
        architectures = json.loads((folder / "config.json").read_text("utf-8")).get("architectures")
    except (OSError, ValueError):
        architectures = None
    is_scalar = str(next(iter(architectures or ()), "")).endswith("ForSequenceClassification")
    return "AutoModelForSequenceClassification" if is_scalar else "AutoModelForCausalLM"


def pipeline_folder(run_dirs: Sequence[str | Path]) -> Path | None:
    """Return the parent that several run folders share; None for a single run, or without a common parent."""
    parents = {Path(run_dir).parent for run_dir in run_dirs}
    return parents.pop() if len(run_dirs) > 1 and len(parents) == 1 else None


def _format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _one_line(text: str, width: int = 72) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
