"""Keeps the inputs on which rewards failed, so that the failure can be repeated."""

import json
from pathlib import Path

from rlqwen.secrets import redact_values
from rlqwen.types import Group, Outcome

MAX_RECORDS = 200
"""Records a run; enough to see what goes wrong, and no reward that always fails fills the disk."""

FILE_NAME = "scoring_failures.jsonl"


class FailureLog:
    """Appends to `scoring_failures.jsonl` in `folder`; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / FILE_NAME
        self._num_records = 0

    def write(self, reward: str, outcome: Outcome, group: Group, sample: int, trace: str | None) -> None:
        """One record: the reward's name, prompt, completion and columns it was given, and what went wrong."""
        if self.path is None or self._num_records >= MAX_RECORDS:
            return
        self._num_records += 1
        completion = group.completions[sample]
        record = {
            "reward": reward,
            "outcome": outcome,
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
            file.write(json.dumps(redact_values(record), ensure_ascii=False, default=repr) + "\n")
