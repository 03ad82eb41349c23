"""Test where engines are placed, how weights reach them, and which combinations are refused; on machines made up here."""

from typing import Any

import pytest
import torch

from rlqwen.config import ParallelConfig, RolloutConfig
from rlqwen.errors import ConfigError, ResourceError
from rlqwen.rollout.engine import Engine
from rlqwen.rollout.engine_placement import (
    Machine,
    Placement,
    count_workers,
    environment_of_ray,
    growth_of,
    place,
    place_engine,
)
from rlqwen.rollout.resources import shares_processors

ALL = ("object_store", "ipc", "nccl")
CPU = Machine(())
ONE = Machine(("0",), trains_on_gpu=True)
EIGHT = Machine(tuple("01234567"), local_ranks=8, world_size=8, trains_on_gpu=True)
TWO_OF_EIGHT = Machine(tuple("01234567"), local_ranks=2, world_size=2, trains_on_gpu=True)


def placed(machine: Machine, *, sends_adapter: bool = False, meanwhile: bool = False, **config: Any) -> Placement:
    return place(
        RolloutConfig(engine="vllm", **config),
        machine,
        transfers=ALL,
        can_sleep=True,
        sends_adapter=sends_adapter,
        trains_meanwhile=meanwhile,
    )


@pytest.mark.parametrize(
    ("machine", "config", "workers", "transfer", "level", "share"),
    [
        (CPU, {}, 1, "object_store", 0, 0.4),
        (CPU, {"num_workers": 3}, 3, "object_store", 0, 0.4),
        (ONE, {}, 1, "ipc", 2, None),
        (ONE, {"weight_transfer": "object_store", "gpu_memory_utilization": 0.6}, 1, "object_store", 2, 0.6),
        (ONE, {"max_staleness": 1}, 1, "ipc", 0, 0.4),
        (EIGHT, {}, 8, "object_store", 2, None),
        (EIGHT, {"tensor_parallel_size": 4}, 2, "object_store", 2, None),
        (EIGHT, {"tensor_parallel_size": 4, "weight_transfer": "ipc"}, 2, "ipc", 2, None),
        (TWO_OF_EIGHT, {}, 2, "object_store", 2, None),
        (TWO_OF_EIGHT, {"placement": "separate"}, 6, "nccl", 0, 0.9),
        (TWO_OF_EIGHT, {"placement": "separate", "tensor_parallel_size": 4, "max_staleness": 1}, 1, "nccl", 0, 0.9),
        (EIGHT, {"ray_address": "10.0.0.1:6379"}, 1, "object_store", 0, 0.4),
    ],
)
def test_workers_fill_the_gpus_that_they_may_use(
    machine: Machine, config: dict[str, Any], workers: int, transfer: str, level: int, share: float | None
) -> None:
    found = placed(machine, **config)
    resolved = found.config
    assert (resolved.num_workers, resolved.weight_transfer) == (workers, transfer)
    assert (found.sleep_level, resolved.gpu_memory_utilization) == (level, share)
    assert count_workers(RolloutConfig(**config), machine) == workers


def test_where_nothing_trains_workers_fill_all_gpus() -> None:
    machine = Machine(tuple("01234567"))
    assert count_workers(RolloutConfig(), machine) == 8
    assert count_workers(RolloutConfig(tensor_parallel_size=2), machine) == 4
    assert count_workers(RolloutConfig(ray_address="10.0.0.1:6379"), machine) == 1
    assert placed(machine).gpus is None


def test_ray_gets_the_trainers_gpus_or_the_others() -> None:
    assert placed(CPU).gpus is None
    assert placed(TWO_OF_EIGHT).gpus == ("0", "1")
    assert placed(TWO_OF_EIGHT, num_workers=4).gpus == ("0", "1", "2", "3")
    assert placed(TWO_OF_EIGHT, placement="separate").gpus == tuple("234567")
    assert placed(EIGHT, ray_address="10.0.0.1:6379").gpus is None


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_separate_engines_do_not_compute_where_the_trainer_does(device_type: str) -> None:
    assert not shares_processors(RolloutConfig(placement="separate"), device_type)


def test_an_engine_that_gets_adapters_keeps_the_weights_under_them_asleep() -> None:
    found = placed(ONE, sends_adapter=True)
    assert (found.config.weight_transfer, found.sleep_level) == ("object_store", 1)


def test_what_was_chosen_is_named_where_there_are_gpus() -> None:
    assert placed(CPU).notes == []
    (note,) = placed(ONE).notes
    assert note.endswith("weights from GPU memory that both map (ipc), and sleep (level 2) while the policy trains")
    for found, why in (
        (placed(ONE, max_staleness=1), "they sample while the policy trains"),
        (placed(ONE, meanwhile=True), "they sample while the policy trains"),
        (placed(ONE, sleep=False), "rollout.sleep is false"),
    ):
        assert found.sleep_level == 0
        assert len(found.notes) == 2
        assert f"do not sleep, because {why}: each takes rollout.gpu_memory_utilization=0.4" in found.notes[1]


@pytest.mark.parametrize(
    ("machine", "config", "message"),
    [
        (CPU, {"placement": "separate"}, "there are none for the workers"),
        (ONE, {"placement": "separate"}, "leaves 0 of 1 GPUs.*needs 1.*--nproc-per-node"),
        (TWO_OF_EIGHT, {"placement": "separate", "tensor_parallel_size": 8}, "leaves 6 of 8 GPUs.*needs 8"),
        (CPU, {"weight_transfer": "ipc"}, "must both be on GPUs"),
        (CPU, {"weight_transfer": "nccl"}, "must both be on GPUs"),
        (ONE, {"weight_transfer": "nccl"}, "needs rollout.placement=separate"),
        (TWO_OF_EIGHT, {"weight_transfer": "ipc", "num_workers": 4}, "a rank and a worker on each GPU"),
        (TWO_OF_EIGHT, {"weight_transfer": "ipc", "placement": "separate"}, "rollout.placement=colocate"),
    ],
)
def test_what_cannot_work_is_refused(machine: Machine, config: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ResourceError), match=message):
        placed(machine, **config)


def test_adapters_and_other_engines_do_not_go_from_gpu_to_gpu() -> None:
    with pytest.raises(ConfigError, match="the adapter alone"):
        placed(ONE, sends_adapter=True, weight_transfer="ipc")
    with pytest.raises(ConfigError, match="engine does not take it"):
        place(RolloutConfig(weight_transfer="ipc"), ONE)


@pytest.mark.parametrize("config", [{"placement": "separate"}, {"weight_transfer": "object_store"}])
def test_an_engine_in_the_trainers_process_has_no_placement(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="in the trainer's own process"):
        place_engine(RolloutConfig(**config), Engine, CPU)


@pytest.mark.parametrize(
    ("parallel", "size"),
    [({}, 12 * 8), ({"zero_stage": 1}, 3 * 8), ({"zero_stage": 2, "offload_optimizer": True}, 0)],
)
def test_the_optimizers_state_is_left_to_the_trainer(parallel: dict[str, Any], size: int) -> None:
    model = torch.nn.Linear(4, 2)
    model.bias.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert growth_of(trained, ParallelConfig(**parallel), world_size=4) == size


def test_rays_processes_do_not_take_a_rank_of_the_launcher() -> None:
    own = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "x",
        "ROLE_RANK": "1",
        "HOME": "/h",
    }
    removed = dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ROLE_RANK"])
    assert environment_of_ray(None, own) == removed
    assert environment_of_ray(("2", "3"), own) == removed | {"CUDA_VISIBLE_DEVICES": "2,3"}
