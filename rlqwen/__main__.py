"""`python -m rlqwen` is the command line."""

import sys

from rlqwen.cli import main

sys.exit(main())
