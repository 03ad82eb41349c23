"""`rlqwen eval`."""

import json
import sys
from contextlib import redirect_stdout
from typing import Any

import click

from rlqwen.cli.session import console, prepare


@click.command("eval")
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
    prepare()
    from rlqwen.evaluate import evaluate_model, evaluation_config, show_evaluation

    source = {"split": options.pop("split"), "system_prompt": options.pop("system_prompt")}
    config = evaluation_config(model, source=source, **options)
    with redirect_stdout(sys.stderr):
        result = evaluate_model(config)
    if as_json:
        click.echo(json.dumps(result.as_dict(), ensure_ascii=False, indent=2))
    else:
        show_evaluation(result, console())
