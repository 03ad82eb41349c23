"""Build rewards from what a user passes as `reward_funcs`."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlqwen.errors import RewardSpecError
from rlqwen.rewards.registry import REWARDS, Reward, resolve, unique_names
from rlqwen.rewards.reward_model import RewardModel


def build_rewards(
    reward_funcs: Any, args_list: Sequence[Mapping[str, Any]] | None = None, tokenizers: Any = None
) -> list[Reward]:
    """Build rewards with distinct names from one entry or a list of entries. Models are not loaded here.

    Args:
        reward_funcs: each entry is a callable, a name that the registry knows, a Reward, a torch module, or the folder
            or hub id of a sequence-classification model.
        args_list: arguments of each reward, parallel to the entries.
        tokenizers: tokenizer of each reward model, parallel to the entries; None: the model's own.

    Raises:
        RewardSpecError: an entry is unknown or does not fit its arguments.
    """
    entries = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    all_args = _parallel([{}] * len(entries) if args_list is None else args_list, entries, "args")
    all_tokenizers = _parallel([None] * len(entries) if tokenizers is None else tokenizers, entries, "tokenizers")
    rewards = [_build(*one) for one in zip(entries, all_args, all_tokenizers, strict=True)]
    names = unique_names([reward.name for reward in rewards])
    return [dataclasses.replace(reward, name=name) for reward, name in zip(rewards, names, strict=True)]


def _build(entry: Any, args: Mapping[str, Any], tokenizer: Any) -> Reward:
    if isinstance(entry, Reward):
        return entry
    if _is_module(entry) or (isinstance(entry, str) and _is_model_path(entry)):
        unknown = set(args) - {"batch_size"}
        if unknown:
            raise RewardSpecError(f"a reward model takes only the argument 'batch_size' (value given: {dict(args)!r})")
        model = RewardModel(entry, tokenizer, **args)
        origin = entry if isinstance(entry, str) else type(entry).__qualname__
        takes = ("prompts", "completions")
        return Reward(model.name, model, origin, False, takes, takes, accepts_any_column=False)
    return resolve(entry, args)


def _parallel(values: Any, entries: Sequence[Any], what: str) -> list[Any]:
    given: list[Any] = list(values) if isinstance(values, list | tuple) else [values]
    if len(given) != len(entries):
        raise RewardSpecError(f"{len(given)} {what} for {len(entries)} rewards; give one per reward")
    return given


def _is_module(entry: Any) -> bool:
    torch = sys.modules.get("torch")  # if torch is not imported, no entry is a torch module
    return torch is not None and isinstance(entry, torch.nn.Module)


def _is_model_path(name: str) -> bool:
    """Return whether `name` is a folder, or looks like a hub id and is no registered reward."""
    if Path(name).is_dir():
        return True
    looks_like_an_id = name.count("/") == 1 and ":" not in name and not name.endswith(".py")
    return looks_like_an_id and name not in REWARDS.discover()
