"""Every error that rlqwen raises on purpose.

    RlqwenError
    ├── InputError (ValueError)          what the user gave is wrong: exit code 2, a message and no traceback
    │   ├── ConfigError                  a recipe or an argument of a config
    │   ├── DataError                    a data file or a row
    │   │   └── PromptMismatch           a preference row whose answers are to different prompts
    │   ├── ModelError                   a model folder, tokenizer or chat template
    │   ├── RewardSpecError              an unknown, ambiguous or ill-fitting reward
    │   └── ResourceError                more CPUs, GPUs or memory asked than there are
    ├── RewardFailure (RuntimeError)     a reward failed on too large a share of a batch
    ├── SaveError (OSError)              a checkpoint or a file of the run cannot be written
    ├── Preempted                        asked to stop, and saved: exit code 75, the run can go on
    │   └── Interrupted (KeyboardInterrupt)   the same by Ctrl-C: exit code 130
    ├── NonFiniteError (RuntimeError)    loss or gradient was NaN or infinite too many steps in a row
    ├── MainRankFailed (RuntimeError)    the main rank of several met an error, which it shows itself
    ├── WatchStop (RuntimeError)         the guard found a symptom whose action is to stop
    └── RolloutError (RuntimeError)      the rollout workers cannot go on
        ├── WorkerDied                   a worker died more often than it may be restarted
        ├── WeightSyncError              a worker's weights differ from the trainer's after a sync
        └── DeadlineExceeded (TimeoutError)   a wait outlived its deadline

A message says what is wrong, where, which value, and how to mend it. All of them pickle, because Ray carries
them between processes: an error takes exactly one argument, its message.
"""


class RlqwenError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(RlqwenError, ValueError):
    """What the user gave is wrong; the message alone must be enough to mend it."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe or an argument of a config is wrong."""


class DataError(InputError):
    """A data file or a row is wrong; the message names file and row."""


class PromptMismatch(DataError):
    """The answers of a preference row are answers to different prompts."""


class ModelError(InputError):
    """A model folder, tokenizer or chat template cannot be used."""


class RewardSpecError(InputError):
    """A reward is unknown, claimed by two packages, or asks for columns that the data lacks."""


class ResourceError(InputError):
    """More CPUs, GPUs or memory were asked for than exist."""


class RewardFailure(RlqwenError, RuntimeError):
    """A reward failed on too large a share of a batch; carries the reward's own traceback in its message."""


class SaveError(RlqwenError, OSError):
    """A checkpoint or a file of the run cannot be written: the disk is full, or not writable."""


class Preempted(RlqwenError):
    """The run was told to stop (SIGTERM, SIGUSR1, SIGHUP), and can go on from its last checkpoint."""

    exit_code = 75  # EX_TEMPFAIL: a scheduler may start the job again


class Interrupted(Preempted, KeyboardInterrupt):
    """The run was stopped by Ctrl-C, or by a notebook's stop button, and can go on from its last checkpoint."""

    exit_code = 130


class NonFiniteError(RlqwenError, RuntimeError):
    """Loss or gradient was NaN or infinite in too many steps in a row."""


class MainRankFailed(RlqwenError, RuntimeError):
    """The main rank met an error while the others waited for it; it shows that error itself."""


class WatchStop(RlqwenError, RuntimeError):
    """The guard of the run (`train.watch`) found a symptom that is to stop it; a checkpoint was saved first."""


class RolloutError(RlqwenError, RuntimeError):
    """The rollout workers cannot go on."""


class WorkerDied(RolloutError):
    """A rollout worker died more often than it may be restarted."""


class WeightSyncError(RolloutError):
    """A rollout worker's weights differ from the trainer's after a sync."""


class DeadlineExceeded(RolloutError, TimeoutError):
    """A wait outlived its deadline."""
