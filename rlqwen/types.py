"""What travels between data, rollout, scoring and training: plain dataclasses, no torch.

Example:
    A group is a prompt and its G completions; every list of a group with suffix `_G` is parallel to `completions`.

        prompt = Prompt(index=0, token_ids=[5, 6], content="2+2=", columns={"solution": "4"})
        group = Group(prompt, [Completion([52, 9], [-0.1, -0.2], "stop", "4")], policy_version=3)
        group.rewards["accuracy"] = [1.0]
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Message = dict[str, Any]
"""A chat turn: `role`, `content` and what else the chat template reads."""

FinishReason = Literal["stop", "length"]
"""`stop`: it ended by itself, at a stop token or a stop text. `length`: it was cut off at the token limit, hence
truncated."""

CallStatus = Literal["ok", "timeout", "error", "invalid"]
"""Result of one sample's reward call; rlqwen.rewards.total_reward says how it affects the total reward."""


@dataclass(slots=True)
class Prompt:
    """One row of the data, ready to be sampled from."""

    index: int
    """Row number in the dataset, from 0; part of the sampling seed."""
    token_ids: list[int]
    content: str | list[Message]
    """The prompt as reward functions see it: text, or messages."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, passed on to the reward functions that name them."""
    opens_reasoning: bool = False
    """The tokens end with `<think>`, which messages do not show: completions begin inside of the reasoning."""

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.content, str)


@dataclass(slots=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]
    """Includes the end-of-turn token, or the token that completes a stop text, when `finish_reason` is `stop`."""
    logprobs: list[float]
    """The sampler's log-probability of each token, after temperature and truncation of the distribution."""
    finish_reason: FinishReason
    text: str
    """Decoded without special tokens, for rewards and for people."""
    experts: "np.ndarray | None" = None
    """(tokens, L, K) experts that the sampler chose for each token in each of L layers, -1 where it did not say; may lack
    the last tokens, which nothing was sampled from. None: not asked for."""

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True)
class Group:
    """A prompt, its G completions, and what scoring and advantage estimation add to them."""

    prompt: Prompt
    completions: list[Completion]
    policy_version: int
    """Version of the weights that sampled the completions."""
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    """Raw reward of each completion by reward name; None where missing or not applicable."""
    call_statuses: dict[str, list[CallStatus]] = field(default_factory=dict)
    """Status of each reward call, parallel to `rewards`."""
    total_rewards_G: list[float | None] = field(default_factory=list)
    """Weighted sum over reward functions; None where it is missing, see rlqwen.rewards.total_reward."""
    advantages_G: list[float] = field(default_factory=list)
    prompt_experts: "np.ndarray | None" = None
    """(tokens, L, K) experts that the sampler chose for the prompt, see Completion.experts."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """What reward functions gave to `log_extra`: column -> a value for each completion."""

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(slots=True, frozen=True)
class Truncation:
    """Rule for which tokens of a distribution are kept; it depends on nothing but the distribution."""

    top_p: float = 1.0
    """The fewest likeliest tokens that have this probability together; 1: all."""
    top_k: int = 0
    """So many of the likeliest; 0: all."""
    min_p: float = 0.0
    """Those at least this share as likely as the likeliest; 0: all."""
    keeps_ties: bool = False
    """Tokens exactly as likely as the `top_k`-th stay as well, as with vLLM's sampler on CPU."""

    def __bool__(self) -> bool:
        return bool(self.top_p < 1 or self.top_k or self.min_p)


@dataclass(slots=True, frozen=True)
class Sampling:
    """Sampling parameters, with the names, meanings and order of vLLM's SamplingParams: allowed tokens, bad words,
    `min_tokens`, bias, penalties, temperature, min-p, top-k, top-p."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    """Texts that end a completion, which holds all of the token that completes one."""
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """No stop token or text ends a completion before it has so many."""
    bad_words: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    allowed_token_ids: tuple[int, ...] = ()
    """None: all."""

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.top_p, self.top_k, self.min_p)

    @property
    def reads_text(self) -> bool:
        """Return whether the engine needs a tokenizer."""
        return bool(self.stop or self.bad_words)


@dataclass(slots=True, frozen=True)
class GroupRequest:
    """Asks the rollout engine for one group; `len(seeds)` completions, each from its own seed."""

    prompt: Prompt
    seeds: tuple[int, ...]
    sampling: Sampling


@dataclass(slots=True, frozen=True)
class Canary:
    """A fixed token sequence with the trainer's own logprobs, which a worker must reproduce after a weight sync."""

    token_ids: tuple[int, ...]
    """T tokens."""
    logprobs: tuple[float, ...]
    """T - 1 values: log p(token t+1 | tokens up to t), at temperature 1."""
    tolerance: float
    """Largest mean absolute gap allowed, in nats a token; depends on the dtype that the worker computes in."""
