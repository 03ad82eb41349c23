"""What workers ask of Ray, and the arithmetic that is said when it isn't there."""

import pytest

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError
from rlqwen.rollout import plan_workers


@pytest.mark.parametrize(
    ("config", "nodes", "cpus", "gpus"),
    [
        ({"num_workers": 2}, [(8, 0)], 4, 0),  # no GPU: an equal share
        ({"num_workers": 4}, [(2, 0)], 0.5, 0),
        ({"num_workers": 2, "tensor_parallel_size": 2}, [(8, 4)], 1, 2),
        ({"num_workers": 3, "num_cpus_per_worker": 2}, [(4, 0), (3, 0)], 2, 0),
    ],
)
def test_resources_of_a_worker(config: dict, nodes: list, cpus: float, gpus: float) -> None:
    planned = plan_workers(RolloutConfig(**config), nodes=nodes, free_gib=100)
    assert (planned.num_cpus, planned.num_gpus) == (cpus, gpus)


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        ({"num_workers": 3, "num_cpus_per_worker": 1}, [(2, 0)], "3 workers x 1 CPUs = 3 CPUs, but there are 2 on 1"),
        # Four CPUs in all, but no machine has the room for a second worker of two.
        ({"num_workers": 2, "num_cpus_per_worker": 2}, [(3, 0), (1, 0)], "but there are 4 on 2 machine.*room for 1 "),
        ({"num_workers": 3, "tensor_parallel_size": 2}, [(64, 4)], "3 workers x 2 GPUs = 6 GPUs, but there are 4"),
        (
            {"num_workers": 2, "kv_cache_gib": 8},
            [(4, 0)],
            r"2 workers x \(8 GiB KV cache \+ 1 GiB\) = 18 GiB, but 16.0",
        ),
    ],
)
def test_more_than_there_is(config: dict, nodes: list, message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        plan_workers(RolloutConfig(**config), nodes=nodes, free_gib=16.0)
