"""List what recipes may name: registered plugins, and packaged recipes."""

import click

from rlqwen.cli.session import console
from rlqwen.plugins.kinds import ADVANTAGES, ENGINES, LOSSES, NORMALIZERS, REWARDS, TRAINERS
from rlqwen.plugins.registry import Registry


@click.command()
def rewards() -> None:
    """List rewards: names under `rewards` of a recipe."""
    _show_registered(REWARDS, "rewards")


@click.command()
def trainers() -> None:
    """List trainers: names for `algorithm` of a recipe."""
    _show_registered(TRAINERS, "trainers")


@click.command()
def losses() -> None:
    """List losses and normalizers: names for `train.loss_type` and `train.loss_normalizer`."""
    _show_registered(LOSSES, "losses")
    click.echo()
    _show_registered(NORMALIZERS, "normalizers")


@click.command()
def advantages() -> None:
    """List advantage estimators: names for `train.advantage_estimator`."""
    _show_registered(ADVANTAGES, "advantage estimators")


@click.command()
def engines() -> None:
    """List rollout engines: names for `rollout.engine`."""
    _show_registered(ENGINES, "rollout engines")


def _show_registered(registry: Registry, plural: str) -> None:
    """Print a table of name, origin and first docstring line, without importing any plugin."""
    from rich.table import Table
    from rich.text import Text

    entries = registry.discover()
    if not entries:
        click.echo(f"No {plural} are registered: no installed package has the entry point group {registry.group}.")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in ("name", "origin", "what it does"):
        table.add_column(heading, overflow="fold")
    for name, entry in entries.items():
        about = Text(f"unusable: {entry.conflict}", style="red") if entry.conflict else Text(entry.doc)
        table.add_row(name, entry.origin, about)
    console().print(table)


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
