"""Test the trainer's side of weight transfers that bypass the object store, and engines that sleep between draws.

Here with real vLLM on a CPU, over a transfer that carries the weights in its calls; with `ipc` where there is a GPU, and with
`nccl` where there are two.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlqwen.models.tiny import build_tiny_qwen3
from tests.patience import PATIENCE_S

# Runs in its own process, because it imports vLLM, as the trainer does for these transfers.
SCRIPT = """
import os, signal, sys, time
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", VLLM_LOGGING_LEVEL="ERROR")
import torch
from dataclasses import dataclass
from typing import ClassVar
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.distributed.weight_transfer import TrainerWeightTransferEngine, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from rlqwen.config import RolloutConfig
from rlqwen.errors import DeadlineExceeded, RolloutError, WeightSyncError
from rlqwen.rollout import build_engine
from rlqwen.rollout.engine_placement import Placement, place, this_machine
from rlqwen.rollout.engines import vllm_device_transfer
from rlqwen.rollout.weight_delivery import DeviceDelivery
from rlqwen.rollout.weight_sync import ExpectedWeights
from rlqwen.types import Canary, GroupRequest, Prompt, Sampling

@dataclass
class CarriedInit(TrainerInitInfo):
    backend: ClassVar[str] = "carried"

class Carried(TrainerWeightTransferEngine):
    \"\"\"Send each weight in a call of its own.\"\"\"

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source)

    def send_weights(self):
        self.client.start_weight_update()
        for name, tensor in self.source:
            self.client.update_weights({"names": [name], "tensors": [tensor]})
        self.client.finish_weight_update()

WeightTransferTrainerFactory.register_engine("carried", Carried)
if sys.argv[2] == "carried":
    vllm_device_transfer.DeviceTransfer._init_info = lambda self, num_engines: CarriedInit(rank=0)

class Listed(vllm_device_transfer.WorkersClient):
    def _call(self, phase, arguments=None):
        print(phase, [one["init_info"]["rank_offset"] for one in arguments])

Listed([1, 2, 3], processes_per_engine=2, timeout_s=1).init_weight_transfer_engine({"rank_offset": 1})
try:
    vllm_device_transfer.within(0.05, lambda: time.sleep(1), "nccl")
except DeadlineExceeded as error:
    print(error)

folder, backend = sys.argv[1:]
device = "cpu" if backend == "carried" else "cuda"
config = RolloutConfig(engine="vllm", max_num_seqs=16, max_restarts=3)
if backend == "carried":
    placement = Placement(config, sleep_level=2)
else:
    config = config.model_copy(update={"weight_transfer": backend, "placement": "separate" if backend == "nccl" else "colocate"})
    placement = place(config, this_machine("cuda"), transfers=("ipc", "nccl"), can_sleep=True)
    print(placement.config.weight_transfer, placement.sleep_level)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
tokens = list(range(40))

@torch.no_grad()
def canary():
    logits = model(torch.tensor([tokens], device=device)).logits[0, :-1].log_softmax(-1)
    logprobs = logits.gather(-1, torch.tensor(tokens[1:], device=device)[:, None])[:, 0].tolist()
    return Canary(tuple(tokens), tuple(logprobs), 1e-3 if device == "cpu" else 1e-2)

@torch.no_grad()
def change():
    for parameter in model.parameters():
        parameter.mul_(1.1)

def draw():
    requests = [GroupRequest(Prompt(i, [1, 2, 3], ""), (1, 2), Sampling(8)) for i in range(5)]
    return {group.policy_version for group in engine.generate(requests)}

engine = build_engine(
    placement.config, model_path=folder, tokenizer=AutoTokenizer.from_pretrained(folder), compute_dtype="float32",
    max_model_length=64, seed=0, placement=placement,
)
if backend == "carried":
    engine._delivery = DeviceDelivery(
        "carried", ExpectedWeights(folder), "float32", processes_per_engine=1, timeout_s=60, resends=True
    )
(pid,) = engine.process_ids()
variables = open(f"/proc/{pid}/environ").read().split("\\0")
print("ranks:", [entry for entry in variables if entry.startswith(("RANK=", "LOCAL_RANK=", "WORLD_SIZE=", "MASTER_"))])
for version in (1, 2):
    change()
    metrics = engine.load_weights(version, model.state_dict().items(), canary())
    print(version, metrics["sync/canary_gap"] < (1e-4 if device == "cpu" else 1e-2), metrics["sync/rebuilt_engines"])
    print("drawn", draw(), "asleep", engine.is_asleep)
    if placement.sleep_level and device == "cuda":
        free, total = torch.cuda.mem_get_info()
        print("freed", free / total > 0.8)
try:
    draw()
except RolloutError as error:
    print(error)
wrong = dict(model.state_dict(), **{"model.norm.weight": torch.zeros(3, device=device)})
try:
    engine.load_weights(3, wrong.items(), canary())
except WeightSyncError as error:
    print(type(error).__name__, "model.norm.weight" in str(error))
engine.load_weights(4, model.state_dict().items(), canary())
os.kill(engine.process_ids()[0], signal.SIGKILL)
print("drawn", draw(), "restarts", engine.num_restarts)
engine.close()
"""


def run(tmp_path: Path, backend: str) -> list[str]:
    folder = build_tiny_qwen3(
        tmp_path / "model", hidden_size=64, num_layers=2, intermediate_size=128, num_heads=2, num_kv_heads=1
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), backend],
        capture_output=True, text=True, timeout=3 * PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    offsets, late, *lines = [line for line in done.stdout.splitlines() if "(raylet)" not in line]
    # Three engines of two processes follow the trainer in an NCCL group.
    assert offsets == "init_weight_transfer_engine [1, 3, 5]"
    assert late == "the weight transfer (nccl) took more than rollout.sync_timeout = 0.05 s"
    return lines


SYNCED = ["1 True 0.0", "drawn {1} asleep {asleep}", "2 True 0.0", "drawn {2} asleep {asleep}"]
NO_RANKS = "ranks: []"
RESENT = "drawn {4} restarts 1"


@pytest.mark.fault("a worker dies that was sent weights past the object store", "its replacement is sent them again")
def test_weights_are_carried_by_the_transfer_and_engines_sleep(tmp_path: Path) -> None:
    lines = run(tmp_path, "carried")
    assert lines[:5] == [NO_RANKS, *(line.replace("{asleep}", "True") for line in SYNCED)]
    assert "they sleep without weights" in lines[5]
    assert lines[6:] == ["WeightSyncError True", RESENT]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_stay_on_a_shared_gpu(tmp_path: Path) -> None:
    lines = run(tmp_path, "ipc")
    assert lines[:2] == ["ipc 2", NO_RANKS]
    assert lines.count("freed True") == 2
    assert lines[-1] == RESENT


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_weights_are_broadcast_to_another_gpu(tmp_path: Path) -> None:
    lines = run(tmp_path, "nccl")
    assert lines[:2] == ["nccl 0", NO_RANKS]
    assert lines[-1] == RESENT
