"""Define the command line. Nothing heavy is imported before a command needs it, so that `--help` is quick."""

import atexit
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import click

from rlqwen import __version__, stop_signals
from rlqwen.cli.data_commands import data
from rlqwen.cli.eval_command import evaluate
from rlqwen.cli.export_command import export
from rlqwen.cli.list_commands import advantages, engines, losses, recipes, rewards, trainers
from rlqwen.cli.plan_command import plan
from rlqwen.cli.run_commands import check, run, verify_resume_command
from rlqwen.cli.session import RUN_AGAIN, TERMINATED, hearing_interrupts, leave_on_signals, wait_for_cause
from rlqwen.errors import RlqwenError, SaveError
from rlqwen.secrets import redact
from rlqwen.terminal import guarded_streams, lost_output, open_standard_descriptors

INTERRUPTED = 130


def run_process() -> NoReturn:
    """Run the command line and end this process."""
    open_standard_descriptors()
    code = main()
    leave_on_signals(code)
    ray_cluster = sys.modules.get("rlqwen.rollout.ray_cluster")
    is_ray_lost = ray_cluster is not None and ray_cluster.is_lost()
    if code in (INTERRUPTED, RUN_AGAIN, TERMINATED) or is_ray_lost:
        # Ray, interrupted while it starts, may crash in the interpreter's own clean-up, and the exit code with it.
        if not is_ray_lost:  # else it would wait for processes that are gone
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0 if it is done, 2 for wrong input, 1 for anything else, 130 if interrupted, 143 or 75 if
    told to end."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that a recipe may name `module:function` of the folder it is run in
    with guarded_streams(), hearing_interrupts():
        return _run_command(sys.argv[1:] if arguments is None else arguments)


def _run_command(given: list[str]) -> int:
    try:
        code: int = cli.main(args=given, prog_name="rlqwen", standalone_mode=False, obj=given) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except (click.Abort, KeyboardInterrupt):
        return _report_interrupt()
    except SystemExit as end:
        if end.code in (RUN_AGAIN, TERMINATED):
            return end.code
        raise
    except Exception as error:  # noqa: BLE001 - the outermost boundary
        # In the middle of an import, or of a worker's call, a signal may come out as another error.
        if isinstance(error, SaveError) or not stop_signals.came():
            return _report_error(error)
        if signal.SIGINT in stop_signals.came():
            return _report_interrupt()
        click.echo("rlqwen: told to stop", err=True)
        return RUN_AGAIN


def _report_interrupt() -> int:
    click.echo("rlqwen: interrupted", err=True)
    return INTERRUPTED


def _report_error(error: Exception) -> int:
    """Print what went wrong; returns the exit code."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if error is lost_output():
        if not isinstance(error, BrokenPipeError):  # as at the end of `| head`
            click.echo(f"rlqwen: standard output cannot be written: {error}", err=True)
        return 1
    wait_for_cause(error)
    if isinstance(error, RlqwenError):
        for line in redact(str(error)).splitlines():
            click.echo(f"rlqwen: {line}", err=True)
        return error.exit_code
    click.echo(redact("".join(traceback.format_exception(error))), err=True, nl=False)
    return 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", "-V", message="rlqwen %(version)s")
def cli() -> None:
    """Post-train Qwen models: SFT, reward models, DPO, PPO and GRPO, with rollouts from vLLM workers that Ray manages.

    \b
    rlqwen recipes                                  what comes with rlqwen
    rlqwen check quickstart_sft                     find what is wrong before it costs anything
    rlqwen plan Qwen/Qwen3-8B --gpus 8xH100-80G     memory, time and cost on GPUs that need not be here
    rlqwen run quickstart_sft quickstart_grpo       train, one recipe after the other
    """


for command in (
    run, check, plan, verify_resume_command, evaluate, export, data,
    recipes, trainers, losses, advantages, rewards, engines,
):  # fmt: skip
    cli.add_command(command)
