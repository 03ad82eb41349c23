"""Define `rlqwen eval`."""

import sys
from contextlib import redirect_stdout
from typing import Any

import click

from rlqwen.cli.session import console, prepare
from rlqwen.terminal import json_text


@click.command("eval")
@click.argument("model")
@click.option("--data", required=True, help="Data file, folder or hub id; or a recipe, for its eval data.")
@click.option(
    "--rewards", "reward_names", help="Separated by commas: names, module:function, file.py:function, reward models."
)
@click.option(
    "--metrics", "metric_names", help="perplexity, bleu, chrf, rouge, exact_match, label; separated by commas."
)
@click.option("--against", metavar="MODEL", help="Win rate by the rewards against this model, or against `data`.")
@click.option("--reference", metavar="COLUMN", help="Right answers; `completion`: the row's own. Default: solution.")
@click.option("--labels", "label_names", help="For the metric label, separated by commas. Default: all in the data.")
@click.option(
    "-k", "--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Completions per prompt."
)
@click.option("--temperature", type=click.FloatRange(min=0), help="Default: the recipe's, else 1.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Longest completion, in tokens. Default: the recipe's, else 512."
)
@click.option("--limit", type=click.IntRange(min=1), help="Take only this many rows, from the first.")
@click.option("--engine", help="vllm, transformers or a plugin's. Default: vllm if it can be imported.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Column map; may be repeated.")
@click.option("--system-prompt", help="System message to put before every prompt.")
@click.option("--split", help="Split of a hub dataset.")
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--output", type=click.Path(file_okay=False), help="Folder for eval.json and the completions.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL by rewards, by metrics, or both.

    Rewards and all metrics except perplexity are computed on K completions that are sampled per prompt. Rewards give
    mean, pass@k and majority@k; without --rewards and --metrics they are the recipe's. bleu, chrf, rouge, exact_match
    and label compare with the rows' right answers; perplexity is that of the rows' own answers, without sampling.

    \b
    rlqwen eval runs/quickstart/grpo/final --data runs/quickstart/grpo/recipe.yaml -k 8
    rlqwen eval Qwen/Qwen3-0.6B --data test.jsonl --column prompt=question --column solution=answer --rewards accuracy
    rlqwen eval runs/sft/final --data runs/sft/recipe.yaml --metrics perplexity,rouge --temperature 0
    rlqwen eval runs/dpo/final --against runs/sft/final --data test.jsonl --rewards runs/reward/final
    """
    prepare()
    from rlqwen.evaluation import evaluate_model, evaluation_config, show_evaluation
    from rlqwen.evaluation.eval_config import split_names

    source = {"split": options.pop("split"), "system_prompt": options.pop("system_prompt")}
    label_names = options.pop("label_names")
    labels = None if label_names is None else split_names(label_names)
    config = evaluation_config(model, source=source, labels=labels, **options)
    with redirect_stdout(sys.stderr):
        result = evaluate_model(config)
    if as_json:
        click.echo(json_text(result.as_dict(), indent=2))
    else:
        show_evaluation(result, console())
