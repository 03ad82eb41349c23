"""Write the inputs on which rewards failed to a file, so that the failure can be reproduced."""

from pathlib import Path

from rlqwen.secrets import redact_values
from rlqwen.terminal import json_text
from rlqwen.types import CallStatus, Group

MAX_RECORDS = 200
"""Maximum number of records per run, so that a reward that always fails does not fill the disk."""

FILE_NAME = "scoring_failures.jsonl"


class FailureLog:
    """Append records to `scoring_failures.jsonl` in `folder`; without a folder, write nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / FILE_NAME
        self._num_records = 0

    def write(self, reward: str, status: CallStatus, group: Group, sample: int, trace: str | None) -> None:
        """Write one record: the reward's name, its prompt, completion and columns, and what went wrong."""
        if self.path is None or self._num_records >= MAX_RECORDS:
            return
        self._num_records += 1
        completion = group.completions[sample]
        record = {
            "reward": reward,
            "outcome": status,
            "prompt_index": group.prompt.index,
            "sample": sample,
            "policy_version": group.policy_version,
            "prompt": group.prompt.content,
            "completion": completion.text,
            "completion_ids": completion.token_ids,
            "columns": group.prompt.columns,
            "traceback": trace,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(redact_values(record), default=repr) + "\n")
