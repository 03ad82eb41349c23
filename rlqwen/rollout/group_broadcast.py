"""Pack scored groups for the other ranks: what training reads of them, in a few arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlqwen.data import find_prompts
from rlqwen.types import CallStatus, Completion, FinishReason, Group, Prompt


@dataclass(slots=True)
class PackedGroups:
    """Groups without the rows of their prompts and the texts of their completions; values of all completions are joined."""

    prompt_indices: list[int]
    sizes: list[int]
    """Completions of each group."""
    versions: list[int]
    lengths: list[int]
    """Tokens of each completion."""
    token_ids: np.ndarray
    """int32."""
    logprobs: np.ndarray
    """float32, which is what samplers compute in."""
    truncated: list[bool]
    rewards: list[dict[str, list[float | None]]]
    call_statuses: list[dict[str, list[CallStatus]]]
    total_rewards: list[list[float | None]]
    experts: list[np.ndarray | None]
    """Recorded experts of each completion."""
    prompt_experts: list[np.ndarray | None]


def pack_groups(groups: Sequence[Group]) -> PackedGroups:
    """Pack groups for the other ranks."""
    completions = [completion for group in groups for completion in group.completions]
    return PackedGroups(
        prompt_indices=[group.prompt.index for group in groups],
        sizes=[len(group) for group in groups],
        versions=[group.policy_version for group in groups],
        lengths=[len(completion.token_ids) for completion in completions],
        token_ids=np.array([token for completion in completions for token in completion.token_ids], dtype=np.int32),
        logprobs=np.array([logp for completion in completions for logp in completion.logprobs], dtype=np.float32),
        truncated=[completion.is_truncated for completion in completions],
        rewards=[group.rewards for group in groups],
        call_statuses=[group.call_statuses for group in groups],
        total_rewards=[group.total_rewards_G for group in groups],
        experts=[completion.experts for completion in completions],
        prompt_experts=[group.prompt_experts for group in groups],
    )


def unpack_groups(packed: PackedGroups, prompts: Sequence[Prompt]) -> list[Group]:
    """Return the groups with the prompts that this rank holds, and without texts."""
    found = find_prompts(prompts, packed.prompt_indices)
    token_ids, logprobs = packed.token_ids.tolist(), packed.logprobs.tolist()
    completions, start = [], 0
    for length, truncated, experts in zip(packed.lengths, packed.truncated, packed.experts, strict=True):
        part = slice(start, start + length)
        reason: FinishReason = "length" if truncated else "stop"
        completions.append(Completion(token_ids[part], logprobs[part], reason, "", experts))
        start += length
    groups, start = [], 0
    for place, size in enumerate(packed.sizes):
        groups.append(
            Group(
                found[place],
                completions[start : start + size],
                packed.versions[place],
                rewards=packed.rewards[place],
                call_statuses=packed.call_statuses[place],
                total_rewards_G=packed.total_rewards[place],
                prompt_experts=packed.prompt_experts[place],
            )
        )
        start += size
    return groups
