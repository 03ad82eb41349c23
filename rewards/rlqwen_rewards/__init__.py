"""Provide the built-in rewards, which follow TRL's reward protocol and do not import rlqwen.

They are registered by entry points (`rlqwen rewards` lists them). TRL's names can be imported from here, too: use
`from rlqwen_rewards import accuracy_reward` instead of `from trl.rewards import accuracy_reward`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlqwen_rewards.accuracy import accuracy_reward, reasoning_accuracy_reward
    from rlqwen_rewards.cosine_length import get_cosine_scaled_reward
    from rlqwen_rewards.format import think_format_reward
    from rlqwen_rewards.repetition import get_repetition_penalty_reward
    from rlqwen_rewards.soft_overlong import get_soft_overlong_punishment

_MODULES = {
    "accuracy_reward": "accuracy",
    "get_cosine_scaled_reward": "cosine_length",
    "get_repetition_penalty_reward": "repetition",
    "get_soft_overlong_punishment": "soft_overlong",
    "reasoning_accuracy_reward": "accuracy",
    "think_format_reward": "format",
}

__all__ = [
    "accuracy_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that simple rewards do not import SymPy."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rlqwen_rewards' has no attribute {name!r}")
    return getattr(import_module(f"rlqwen_rewards.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
