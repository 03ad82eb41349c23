"""`rlqwen rewards` and `rlqwen recipes`."""

import click

from rlqwen.cli.session import console


@click.command()
def rewards() -> None:
    """List the registered rewards: name, origin package and version, what it does."""
    from rich.table import Table
    from rich.text import Text

    from rlqwen.rewards.registry import REWARDS

    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in ("name", "origin", "what it does"):
        table.add_column(heading, overflow="fold")
    entries = REWARDS.discover()
    for name, entry in entries.items():
        about = Text(f"unusable: {entry.conflict}", style="red") if entry.conflict else Text(entry.doc)
        table.add_row(name, entry.origin, about)
    console().print(table if entries else "No rewards are registered; is rlqwen installed with its built-in rewards?")


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the recipes that come with rlqwen, or copy one."""
    if context.invoked_subcommand is None:
        from rlqwen.config.recipe_yaml import list_recipes

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
    from rlqwen.config.recipe_yaml import copy_recipe

    click.echo(f"wrote {copy_recipe(name, destination)}")
