"""Print the command that resumes a run that was stopped."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from rlqwen.cli.session import RUN_AGAIN
from rlqwen.config import Recipe
from rlqwen.errors import InputError, Interrupted, Preempted, RolloutError
from rlqwen.secrets import redact


@contextmanager
def printing_resume_command(arguments: Sequence[str], recipes: Sequence[Recipe]) -> Iterator[None]:
    """End the command if the run was stopped: print what was saved, and how to resume.

    `arguments`: the words that rlqwen was started with.
    """
    to_move: set[tuple[Path, int]] = set()
    try:
        if "--resume" not in arguments:
            to_move = _earlier_runs(recipes)
        yield
    except Preempted as stop:
        text, code = redact(str(stop)), stop.exit_code
    except RolloutError as error:
        command = resume_command(arguments, recipes)
        if command is None or "RANK" in os.environ:
            raise
        raise type(error)(f"{error}\nresume with: {command}") from error
    except KeyboardInterrupt:
        text, code = "interrupted", Interrupted.exit_code
    except SystemExit as end:
        if end.code != RUN_AGAIN:
            raise
        text, code = "told to stop", RUN_AGAIN
    else:
        return
    if os.environ.get("RANK", "0") == "0":
        # An earlier run that was to be moved aside, and is still there, would be resumed instead of this one.
        command = None if to_move & _earlier_runs(recipes) else resume_command(arguments, recipes)
        with suppress(OSError):  # after SIGHUP there is no terminal
            click.echo(f"rlqwen: {text}", err=True)
            if command:
                click.echo(f"rlqwen: resume with: {command}", err=True)
    raise click.exceptions.Exit(code)


def resume_command(arguments: Sequence[str], recipes: Sequence[Recipe]) -> str | None:
    """Return the command that resumes the run; None if there is nothing to resume from."""
    from rlqwen.run_folder.layout import CHECKPOINTS_FOLDER
    from rlqwen.runs.stages import plan_stages
    from rlqwen.runs.supervisor import is_supervised

    try:
        stages = plan_stages(recipes, resume=True)
    except InputError:
        return None
    saved = [any((Path(recipe.output_dir) / CHECKPOINTS_FOLDER).glob("step-*")) for recipe in recipes]
    if not any(saved) and not any(stage.finished for stage in stages):
        return None
    if "RANK" in os.environ and not is_supervised():
        return "the same torchrun command, with --resume at its end"
    # A supervisor adds resume=auto to the words of a run that it starts again.
    words = [word for word in arguments if word not in ("--resume", "resume=auto")]
    return redact(shlex.join(["rlqwen", *words, "--resume"]))


def _earlier_runs(recipes: Sequence[Recipe]) -> set[tuple[Path, int]]:
    """Return files that mark runs in folders to be overwritten, each with its inode, which changes if the run is
    moved."""
    from rlqwen.reporting.summary import SUMMARY_FILE
    from rlqwen.run_folder.layout import CHECKPOINTS_FOLDER

    folders = [
        Path(recipe.output_dir)
        for recipe in recipes
        if recipe.train.overwrite_output_dir and not recipe.train.resume_from_checkpoint and recipe.resume != "auto"
    ]
    marks = [folder / name for folder in folders for name in (CHECKPOINTS_FOLDER, SUMMARY_FILE)]
    return {(mark, mark.stat().st_ino) for mark in marks if mark.exists()}


def announce_runs(recipes: Sequence[Recipe]) -> None:
    """Print what will be loaded before torch is imported, which takes seconds."""
    for place, recipe in enumerate(recipes):
        sources = recipe.data.train if isinstance(recipe.data.train, list) else [recipe.data.train]
        names = [source.path or source.generator or "pairs to be sampled" for source in sources]
        what = f"{recipe.algorithm} of {recipe.model.path} on {', '.join(names)}, in {recipe.output_dir}"
        click.echo(f"rlqwen: {'then' if place else 'loading torch and transformers for'} {redact(what)}")
