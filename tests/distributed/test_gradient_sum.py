"""Test that gradients are added up over ranks bucket by bucket, whatever their sizes, dtypes and strides."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlqwen.distributed import Ranks, gradient_sum
from tests.forked_ranks import run_ranks


def gradients(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 5), (7,), (40, 40), (1,), (2, 3), (6, 4)]
    made = [torch.randn(*shape, generator=generator) for shape in shapes]
    return [*made[:4], made[4].bfloat16(), made[5].t(), made[0].double()]


def add_up_in_small_buckets() -> Any:
    own = gradients(Ranks().rank)
    places = [gradient.data_ptr() for gradient in own]
    with (
        mock.patch.object(gradient_sum, "BUCKET_BYTES", 200),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
    ):
        gradient_sum.add_up_over_ranks(own)
    assert [gradient.data_ptr() for gradient in own] == places
    return [gradient.tolist() for gradient in own], [call.args[0].numel() for call in all_reduce.call_args_list]


@pytest.mark.slow
def test_gradients_are_summed_in_place() -> None:
    expected = [(one + other).tolist() for one, other in zip(gradients(0), gradients(1), strict=True)]
    for summed, sizes in run_ranks(add_up_in_small_buckets):
        assert summed == expected
        assert sizes == [22, 1600, 1, 6, 24, 15]
