"""The command line. Nothing heavy is imported before a command needs it, so that `--help` is quick."""

import json
import os
import signal
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import click

from rlqwen import __version__
from rlqwen.errors import ConfigError, RlqwenError

INTERRUPTED = 130
TERMINATED = 143


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns 0 done, 2 wrong input, 1 anything else, 130 interrupted."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that a recipe may name `module:function` of the folder it is run in
    try:
        return cli.main(args=arguments, prog_name="rlqwen", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("rlqwen: interrupted", err=True)
        return INTERRUPTED
    except RlqwenError as error:
        for line in str(error).splitlines():
            click.echo(f"rlqwen: {line}", err=True)
        return error.exit_code
    except Exception:  # noqa: BLE001 - the outermost boundary
        traceback.print_exc()
        return 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", "-V", message="rlqwen %(version)s")
def cli() -> None:
    """Post-train Qwen models: SFT and GRPO, with rollouts from vLLM workers that Ray manages.

    \b
    rlqwen recipes                                  what comes with rlqwen
    rlqwen check quickstart_sft                     find what is wrong before it costs anything
    rlqwen run quickstart_sft quickstart_grpo       train, one recipe after the other
    """


@cli.command()
@click.argument("words", nargs=-1, required=True, metavar="RECIPE... [KEY=VALUE]...")
def run(words: tuple[str, ...]) -> None:
    """Train recipes, one after the other.

    RECIPE is a file or the name of a packaged recipe (see `rlqwen recipes`). KEY=VALUE changes a key by its dotted
    path, in every recipe that has it; KEY may begin with an algorithm to mean recipes of that algorithm only.

    \b
    rlqwen run quickstart_sft quickstart_grpo
    rlqwen run my.yaml train.learning_rate=1e-5 rewards.0.weight=2 data.eval=null
    rlqwen run sft.yaml grpo.yaml sft.train.max_steps=100 grpo.train.num_generations=4
    """
    recipes = _load(words)
    _prepare()
    from rlqwen.check import check_before_run
    from rlqwen.metrics.report import show_report
    from rlqwen.pipeline import run_pipeline

    check_before_run(recipes)
    run_dirs = run_pipeline(recipes, click.echo)
    show_report(run_dirs, _console())


@cli.command()
@click.argument("words", nargs=-1, required=True, metavar="RECIPE... [KEY=VALUE]...")
@click.pass_context
def check(context: click.Context, words: tuple[str, ...]) -> None:
    """Find what is wrong with recipes without a device: keys, data, template, masks, batch, rewards, resources.

    Ends with exit code 2 if anything is wrong. Arguments are those of `rlqwen run`.
    """
    recipes = _load(words)
    _prepare()
    from rlqwen.check import check_pipeline

    reports = check_pipeline(recipes)
    for report in reports:
        report.show(_console())
    if any(report.faults for report in reports):
        context.exit(ConfigError.exit_code)


@cli.command()
def rewards() -> None:
    """List the registered rewards: name, origin package and version, what it does."""
    from rich.table import Table
    from rich.text import Text

    from rlqwen.registry import discover

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in ("name", "origin", "what it does"):
        table.add_column(heading, overflow="fold")
    entries = discover()
    for name, entry in entries.items():
        about = Text(f"unusable: {entry.conflict}", style="red") if entry.conflict else Text(entry.doc)
        table.add_row(name, entry.origin, about)
    _console().print(table if entries else "No rewards are registered; is rlqwen installed with its built-in rewards?")


@cli.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the recipes that come with rlqwen, or copy one."""
    if context.invoked_subcommand is None:
        from rlqwen.recipe import list_recipes

        found = list_recipes()
        width = max((len(recipe.name) for recipe in found), default=0)
        for recipe in found:
            click.echo(f"{recipe.name:<{width}}  {recipe.description}")
        click.echo("\nCopy one to change it: rlqwen recipes copy NAME [DESTINATION]")


@recipes.command("copy")
@click.argument("name")
@click.argument("destination", default=".")
def copy(name: str, destination: str) -> None:
    """Copy the packaged recipe NAME to a file or folder (the working directory if not given)."""
    from rlqwen.recipe import copy_recipe

    click.echo(f"wrote {copy_recipe(name, destination)}")


@cli.command("eval")
@click.argument("model")
@click.option("--data", required=True, help="Data file, folder or hub id; or a recipe, whose eval data it is then.")
@click.option("--rewards", "reward_names", help="Rewards, separated by commas. Default: those of the recipe.")
@click.option("-k", "--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Per prompt.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Default: the recipe's, else 1.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of a completion. Default: the recipe's, else 512.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many prompts.")
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), help="Default: vllm where it imports.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Column map; may be repeated.")
@click.option("--system-prompt", help="Put before every prompt as a system turn.")
@click.option("--split", help="Split of a hub dataset.")
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Sample K completions a prompt from MODEL and score them: mean, pass@k, majority@k.

    \b
    rlqwen eval runs/quickstart/grpo/final --data runs/quickstart/grpo/recipe.yaml -k 8
    rlqwen eval Qwen/Qwen3-0.6B --data test.jsonl --column prompt=question --column solution=answer --rewards accuracy
    """
    _prepare()
    from rlqwen.evaluate import evaluate_model, evaluation_config, show_evaluation

    source = {"split": options.pop("split"), "system_prompt": options.pop("system_prompt")}
    config = evaluation_config(model, source=source, **options)
    with redirect_stdout(sys.stderr):
        result = evaluate_model(config)
    if as_json:
        click.echo(json.dumps(result.as_dict(), ensure_ascii=False, indent=2))
    else:
        show_evaluation(result, _console())


def _load(words: tuple[str, ...]) -> list[Any]:
    """Recipes and overrides as they come from the command line."""
    from rlqwen.recipe import load_recipes

    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    names = [word for word in words if word not in overrides]
    if not names:
        raise click.UsageError("no recipe given; `rlqwen recipes` lists those that come with rlqwen")
    return load_recipes(names, overrides)


def _prepare() -> None:
    """Before a command that loads models: end cleanly on SIGTERM, and silence what a user can do nothing about."""
    signal.signal(signal.SIGTERM, _terminate)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no other


def _terminate(signum: int, frame: Any) -> NoReturn:
    """End by way of every `finally`, so that no worker outlives the run."""
    sys.exit(TERMINATED)


def _console() -> Any:
    """Standard output; wide where it is no terminal, so that a log or a pipe gets whole lines."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)
