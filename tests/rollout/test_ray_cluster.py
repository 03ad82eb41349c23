"""Test workers on an existing Ray cluster: two nodes on this machine, a tensor-parallel engine, too large a request."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from rlqwen.models.tiny import build_tiny_qwen3
from tests.patience import PATIENCE_S

# Runs in its own process, because a process can be connected to only one Ray cluster at a time.
SCRIPT = """
import sys, torch
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM, AutoTokenizer
from rlqwen.config import RolloutConfig
from rlqwen.errors import ResourceError
from rlqwen.rollout import build_engine
from rlqwen.types import Canary, GroupRequest, Prompt, Sampling

folder = sys.argv[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=2)

def build(**config):
    return build_engine(
        RolloutConfig(engine="vllm", ray_address=cluster.address, **config), model_path=folder,
        tokenizer=AutoTokenizer.from_pretrained(folder), compute_dtype="float32", max_model_length=64, seed=0,
    )

try:
    build(num_workers=3, num_cpus_per_worker=2)
except ResourceError as error:
    print(error)

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokens = list(range(40))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1.3)
    logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
logprobs = logits.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
engine = build(num_workers=1, num_cpus_per_worker=2, tensor_parallel_size=2)
metrics = engine.load_weights(7, model.state_dict().items(), Canary(tuple(tokens), tuple(logprobs), 1e-3))
groups = list(engine.generate([GroupRequest(Prompt(i, [1, 2, 3], ""), (1, 2), Sampling(8)) for i in range(5)]))
print(len(groups), {group.policy_version for group in groups}, metrics["sync/canary_gap"] < 1e-4)
engine.close()
cluster.shutdown()
"""


def test_workers_run_on_a_cluster_of_two_nodes(tmp_path: Path) -> None:
    folder = build_tiny_qwen3(
        tmp_path / "model", hidden_size=64, num_layers=2, intermediate_size=128, num_heads=2, num_kv_heads=2
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        output, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = output.splitlines()
    assert process.returncode == 0, errors[-3000:]
    assert "3 workers x 2 CPUs = 6 CPUs, but there are 3 on 2 machine(s), room for 1 worker(s)" in lines[0]
    assert lines[1] == "5 {7} True"
