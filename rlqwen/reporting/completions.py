"""Write the completions of a run to its folder, and read them back."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlqwen.run_folder.layout import COMPLETIONS_FOLDER
from rlqwen.secrets import redact_values
from rlqwen.terminal import json_text
from rlqwen.types import Group


class CompletionLog:
    """Write `completions/step-000123.jsonl`: one line per completion, with its prompt, rewards and advantage."""

    def __init__(self, output_dir: str | Path) -> None:
        self._folder = Path(output_dir) / COMPLETIONS_FOLDER

    def write(self, step: int, groups: Sequence[Group], *, evaluation: bool = False) -> Path:
        """Write the groups of a step and return the file. `evaluation`: write to `eval-000123.jsonl` instead."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{'eval' if evaluation else 'step'}-{step:06d}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for group in groups:
                for row in completion_rows(group):
                    file.write(json_text(redact_values(row)) + "\n")
        return path


def completion_rows(group: Group) -> Iterator[dict[str, Any]]:
    """Yield the JSON values of each completion of a group; missing rewards are None."""
    for index, completion in enumerate(group.completions):
        yield {
            "prompt_index": group.prompt.index,
            "prompt": group.prompt.content,
            "completion": completion.text,
            "rewards": {name: values[index] for name, values in group.rewards.items()},
            "reward": group.total_rewards_G[index] if group.total_rewards_G else None,
            "advantage": group.advantages_G[index] if group.advantages_G else None,
            "outcomes": {name: values[index] for name, values in group.call_statuses.items() if values[index] != "ok"},
            **({"extras": {name: values[index] for name, values in group.extras.items()}} if group.extras else {}),
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "policy_version": group.policy_version,
            **({"weight_versions": completion.weight_versions} if completion.weight_versions else {}),
        }


def read_completions(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's last evaluation, or of its last step if it has none; [] without completions."""
    folder = Path(run_dir) / COMPLETIONS_FOLDER
    files = sorted(folder.glob("eval-*.jsonl")) or sorted(folder.glob("step-*.jsonl"))
    return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()] if files else []
