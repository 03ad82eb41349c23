"""Test sampling options other than temperature with the transformers engine; test_pool.py tests them with vLLM."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlqwen.models.loading import load_generation_config, stop_token_ids
from rlqwen.rollout.engines.transformers_shaping import Shaping, bad_word_ids
from rlqwen.types import Completion, Group, GroupRequest, Prompt, Sampling
from tests.rollout.test_transformers_engine import model, start

__all__ = ["model"]

SHAPED: list[dict[str, object]] = [
    {"top_p": 0.8, "top_k": 20, "min_p": 0.02},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"logit_bias": ((7, 4.0), (9, -50.0)), "top_p": 0.9},
    {"allowed_token_ids": tuple(range(40, 90))},
    {"bad_words": ("a", "b")},
    {"min_tokens": 4},
]
"""Sampling options; for each, the sampler's distribution must equal `Shaping` applied to the model's logits."""


def sampling_by(options: dict[str, object], tokenizer: PreTrainedTokenizerBase, max_tokens: int = 10) -> Sampling:
    """Return sampling options with many stop tokens for `min_tokens`, before which vLLM forbids all stop tokens."""
    ends = stop_token_ids(tokenizer, load_generation_config(tokenizer.name_or_path), None)
    stop = (*ends, *range(150)) if "min_tokens" in options else ()
    return Sampling(max_tokens, temperature=0.7, stop_token_ids=stop, **options)  # type: ignore[arg-type]


@torch.no_grad()
def shaped_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int], sampling: Sampling
) -> torch.Tensor:
    """Compute the logprob of each token of a completion from the model's logits."""
    logits_TV = model(torch.tensor([prompt + ids])).logits[0].float()
    shaping = Shaping(sampling, len(prompt), tokenizer)
    logprobs = []
    for place, token in enumerate(ids):
        before = torch.tensor([prompt + ids[:place]])
        shaped_BV = shaping(before, logits_TV[len(prompt) + place - 1 : len(prompt) + place])
        logprobs.append(shaped_BV.log_softmax(-1)[0, token])
    return torch.stack(logprobs)


def assert_shaped(
    groups: list[Group], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> None:
    for group in groups:
        for completion in group.completions:
            ids = completion.token_ids
            expected = shaped_logprobs(model, tokenizer, group.prompt.token_ids, ids, sampling)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=0)
            assert_obeyed(completion, tokenizer, sampling)


def assert_obeyed(completion: Completion, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
    ids = completion.token_ids
    if sampling.allowed_token_ids:
        assert set(ids) <= set(sampling.allowed_token_ids)
    assert not {sequence[0] for sequence in bad_word_ids(tokenizer, sampling.bad_words) if len(sequence) == 1} & set(
        ids
    )
    assert completion.finish_reason == "length" or len(ids) > sampling.min_tokens
    assert 9 not in ids or not sampling.logit_bias


def asked(sampling: Sampling, count: int = 4) -> list[GroupRequest]:
    return [
        GroupRequest(Prompt(index, list(range(5, 9 + index)), ""), tuple(range(10 * index, 10 * index + 6)), sampling)
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.mark.parametrize("options", SHAPED, ids=str)
def test_logprobs_are_those_of_the_sampling_distribution(
    model: PreTrainedModel, tiny_model_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    sampling = sampling_by(options, tokenizer)
    groups = list(start(model, tiny_model_path).generate(asked(sampling)))
    assert_shaped(groups, model, tokenizer, sampling)


def text_of_two(groups: list[Group], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that consists of the end of one token and the beginning of the next."""
    for group in groups:
        for completion in group.completions:
            pieces = [str(tokenizer.decode([token])) for token in completion.token_ids]
            for first, second in itertools.pairwise(pieces[1:]):
                if first.isascii() and second.isascii() and first and len(second) > 1:
                    return first[-1] + second[0]
    raise AssertionError("no completion has such a text")


def assert_stopped(groups: list[Group], tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
    """Assert that each completion ends with the token that completes the stop string, or is truncated."""
    reasons = set()
    for group in groups:
        for completion in group.completions:
            reasons.add(completion.finish_reason)
            assert len(completion.logprobs) == len(completion.token_ids)
            assert stop not in tokenizer.decode(completion.token_ids[:-1])
            assert (stop in tokenizer.decode(completion.token_ids)) == (completion.finish_reason == "stop")
            assert stop in completion.text or completion.finish_reason == "length"
            assert completion.is_truncated == (completion.finish_reason == "length")
    assert reasons == {"stop", "length"}


def test_a_stop_string_ends_a_completion(
    model: PreTrainedModel, tiny_model_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = start(model, tiny_model_path)
    stop = text_of_two(list(engine.generate(asked(Sampling(10)))), tokenizer)
    assert_stopped(list(engine.generate(asked(Sampling(10, stop=("never written", stop))))), tokenizer, stop)
    late = list(engine.generate(asked(Sampling(10, stop=(stop,), min_tokens=10))))
    assert {completion.finish_reason for group in late for completion in group.completions} == {"length"}


def test_bad_words_are_tokenized_as_in_vllm(tokenizer: PreTrainedTokenizerBase) -> None:
    params = pytest.importorskip("vllm.sampling_params").SamplingParams(bad_words=["yes", " no", "12"])
    tokenizer.max_token_id = len(tokenizer) - 1
    params.update_from_tokenizer(tokenizer)
    assert bad_word_ids(tokenizer, ["yes", " no", "12"]) == params.bad_words_token_ids
