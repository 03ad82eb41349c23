"""Test top-k, top-p and min-p against transformers, and the logprobs of truncated distributions."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlqwen.packing import truncation as module
from rlqwen.packing.truncation import chunked_log_kept, log_kept, truncated
from rlqwen.types import Truncation
from tests.narrowing import instance_of

CASES = [
    Truncation(top_p=0.9), Truncation(top_k=5), Truncation(min_p=0.1), Truncation(top_p=0.5, top_k=7),
    Truncation(top_p=0.95, top_k=20, min_p=0.02), Truncation(top_p=0.8, min_p=0.05), Truncation(top_p=0.999),
]  # fmt: skip


def logits_of(rows: int = 64, vocabulary: int = 300, sharpness: float = 3.0) -> Any:
    return sharpness * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def by_transformers(logits: Any, truncation: Truncation) -> torch.Tensor:
    warpers = LogitsProcessorList()
    if truncation.min_p:
        warpers.append(MinPLogitsWarper(truncation.min_p))
    if truncation.top_k:
        warpers.append(TopKLogitsWarper(truncation.top_k))
    if truncation.top_p < 1:
        warpers.append(TopPLogitsWarper(truncation.top_p))
    before = instance_of(torch.LongTensor, torch.zeros(len(logits), 1, dtype=torch.long))
    return warpers(before, logits.clone())


@pytest.mark.parametrize("truncation", CASES, ids=str)
def test_truncation_keeps_the_same_tokens_as_transformers(truncation: Truncation) -> None:
    logits = logits_of()
    assert torch.equal(truncated(logits, truncation).isinf(), by_transformers(logits, truncation).isinf())


@pytest.mark.parametrize("likely", [8, 1024])
@pytest.mark.parametrize("truncation", CASES, ids=str)
def test_log_kept_is_the_log_of_the_kept_probability(
    truncation: Truncation, likely: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Include cases that keep more tokens than are sorted at first."""
    monkeypatch.setattr(module, "LIKELY", likely)
    logits = logits_of()
    sampled = by_transformers(logits, truncation)
    target = sampled.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(1))
    expected = (logits.log_softmax(-1) - sampled.log_softmax(-1)).gather(1, target)[:, 0]
    torch.testing.assert_close(log_kept(logits, target[:, 0], truncation), expected, atol=1e-5, rtol=0)


def test_a_target_that_truncation_removes_counts_as_kept() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    kept = log_kept(probs.log(), torch.tensor([2]), Truncation(top_k=2))
    assert kept.exp().item() == pytest.approx(0.95)


def test_ties_at_the_cutoff_are_cut_to_the_exact_count() -> None:
    probs = torch.tensor([[0.4, 0.15, 0.15, 0.15, 0.15]])
    assert log_kept(probs.log(), torch.tensor([0]), Truncation(top_k=3)).exp().item() == pytest.approx(0.7)
    assert log_kept(probs.log(), torch.tensor([0]), Truncation(top_p=0.6)).exp().item() == pytest.approx(0.7)
    assert (~truncated(probs.log(), Truncation(top_k=3)).isinf()).sum() == 3
    assert (~truncated(probs.log(), Truncation(top_p=0.6)).isinf()).sum() == 3


@pytest.mark.parametrize(
    "cut", [{"top_k": 3}, {"top_k": 3, "top_p": 0.6}, {"top_k": 3, "min_p": 0.5}, {"top_k": 9}], ids=str
)
def test_ties_can_be_kept_like_vllms_cpu_sampler(cut: dict[str, Any]) -> None:
    topk_topp_sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    logits = torch.tensor([[0.4, 0.15, 0.15, 0.15, 0.15], [0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    truncation = Truncation(**cut, keeps_ties=True)
    sampled = logits.masked_fill(
        logits < logits.amax(1, keepdim=True) + torch.tensor(truncation.min_p).log(), -torch.inf
    )
    k, p = torch.full((2,), min(truncation.top_k, 5)), torch.full((2,), truncation.top_p)
    sampled = topk_topp_sampler.apply_top_k_top_p_pytorch(sampled, k, p if truncation.top_p < 1 else None)
    expected = (logits.log_softmax(-1) - sampled.log_softmax(-1))[:, 0]
    torch.testing.assert_close(log_kept(logits, torch.tensor([0, 0]), truncation), expected)


def test_chunks_do_not_change_the_result() -> None:
    hidden, head = torch.randn(50, 16), torch.randn(300, 16)
    target = torch.randint(300, (50,))
    whole = log_kept(hidden @ head.T / 0.7, target, CASES[4])
    chunked = chunked_log_kept(hidden, head, target, CASES[4], temperature=0.7, chunk_size=13)
    torch.testing.assert_close(chunked, whole)
    assert chunked_log_kept(hidden[:0], head, target[:0], CASES[4]).shape == (0,)
