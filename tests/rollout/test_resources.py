"""Test the resources that workers request from Ray, and the messages if they are missing."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError
from rlqwen.rollout import plan_workers
from rlqwen.rollout.ray_store import take_room
from rlqwen.rollout.resources import ALLOW_DISK, ObjectStore, plan_object_store
from rlqwen.rollout.weight_sync import sent_bytes
from tests.narrowing import present


@pytest.mark.parametrize(
    ("config", "nodes", "cpus", "gpus"),
    [
        ({"num_workers": 2}, [(8, 0)], 4, 0),  # no GPU: an equal share
        ({"num_workers": 4}, [(2, 0)], 0.5, 0),
        ({"num_workers": 2, "tensor_parallel_size": 2}, [(8, 4)], 1, 2),
        ({"num_workers": 3, "num_cpus_per_worker": 2}, [(4, 0), (3, 0)], 2, 0),
    ],
)
def test_resources_of_a_worker_are_computed(config: dict[str, Any], nodes: list[Any], cpus: float, gpus: float) -> None:
    planned = plan_workers(RolloutConfig(**config), nodes=nodes, free_gib=100)
    assert (planned.num_cpus, planned.num_gpus) == (cpus, gpus)


@pytest.mark.parametrize(
    ("config", "nodes", "message"),
    [
        ({"num_workers": 3, "num_cpus_per_worker": 1}, [(2, 0)], "3 workers x 1 CPUs = 3 CPUs, but there are 2 on 1"),
        # Four CPUs in total, but no machine has room for a second worker with two CPUs.
        ({"num_workers": 2, "num_cpus_per_worker": 2}, [(3, 0), (1, 0)], "but there are 4 on 2 machine.*room for 1 "),
        ({"num_workers": 3, "tensor_parallel_size": 2}, [(64, 4)], "3 workers x 2 GPUs = 6 GPUs, but there are 4"),
        (
            {"num_workers": 2, "kv_cache_gib": 8},
            [(4, 0)],
            r"2 workers x \(8 GiB KV cache \+ 1 GiB\) = 18 GiB, but 16.0",
        ),
    ],
)
def test_requesting_more_resources_than_there_are_is_refused(
    config: dict[str, Any], nodes: list[Any], message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        plan_workers(RolloutConfig(**config), nodes=nodes, free_gib=16.0)


GB = 10**9
DOCKER = 64 * 1024**2
"""Default size of /dev/shm in a container."""


@pytest.mark.parametrize(
    ("sent", "shared", "num_bytes", "on_disk"),
    [
        (3 * GB, 100 * GB, 6.134 * GB, False),  # old and new
        (3 * GB, 5 * GB, 4 * GB, False),  # capped; one fits
        (0.1 * GB, DOCKER, 0.234 * GB, True),
    ],
)
def test_the_object_store_has_the_size_of_the_sent_weights(
    sent: float, shared: float, num_bytes: float, on_disk: bool
) -> None:
    store = plan_object_store(int(sent), Path("/tmp"), shared_bytes=int(shared), disk_bytes=100 * GB)
    assert store.num_bytes == pytest.approx(num_bytes, rel=1e-3)
    assert store.on_disk is on_disk


def test_too_little_shared_memory_for_the_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_DISK, raising=False)
    with pytest.raises(
        ResourceError,
        match=r"3\.44 GB of weights \+ 0\.134 GB for the rest = 3\.57 GB of shared memory, but 0\.8 x 0\.0671 GB free in "
        r"/dev/shm = 0\.0537 GB: .*--shm-size=6g.*rollout\.lora=true.*=1 to use the disk under /tmp",
    ):
        plan_object_store(int(3.44 * GB), Path("/tmp"), shared_bytes=DOCKER, disk_bytes=100 * GB)
    monkeypatch.setenv(ALLOW_DISK, "1")
    assert plan_object_store(int(3.44 * GB), Path("/tmp"), shared_bytes=DOCKER, disk_bytes=100 * GB).on_disk
    with pytest.raises(ResourceError, match="of shared memory"):
        plan_object_store(int(3.44 * GB), Path("/tmp"), shared_bytes=DOCKER, disk_bytes=GB)


def test_only_the_adapter_is_counted_if_it_is_sent_alone(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (100, 8), "model.layers.0.q_proj.weight": (16, 8), "model.norm.weight": (8,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert sent_bytes(str(tmp_path), "bfloat16", None) == 2 * (800 + 128 + 8)
    assert sent_bytes(str(tmp_path), "bfloat16", 4) == 2 * 4 * (16 + 8)


HOLDER = """
import os, sys
file = open(sys.argv[1], "w+b")
os.unlink(sys.argv[1])
file.truncate(1_000_000)
print("open", flush=True)
input()
"""


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Return a process that stands for a raylet: it holds a store's file, unlinked and without a page in memory."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "plasmaAbCdEf")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert present(process.stdout).readline()
    yield process
    process.communicate("")


def test_the_room_of_the_object_store_is_taken_at_its_start(raylet: "subprocess.Popen[str]", tmp_path: Path) -> None:
    def allocated() -> int:
        files = list(Path(f"/proc/{raylet.pid}/fd").glob("*"))
        return sum(path.stat().st_blocks * 512 for path in files if "plasmaAbCdEf" in str(path.readlink()))

    assert allocated() == 0
    take_room(ObjectStore(1_000_000, on_disk=True), {raylet.pid: "raylet"}, tmp_path)
    assert allocated() >= 1_000_000


def test_a_store_that_has_no_room_any_more_is_refused(
    raylet: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ResourceError, match=r"0\.001 GB for the weights .* cannot be reserved in .*: No space left on device"
    ):
        take_room(ObjectStore(1_000_000, on_disk=True), {raylet.pid: "raylet"}, tmp_path)
