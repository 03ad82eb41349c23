"""Read groups from the answers of workers."""

from itertools import repeat
from typing import TYPE_CHECKING

from rlqwen.data.control_tokens import CompletionReader
from rlqwen.rollout.worker_protocol import Drawn
from rlqwen.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GroupReader:
    """Read what workers answer, with the texts that a tokenizer gives."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._reader = CompletionReader(tokenizer)

    def group(self, prompt: Prompt, drawn: Drawn) -> Group:
        """Return the group that a worker sampled for `prompt`."""
        sampled_G, version, prompt_experts, versions_G = drawn
        texts_G = self._reader.texts([sampled[0] for sampled in sampled_G])
        parts = zip(sampled_G, texts_G, versions_G or repeat(None, len(sampled_G)), strict=True)
        completions_G = [
            Completion(token_ids, logprobs, reason, text, experts, versions)
            for (token_ids, logprobs, reason, experts), text, versions in parts
        ]
        return Group(prompt, completions_G, version, prompt_experts=prompt_experts)
