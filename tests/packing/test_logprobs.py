"""Test logprobs and entropies that are computed in chunks of tokens, and by TRL's kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlqwen.packing.logprobs import chunked_logprobs, kernel_logprobs
from tests.narrowing import present


def reference(hidden: Tensor, head: Tensor, target: Tensor, temperature: float) -> tuple[Any, Any]:
    log_probs = (hidden @ head.T / temperature).log_softmax(-1)
    return log_probs.gather(1, target[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_values_and_gradients_equal_plain_log_softmax(temperature: float, chunk_size: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(11, 8, dtype=torch.float64).float(), torch.randn(23, 8)
    target = torch.randint(0, 23, (11,))
    weight_logp, weight_entropy = torch.randn(11), torch.randn(11)
    results = []
    for function in (
        lambda h, w: reference(h, w, target, temperature),
        lambda h, w: chunked_logprobs(h, w, target, temperature=temperature, chunk_size=chunk_size, entropy=True),
    ):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logp, entropy = function(h, w)
        (logp @ weight_logp + present(entropy) @ weight_entropy).backward()
        results.append((logp.detach(), present(entropy).detach(), h.grad, w.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(5, 4)
    logp, entropy = chunked_logprobs(hidden, head, torch.tensor([0, 1, 2]))
    logp.sum().backward()
    assert entropy is None
    assert head.grad is None
    assert present(hidden.grad).abs().sum() > 0


def test_bfloat16_hidden_gives_float32_logprobs() -> None:
    hidden = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    logp, _ = chunked_logprobs(hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]))
    assert logp.dtype is torch.float32
    logp.sum().backward()
    assert present(hidden.grad).dtype is torch.bfloat16


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 11])
def test_the_kernels_of_trl_give_the_same_logprobs(num_tokens: int, entropy: bool) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(num_tokens, 8), torch.randn(23, 8)
    target, weight = torch.randint(0, 23, (num_tokens,)), torch.randn(num_tokens)
    results = []
    for function in (chunked_logprobs, kernel_logprobs):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logp, entropies = function(h, w, target, temperature=0.7, entropy=entropy)
        assert (entropies is not None) is entropy
        (logp @ weight + (0.0 if entropies is None else entropies @ weight)).backward()
        results.append((logp.detach(), h.grad, w.grad, *([] if entropies is None else [entropies.detach()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)
