"""Print the metrics of an evaluation as tables."""

from rich.table import Table

from rlqwen.evaluation.result import EvalResult
from rlqwen.reporting.console import TerminalConsole


def show_evaluation(result: EvalResult, console: TerminalConsole) -> None:
    """Print the metrics of a model, those of the model that it was compared with, and who won."""
    _show_metrics(result, console)
    if result.against is not None:
        console.print()
        _show_metrics(result.against, console)
        console.print()
        _line(f"{result.model} against {result.against.model}, by the higher reward:", console)
        console.print(_win_table(result))


def _show_metrics(result: EvalResult, console: TerminalConsole) -> None:
    if result.num_prompts:
        _line(
            f"{result.model}: {result.num_prompts} prompts x {result.num_samples} samples in {result.seconds:.0f} s, "
            f"{result.mean_length:.1f} tokens per completion, {result.truncated:.1%} cut off",
            console,
        )
    else:
        _line(f"{result.model}: {result.seconds:.0f} s", console)
    if result.rewards:
        console.print(_reward_table(result))
    if result.metrics:
        console.print(_metric_table(result))


def _reward_table(result: EvalResult) -> Table:
    passes = sorted({k for reward in result.rewards.values() for k in reward.pass_at or {}})
    table = _table("reward", "mean", *(f"pass@{k}" for k in passes), f"majority@{result.num_samples}", "missing")
    for name, reward in result.rewards.items():
        cells = [reward.mean, *((reward.pass_at or {}).get(k) for k in passes), reward.majority]
        table.add_row(name, *map(_number, cells), str(reward.missing))
    return table


def _metric_table(result: EvalResult) -> Table:
    table = _table("metric", "value")
    table.add_column("computed by", overflow="fold")
    for name, value in result.metrics.items():
        text = f"{value:,.0f}" if name == "tokens" else _number(value)
        note = next((note for area, note in result.notes.items() if name.startswith(area)), "")
        table.add_row(name, text, note)
    return table


def _win_table(result: EvalResult) -> Table:
    table = _table("reward", "win rate", "95% interval", "wins", "ties", "losses", "missing", "mean", "other's mean")
    for name, rate in result.win_rates.items():
        interval = "-" if rate.interval is None else f"{rate.interval[0]:.3f} to {rate.interval[1]:.3f}"
        counts = map(str, (rate.wins, rate.ties, rate.losses, rate.missing))
        table.add_row(name, _number(rate.win_rate), interval, *counts, _number(rate.mean), _number(rate.against_mean))
    table.caption = "Win rate: (wins + ties / 2) / pairs; interval: Wilson's, over prompts"
    table.caption_justify = "left"
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _line(text: str, console: TerminalConsole) -> None:
    console.print(text, soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
