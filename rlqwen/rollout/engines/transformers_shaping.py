"""Have transformers' `generate` sample as vLLM does: shape the distribution, and end completions.

Shapes: B completions decoded together, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from rlqwen.packing.truncation import truncated
from rlqwen.types import Sampling

_MARGIN = 16
"""Tokens decoded beyond those that a stop text can have, so that what comes before it is decoded as it is."""


class Shaping(LogitsProcessor):
    """Logits processor for everything that `Sampling` sets of the distribution, in vLLM's order; in float32."""

    def __init__(self, sampling: Sampling, prompt_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take `prompt_length`: columns before the first token of a completion, including padding."""
        self._sampling = sampling
        self._prompt_length = prompt_length
        self._bad_words = bad_word_ids(tokenizer, sampling.bad_words)
        penalty = sampling.repetition_penalty
        self._repetition = None if penalty == 1 else RepetitionPenaltyLogitsProcessor(penalty)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sampling, written_BT = self._sampling, input_ids[:, self._prompt_length :]
        logits_BV = scores.to(torch.float32, copy=True)
        if sampling.allowed_token_ids:
            banned_V = torch.ones(logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
            banned_V[list(sampling.allowed_token_ids)] = False
            logits_BV.masked_fill_(banned_V, -torch.inf)
        for *before, last in self._bad_words:
            logits_BV[_ends_in(written_BT, before), last] = -torch.inf
        if written_BT.shape[1] < sampling.min_tokens:
            logits_BV[:, list(sampling.stop_token_ids)] = -torch.inf
        for token, bias in sampling.logit_bias:
            logits_BV[:, token] += bias
        if self._repetition is not None:
            logits_BV = self._repetition(input_ids, logits_BV)
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts_BV = torch.zeros_like(logits_BV).scatter_add(1, written_BT, logits_BV.new_ones(written_BT.shape))
            logits_BV -= sampling.frequency_penalty * counts_BV + sampling.presence_penalty * (counts_BV > 0)
        if sampling.temperature not in (0, 1):
            logits_BV /= sampling.temperature
        return truncated(logits_BV, sampling.truncation) if sampling.truncation else logits_BV


class StopTexts(StoppingCriteria):
    """Stopping criterion that ends a completion at the token that completes one of the texts."""

    def __init__(self, sampling: Sampling, prompt_length: int, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        """Take `size`: the number of completions that are decoded together."""
        self._texts = sampling.stop
        self._min_tokens = sampling.min_tokens
        self._prompt_length = prompt_length
        self._tokenizer = tokenizer
        self._reach = max(len(text.encode()) for text in sampling.stop) + _MARGIN  # a token has a byte at least
        self.lengths_B: list[int | None] = [None] * size
        """Tokens of each completion that has ended so."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        length = input_ids.shape[1] - self._prompt_length
        if length > self._min_tokens:
            for place, ids in enumerate(input_ids[:, self._prompt_length :][:, -self._reach :].tolist()):
                if self.lengths_B[place] is None and self._is_complete(ids):
                    self.lengths_B[place] = length
        return torch.tensor([length is not None for length in self.lengths_B], device=input_ids.device)

    def _is_complete(self, ids: list[int]) -> bool:
        """Return whether the last token completes a stop text; special tokens count as text."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=False))
        before = str(self._tokenizer.decode(ids[:-1], skip_special_tokens=False)).rstrip("\N{REPLACEMENT CHARACTER}")
        return any(text.find(stop, max(0, len(before) - len(stop) + 1)) >= 0 for stop in self._texts)


def bad_word_ids(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[list[int]]:
    """Return token sequences that must not be completed: each word at the start of a text and, if that is another
    single token, after a space; as vLLM's SamplingParams.update_from_tokenizer reads `bad_words`."""
    sequences: list[list[int]] = []
    for word in words:
        bare, spaced = (tokenizer.encode(f"{space}{word.lstrip()}", add_special_tokens=False) for space in ("", " "))
        sequences.append(bare)
        if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
            sequences.append(spaced)
    return sequences


def _ends_in(written_BT: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return (B,) bool: whether each row ends in these tokens."""
    if written_BT.shape[1] < len(tokens):
        return torch.zeros(len(written_BT), dtype=torch.bool, device=written_BT.device)
    last_BK = written_BT[:, written_BT.shape[1] - len(tokens) :]
    return (last_BK == torch.tensor(tokens, dtype=torch.long, device=last_BK.device)).all(1)
