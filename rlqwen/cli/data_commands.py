"""Define `rlqwen data check`, `rlqwen data show` and `rlqwen data pairs`."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from rlqwen.cli.session import console, prepare
from rlqwen.errors import ConfigError, DataError
from rlqwen.terminal import json_text

KINDS = ("sft", "prompts", "preference", "labelled")


@click.group()
def data() -> None:
    """Look at data before training on it."""


def _source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what to look at, for both commands."""
    options = (
        click.argument("target", metavar="PATH|RECIPE"),
        click.option(
            "--model", help="Model whose tokenizer and template to use. Default: the recipe's, else a tiny built-in."
        ),
        click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Column map; may be repeated."),
        click.option("--kind", type=click.Choice(KINDS), help="What the rows are for. Default: what they look like."),
        click.option("--eval", "evaluation", metavar="PATH", help="Evaluation data, besides the training data."),
        click.option("--max-length", type=click.IntRange(min=2), help="Tokens beyond which a row counts as truncated."),
        click.option("--system-prompt", help="System message to put before every prompt."),
        click.option("--split", help="Split of a hub dataset."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@data.command()
@_source_options
@click.option(
    "--near",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="Smallest similarity of near duplicates; 0: none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def check(context: click.Context, /, near: float, as_json: bool, **options: Any) -> None:
    """Report what is in data and what training would make of it; end with exit code 2 if rows are faulty.

    Reports unmapped columns, with the map to paste; unused columns and keys of messages; numbers of rows and messages;
    rows that are dropped or truncated; empty loss masks; EOS in the loss; equal answers; answers to different prompts;
    exact and near duplicates; overlap of train and eval; and token lengths.

    \b
    rlqwen data check pairs.jsonl --column chosen=good --column rejected=bad --model Qwen/Qwen3-0.6B
    rlqwen data check train.jsonl --eval test.jsonl --json
    rlqwen data check my_recipe.yaml
    """
    with redirect_stdout(sys.stderr):
        target = _find_target(**options)
        from rlqwen.preflight.dataset import check_dataset

        found = check_dataset(target, near or None)
    if as_json:
        click.echo(json_text(found.as_dict(), indent=2))
    else:
        from rlqwen.preflight.dataset import show_dataset_check

        show_dataset_check(found, console())
    if found.num_faults:
        context.exit(DataError.exit_code)


@data.command()
@_source_options
@click.option(
    "-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="Number of rows, from the first."
)
@click.option("--row", type=click.IntRange(min=0), help="Only the row with this number, from 0.")
@click.option("--part", type=click.Choice(["train", "eval"]), default="train", show_default=True)
@click.pass_context
def show(context: click.Context, /, count: int, row: int | None, part: str, **options: Any) -> None:
    """Print rows as training sees them: tokens in the loss are green, or in ⟦brackets⟧, and special tokens are bold.

    \b
    rlqwen data show pairs.jsonl --model Qwen/Qwen3-0.6B
    rlqwen data show my_recipe.yaml --row 17
    """
    target = _find_target(**options)
    from rlqwen.preflight.dataset import show_rows

    if part not in target.parts:
        raise ConfigError(f"{target.title} has no {part} data")
    numbers = range(count) if row is None else range(row, row + 1)
    screen = console()
    for warning in target.warnings:
        click.echo(f"rlqwen: {warning}", err=True)
    if not show_rows(target, part, numbers, screen):
        context.exit(DataError.exit_code)


def _find_target(
    target: str, columns: tuple[str, ...], system_prompt: str | None, split: str | None, **options: Any
) -> Any:
    prepare()
    from rlqwen.evaluation.eval_config import split_column
    from rlqwen.preflight.dataset import find_target

    source: dict[str, Any] = {"system_prompt": system_prompt, "split": split}
    source = {key: value for key, value in source.items() if value is not None}
    if columns:
        source["columns"] = dict(split_column(column) for column in columns)
    return find_target(target, source=source, **options)


@data.command()
@click.argument("model")
@click.option("--data", "prompts", required=True, help="Prompts: a file, folder or hub id, or a generator's name.")
@click.option(
    "--rewards", "reward_names", required=True, help="Rewards that say which answer is better, separated by commas."
)
@click.option("--output", required=True, metavar="FILE", help="The JSONL file to write; must not exist.")
@click.option(
    "-k", "--num-samples", type=click.IntRange(min=2), default=8, show_default=True, help="Answers per prompt."
)
@click.option(
    "--pairs-per-prompt", type=click.IntRange(min=1), default=1, show_default=True, help="Most pairs per prompt."
)
@click.option(
    "--min-gap",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Smallest difference of a pair's rewards.",
)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer, in tokens."
)
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Column map; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only this many prompts, from the first.")
@click.option("--engine", help="vllm, transformers or a plugin's. Default: vllm if it can be imported.")
@click.option("--seed", type=int, default=42, show_default=True)
def pairs(model: str, prompts: str, output: str, **options: Any) -> None:
    """Sample answers from MODEL and write pairs of a better and a worse one, for DPO and reward modeling.

    \b
    rlqwen data pairs runs/sft/final --data prompts.jsonl --rewards accuracy --output pairs.jsonl
    """
    path = Path(output)
    if path.exists():
        raise ConfigError(f"--output {output} exists already; remove it, or give another file")
    prepare()
    from rlqwen.runs.pairs import draw_pairs, sampled_config, write_pairs

    with redirect_stdout(sys.stderr):
        rows, summary = draw_pairs(model, sampled_config(prompts, **options))
    write_pairs(path, rows)
    click.echo(f"{summary} in {path}")
