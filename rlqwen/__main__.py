"""`python -m rlqwen` is the command line."""

from rlqwen.cli import run_process

run_process()
