"""Test the KL divergence over the vocabulary, which is computed in chunks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlqwen.packing.divergence import chunked_kl


def whole_kl(hidden: Tensor, head: Tensor, other_hidden: Tensor, other_head: Tensor, temperature: float) -> Any:
    """Compute the KL from all logits at once with PyTorch's functions."""
    size = min(len(head), len(other_head))
    log_p = (hidden @ head[:size].T / temperature).log_softmax(-1)
    log_q = (other_hidden @ other_head[:size].T / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [3, 100])
@pytest.mark.parametrize("other_size", [11, 13])
def test_values_and_gradients_equal_those_of_all_logits_at_once(
    temperature: float, chunk_size: int, other_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 5, generator=generator, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, requires_grad=True)
    other_hidden, other_head = torch.randn(8, 3, generator=generator), torch.randn(other_size, 3, generator=generator)
    weight = torch.randn(8, generator=generator)
    options: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    ours = chunked_kl(hidden, head, other_hidden, other_head, **options)
    theirs = whole_kl(hidden, head, other_hidden, other_head, temperature)
    torch.testing.assert_close(ours, theirs)
    assert ours.min() >= 0
    inputs = (hidden, head)
    for own, whole in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, whole)


def test_the_kl_of_equal_models_and_its_gradient_are_zero() -> None:
    hidden = torch.randn(4, 5, requires_grad=True)
    head = torch.randn(7, 5)
    kl = chunked_kl(hidden, head, hidden.detach(), head)
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.zeros(4))
    torch.testing.assert_close(hidden.grad, torch.zeros(4, 5))
