"""Define `rlqwen export`."""

from typing import Any

import click

from rlqwen.cli.session import prepare


@click.command()
@click.argument("source", metavar="MODEL_OR_RUN")
@click.argument("destination", metavar="DEST")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: that of the weights.")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--int8", is_flag=True, help="Quantize projections to int8, for vLLM and transformers (dense models).")
@click.option("--base", help="Base model of an adapter. Default: the one that the adapter names.")
def export(source: str, destination: str, **options: Any) -> None:
    """Write MODEL_OR_RUN to the folder DEST, ready to publish: adapter merged, cast, sharded, with a model card.

    MODEL_OR_RUN is a run folder (its final/, else its newest checkpoint), a checkpoint, a model folder or hub id, or
    an adapter's folder. DEST must not exist, or must be empty.

    \b
    rlqwen export runs/gsm8k out/gsm8k --dtype bfloat16
    rlqwen export runs/gsm8k/final/adapter out/merged --base Qwen/Qwen3-0.6B --int8
    """
    prepare()
    from rlqwen.runs.export import ExportOptions, export_model

    num_bytes = export_model(ExportOptions(source, destination, **options))
    click.echo(f"wrote {destination}: {num_bytes / 1e9:.3g} GB of weights, tokenizer and model card (README.md)")
