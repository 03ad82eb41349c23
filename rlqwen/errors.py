"""Define every error that rlqwen raises on purpose.

    RlqwenError
    ├── InputError (ValueError)          invalid user input: exit code 2, a message and no traceback
    │   ├── ConfigError                  a recipe or an argument of a config
    │   ├── DataError                    a data file or a row
    │   │   └── PromptMismatch           a preference row whose answers belong to different prompts
    │   ├── ModelError                   a model folder, tokenizer or chat template
    │   ├── RewardSpecError              an unknown, ambiguous or ill-fitting reward
    │   └── ResourceError                more CPUs, GPUs or memory requested than available
    ├── RewardFailure (RuntimeError)     a reward failed on too large a share of a batch
    ├── SaveError (OSError)              a checkpoint or a file of the run cannot be written
    ├── Preempted                        stopped by a signal after saving: exit code 75, the run can resume
    │   └── Interrupted (KeyboardInterrupt)   stopped by Ctrl-C: exit code 130
    ├── NonFiniteError (RuntimeError)    loss or gradient was NaN or infinite too many steps in a row
    ├── MainRankFailed (RuntimeError)    the main rank raised an error, which it reports itself
    ├── WatchStop (RuntimeError)         the monitor found a symptom whose action is to stop
    └── RolloutError (RuntimeError)      the rollout workers cannot continue
        ├── WorkerDied                   workers died more often than they may be restarted
        ├── WeightSyncError              a worker's weights differ from the trainer's after a sync
        └── DeadlineExceeded (TimeoutError)   a wait passed its deadline

A message says what is wrong, where, which value, and how to fix it. All errors can be pickled, because Ray sends them
between processes: an error takes exactly one argument, its message.
"""

import re
import reprlib

from rlqwen.terminal import printable, printable_lines

QUOTED = 200
"""Most characters of a value that a message repeats."""
_LINES, _LINE = 30, 2500
"""Most lines of a message, and most characters of one, so that it fits a screen."""
_QUOTATION = re.compile(r"(?<!\w)(?:'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")(?!\w)|[^\s'\"]{301,}")
"""A quotation, which no apostrophe of a word begins or ends, or a long text without a space."""
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxtuple, _repr.maxset = 5, 20, 20, 20, 20
_repr.maxstring = _repr.maxother = QUOTED


def quoted(value: object) -> str:
    """Return the repr of any value, with at most 200 characters; of what is large or nested only the beginning is formed."""
    if isinstance(value, int) and value.bit_length() > 2000:
        return f"a number of {value.bit_length():,} bits"
    try:
        text = repr(value) if isinstance(value, str | bytes | float | int | None) else _repr.repr(value)
    except ValueError:  # a list that holds a number of thousands of digits
        text = f"a {type(value).__name__}"
    return _shorten(text)


def _shorten(text: str) -> str:
    return text if len(text) <= QUOTED else f"{text[:140]}...{text[-50:]}"


def _fit_screen(message: str) -> str:
    """Cut long quotations, lines and lists of lines in a message."""
    lines = printable_lines(_QUOTATION.sub(lambda found: _shorten(found[0]), message))
    if len(lines) > _LINES + 1:
        lines[_LINES:] = [f"... and {len(lines) - _LINES:,} lines more"]
    return "\n".join(line if len(line) <= _LINE else line[: _LINE - 3] + "..." for line in lines)


class RlqwenError(Exception):
    """Serve as the base of every error raised on purpose; `exit_code` is the exit code of the command line."""

    exit_code = 1
    is_on_all_ranks = False
    """Whether the rollouts of the main rank failed, and every rank has left the same call with an error."""

    def __str__(self) -> str:
        """Return the message, with whatever it quotes made printable."""
        return printable(super().__str__())


class InputError(RlqwenError, ValueError):
    """Report invalid user input; the message alone must be enough to fix it, and it is cut to what fits a screen."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(_fit_screen(message))


class ConfigError(InputError):
    """Report an invalid recipe or config argument."""


class DataError(InputError):
    """Report an invalid data file or row; the message names both."""


class PromptMismatch(DataError):
    """Report a preference row whose answers belong to different prompts."""


class ModelError(InputError):
    """Report a model folder, tokenizer or chat template that cannot be used."""


class RewardSpecError(InputError):
    """Report a reward that is unknown, claimed by two packages, or takes columns that the data lacks."""


class ResourceError(InputError):
    """Report a request for more CPUs, GPUs or memory than there are."""


class RewardFailure(RlqwenError, RuntimeError):
    """Report a reward that failed on too large a share of a batch; the message holds its traceback."""


class SaveError(RlqwenError, OSError):
    """Report that a checkpoint or file of the run cannot be written: the disk is full or not writable."""


class Preempted(RlqwenError):
    """Report that a signal (SIGTERM, SIGUSR1, SIGHUP) stopped the run, which can resume from its last checkpoint."""

    exit_code = 75  # EX_TEMPFAIL, so that a scheduler may restart the job


class Interrupted(Preempted, KeyboardInterrupt):
    """Report that Ctrl-C or a notebook's stop button stopped the run, which can resume from its last checkpoint."""

    exit_code = 130


class NonFiniteError(RlqwenError, RuntimeError):
    """Report a loss or gradient that was NaN or infinite in too many steps in a row."""


class MainRankFailed(RlqwenError, RuntimeError):
    """Report, on the other ranks, that the main rank raised an error while they waited for it."""


class WatchStop(RlqwenError, RuntimeError):
    """Report that the monitor (`train.watch`) stopped the run because of a symptom, after saving a checkpoint."""


class RolloutError(RlqwenError, RuntimeError):
    """Report that the rollout workers cannot continue."""


class WorkerDied(RolloutError):
    """Report that rollout workers died more often than they may be restarted."""


class WeightSyncError(RolloutError):
    """Report that a rollout worker's weights differ from the trainer's after a sync."""


class DeadlineExceeded(RolloutError, TimeoutError):
    """Report a wait that passed its deadline."""
