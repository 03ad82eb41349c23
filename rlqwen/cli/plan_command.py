"""Define `rlqwen plan`."""

import json
import os

import click

from rlqwen.cli.session import console, prepare
from rlqwen.errors import ConfigError


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="RECIPE|MODEL [KEY=VALUE]...")
@click.option("--gpus", default="8xH100-80G", show_default=True, help="How many GPUs of which kind; nodes have 8.")
@click.option("--layout", help="How ranks divide the model, such as fsdp=16,ep=8; by default as the recipe says.")
@click.option("--best", is_flag=True, help="Look for the fastest layout that fits.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows of the data, if they are not on this machine.")
@click.option(
    "--mean-tokens",
    type=click.FloatRange(min=1),
    help="Mean length of a row, or of a completion; by default as long as the recipe allows.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def plan(
    context: click.Context,
    words: tuple[str, ...],
    gpus: str,
    layout: str | None,
    best: bool,
    rows: int | None,
    mean_tokens: float | None,
    as_json: bool,
) -> None:
    """Compute memory, time and cost of a run on GPUs that need not be here, from the model's config alone.

    RECIPE is a file or the name of a packaged recipe. MODEL is a folder with a config.json, or a hub id; configs of Qwen's
    models come with rlqwen. Of a model alone full fine-tuning by SFT is planned, and GRPO with algorithm=grpo.

    \b
    rlqwen plan Qwen/Qwen3-30B-A3B --gpus 16xH100-80G --best
    rlqwen plan Qwen/Qwen2.5-72B --gpus 64xH800 --layout fsdp=64
    rlqwen plan my_grpo.yaml --gpus 32xH100 rollout.tensor_parallel_size=4 --mean-tokens 2000

    Ends with exit code 2 if the GPUs are too small, and names the cheapest change that fits.
    """
    overrides = [word for word in words if "=" in word and not os.path.isfile(word)]  # noqa: PTH113 - words may be too long for a path
    targets = [word for word in words if word not in overrides]
    if len(targets) != 1:
        raise click.UsageError(f"plan takes one recipe or model at a time, and {len(targets)} are given")
    if layout and best:
        raise click.UsageError("--layout says which layout to plan, and --best looks for one: leave one of them out")
    prepare()
    from rlqwen.planning import make_plan

    made = make_plan(targets[0], overrides, gpus=gpus, layout=layout, best=best, num_rows=rows, mean_tokens=mean_tokens)
    if as_json:
        click.echo(json.dumps(made.values()))
    else:
        made.report().show(console())
    if not made.plan.fits:
        context.exit(ConfigError.exit_code)
