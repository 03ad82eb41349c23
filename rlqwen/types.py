"""Define the dataclasses that pass between data, rollout, scoring and training. Imports no torch.

Example:
    A group is a prompt and its G completions; every list with suffix `_G` is parallel to `completions`.

        prompt = Prompt(index=0, token_ids=[5, 6], content="2+2=", columns={"solution": "4"})
        group = Group(prompt, [Completion([52, 9], [-0.1, -0.2], "stop", "4")], policy_version=3)
        group.rewards["accuracy"] = [1.0]
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Message = dict[str, Any]
"""A chat message: `role`, `content` and other keys that the chat template reads."""

FinishReason = Literal["stop", "length"]
"""`stop`: the completion ended at a stop token or stop text. `length`: it was truncated at the token limit."""

CallStatus = Literal["ok", "timeout", "error", "invalid"]
"""Result of one sample's reward call; rlqwen.rewards.total_reward says how it affects the total reward."""


@dataclass(slots=True)
class Prompt:
    """Hold one row of the dataset, ready for sampling."""

    index: int
    """Row number in the dataset, from 0; part of the sampling seed."""
    token_ids: list[int]
    content: str | list[Message]
    """The prompt that reward functions get: text or messages."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, passed to the reward functions that take them."""
    opens_reasoning: bool = False
    """Whether the tokens end with `<think>`, which is not in the messages, so that completions begin inside the reasoning."""

    @property
    def is_conversational(self) -> bool:
        return not isinstance(self.content, str)


@dataclass(slots=True)
class Completion:
    """Hold one sampled completion."""

    token_ids: list[int]
    """If `finish_reason` is `stop`, includes the end-of-turn token or the token that completes a stop text."""
    logprobs: list[float]
    """The sampler's log-probability of each token, after temperature and truncation of the distribution."""
    finish_reason: FinishReason
    text: str
    """Decoded without special tokens."""
    experts: "np.ndarray | None" = None
    """(tokens, L, K) K experts that the sampler chose for each token in each of L layers, -1 if unknown; may lack the last
    tokens, which nothing was sampled from. None: not requested."""
    weight_versions: list[tuple[int, int]] | None = None
    """(version of the weights, tokens that it sampled), in order, if weights may change in flight. None: all tokens are of the
    group's `policy_version`."""

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True)
class Group:
    """Hold a prompt, its G completions, and their rewards and advantages."""

    prompt: Prompt
    completions: list[Completion]
    policy_version: int
    """Version of the weights that sampled the completions; the oldest, if they changed in flight."""
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    """Reward name -> raw reward of each completion; None if missing or not applicable."""
    call_statuses: dict[str, list[CallStatus]] = field(default_factory=dict)
    """Reward name -> status of each call, parallel to `rewards`."""
    total_rewards_G: list[float | None] = field(default_factory=list)
    """Weighted sum over the rewards of each completion; None if missing (rlqwen.rewards.total_reward)."""
    advantages_G: list[float] = field(default_factory=list)
    prompt_experts: "np.ndarray | None" = None
    """(tokens, L, K) experts that the sampler chose for the prompt; see Completion.experts."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """What reward functions passed to `log_extra`: column -> one value per completion."""

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(slots=True, frozen=True)
class Truncation:
    """Define which tokens of a distribution are kept, depending on the distribution only."""

    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this total probability; 1: all."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0: all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the highest probability; 0: all."""
    keeps_ties: bool = False
    """Also keep tokens exactly as likely as the `top_k`-th, as vLLM's CPU sampler does."""

    def __bool__(self) -> bool:
        return bool(self.top_p < 1 or self.top_k or self.min_p)


@dataclass(slots=True, frozen=True)
class Sampling:
    """Hold sampling parameters, with the names and meanings of vLLM's SamplingParams.

    Applied in vLLM's order: allowed tokens, bad words, `min_tokens`, bias, penalties, temperature, min-p, top-k, top-p.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    """Texts that end a completion, which includes the whole token that completes the text."""
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """Minimum number of tokens before a stop token or text may end a completion."""
    bad_words: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit)."""
    allowed_token_ids: tuple[int, ...] = ()
    """Empty: all."""

    @property
    def truncation(self) -> Truncation:
        return Truncation(self.top_p, self.top_k, self.min_p)

    @property
    def reads_text(self) -> bool:
        """Return whether the engine needs a tokenizer."""
        return bool(self.stop or self.bad_words)


@dataclass(slots=True, frozen=True)
class GroupRequest:
    """Request one group from the rollout engine: `len(seeds)` completions, each from its own seed."""

    prompt: Prompt
    seeds: tuple[int, ...]
    sampling: Sampling


@dataclass(slots=True, frozen=True)
class Canary:
    """Hold a fixed token sequence with the trainer's logprobs, which a worker must reproduce after a weight sync."""

    token_ids: tuple[int, ...]
    """T tokens."""
    logprobs: tuple[float, ...]
    """T - 1 values: log p(token t+1 | tokens up to t), at temperature 1."""
    tolerance: float
    """Largest mean absolute gap allowed, in nats per token; depends on the dtype that the worker computes in."""
