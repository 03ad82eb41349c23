"""Run the command line: `python -m rlqwen`."""

from rlqwen.cli import run_process

run_process()
