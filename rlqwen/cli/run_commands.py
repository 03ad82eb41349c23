"""Define `rlqwen run`, `rlqwen check` and `rlqwen verify-resume`."""

import os
from typing import TYPE_CHECKING

import click

from rlqwen.cli.session import console, prepare, read_recipes
from rlqwen.errors import ConfigError, RlqwenError
from rlqwen.terminal import outlive_output

if TYPE_CHECKING:
    from rlqwen.config import Recipe


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="RECIPE... [KEY=VALUE]...")
@click.option(
    "--resume", is_flag=True, help="Resume from the newest complete checkpoint; skip recipes that are finished."
)
@click.option("--allow-changes", is_flag=True, help="Resume even if data, model, versions or keys have changed.")
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=0,
    help="Restart from the last checkpoint, at most this many times, if the run dies.",
)
@click.option(
    "--nproc-per-node",
    type=click.IntRange(min=1),
    default=1,
    help="Train in this many processes on this machine, one per GPU if there are GPUs.",
)
@click.option("--ignore-memory", is_flag=True, help="Run although `rlqwen check` finds the GPUs too small.")
@click.pass_context
def run(
    context: click.Context,
    words: tuple[str, ...],
    resume: bool,
    allow_changes: bool,
    max_restarts: int,
    nproc_per_node: int,
    ignore_memory: bool,
) -> None:
    """Train recipes, one after the other.

    RECIPE is a file or the name of a packaged recipe (see `rlqwen recipes`). KEY=VALUE sets the key of that dotted
    path in every recipe that has it. KEY may begin with an algorithm, to change recipes of that algorithm only.

    \b
    rlqwen run quickstart_sft quickstart_grpo
    rlqwen run my.yaml train.learning_rate=1e-5 rewards.0.weight=2 data.eval=null
    rlqwen run sft.yaml grpo.yaml sft.train.max_steps=100 grpo.train.num_generations=4
    rlqwen run my.yaml --resume
    rlqwen run my.yaml --max-restarts 3
    rlqwen run my.yaml --nproc-per-node 8
    torchrun --nnodes 2 --nproc-per-node 8 ... -m rlqwen run my.yaml

    On Ctrl-C the current update is finished and saved, and the exit code is 130; on SIGTERM, SIGUSR1 or SIGHUP (the
    terminal was closed) it is 75. The command that resumes the run is printed. A second signal ends it at once.
    """
    outlive_output()
    recipes = read_recipes(words)
    from rlqwen.cli.resume_command import announce_runs, printing_resume_command
    from rlqwen.config.batch_plan import check_ranks
    from rlqwen.runs.launch import is_rank, launch_command_line
    from rlqwen.runs.supervisor import RestartPolicy, end_with_supervisor, is_supervised, supervise_command_line

    for recipe in recipes:
        check_ranks(recipe, int(os.environ.get("WORLD_SIZE", "1")) if is_rank() else nproc_per_node)
    arguments = context.find_root().obj
    if not is_supervised() and os.environ.get("RANK", "0") == "0":
        announce_runs(recipes)
    if is_supervised():
        end_with_supervisor()
    elif max_restarts and is_rank():
        raise ConfigError("--max-restarts: under torchrun, use its own --max-restarts, with --resume or resume: auto")
    elif max_restarts:
        folders = [recipe.output_dir for recipe in recipes]
        context.exit(supervise_command_line(arguments, folders, RestartPolicy(max_restarts)))
    if nproc_per_node > 1 and not is_rank():
        context.exit(launch_command_line(arguments, nproc_per_node))
    with printing_resume_command(arguments, recipes):
        _train(recipes, resume=resume, allow_changes=allow_changes, ignore_memory=ignore_memory)


def _train(recipes: "list[Recipe]", *, resume: bool, allow_changes: bool, ignore_memory: bool) -> None:
    """Train in this process, which may be one rank of several."""
    prepare(resumable=True)
    from rlqwen.config import ParallelConfig
    from rlqwen.distributed import MainRank, Ranks
    from rlqwen.preflight import check_before_run
    from rlqwen.reporting.end_of_run import show_report
    from rlqwen.runs.pipeline import run_pipeline
    from rlqwen.runs.stages import Stage, plan_stages

    ranks = Ranks(ParallelConfig(timeout=max(recipe.train.parallel.timeout for recipe in recipes)))

    def plan() -> list[Stage]:
        stages = plan_stages(recipes, resume=resume, allow_changes=allow_changes)
        recipes_left = [stage.recipe for stage in stages if not stage.finished]
        check_before_run(recipes_left, num_ranks=ranks.world_size, ignore_memory=ignore_memory)
        return stages

    run_dirs = run_pipeline(MainRank(ranks).run(plan), click.echo if ranks.is_main else lambda text: None, ranks)
    if ranks.is_main:
        show_report(run_dirs, console(), next_command=recipes[-1].train.next_command)


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="RECIPE... [KEY=VALUE]...")
@click.option(
    "--gpu-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory of each GPU to plan for; by default that of this machine's GPUs, or a run on its CPU if it has none.",
)
@click.option(
    "--nproc-per-node",
    type=click.IntRange(min=1),
    default=1,
    help="Plan for this many ranks, as `rlqwen run` starts them.",
)
@click.pass_context
def check(context: click.Context, words: tuple[str, ...], gpu_memory: float | None, nproc_per_node: int) -> None:
    """Find what is wrong with recipes without a device: keys, data, template, masks, batch, memory, rewards, resources.

    Ends with exit code 2 if anything is wrong. Arguments are those of `rlqwen run`.
    """
    recipes = read_recipes(words)
    prepare()
    from rlqwen.preflight import check_pipeline

    reports = check_pipeline(recipes, gpu_gib=gpu_memory, num_ranks=nproc_per_node)
    for report in reports:
        report.show(console())
    if any(report.faults for report in reports):
        context.exit(ConfigError.exit_code)


@click.command("verify-resume")
@click.argument("words", nargs=-1, required=True, metavar="RECIPE [KEY=VALUE]...")
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=4,
    show_default=True,
    help="Steps of the run, which is killed halfway.",
)
@click.pass_context
def verify_resume_command(context: click.Context, words: tuple[str, ...], steps: int) -> None:
    """Find out whether RECIPE, killed and resumed, gives bit-identical results to a run without a break.

    Trains it three times for a few steps, in a temporary folder; its own run folder is not touched. If the results
    differ, prints the largest difference and where it began, and ends with exit code 1.
    """
    recipes = read_recipes(words)
    if len(recipes) > 1:
        raise click.UsageError("verify-resume takes one recipe at a time")
    prepare()
    from rlqwen.runs.verification import verify_resume

    comparison = verify_resume(recipes[0], steps=steps, announce=click.echo)
    click.echo(str(comparison))
    if not comparison.is_exact:
        context.exit(RlqwenError.exit_code)
