"""Run the command line: `rlqwen`, or `python -m rlqwen`."""

import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line and end this process."""
    try:
        from rlqwen.cli import run_process
    except KeyboardInterrupt:
        print("rlqwen: interrupted", file=sys.stderr)
        sys.exit(130)
    run_process()


if __name__ == "__main__":
    run()
