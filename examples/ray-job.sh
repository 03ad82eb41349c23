#!/usr/bin/env bash
# Train on one machine and sample on others, as one Ray cluster.
#
#   export RAY_AUTH_TOKEN=...    # on all machines the same secret, made once by: python -c "import secrets; print(secrets.token_hex(32))"
#   RAY_GPUS=8 examples/ray-job.sh head grpo_gsm8k_qwen3_0.6b rollout.num_workers=8     # on the trainer's machine
#   examples/ray-job.sh worker 10.0.0.1                                                 # on each of the others
#
# RAY_GPUS: how many GPUs of the others to wait for. The trainer's own GPUs are not offered to Ray. rlqwen must be installed on
# all machines in the same version, and the model be under the same path: a shared file system, or one that is on every disk.
# Whoever reaches Ray's ports and has the token can run code on the cluster: use a closed network.
# Tried with a single CPU machine as head and sampler (RAY_GPUS=0).
set -euo pipefail
port=${RAY_PORT:-6379}
# Ray 2.60 takes a token that it finds in the home folder for its head, and not for what connects to it: say so to all.
export RAY_AUTH_MODE=token

case ${1:-} in
head)
    shift
    : "${RAY_AUTH_TOKEN:?make a secret, the same on all machines}"
    ray start --head --block --port "$port" --num-gpus 0 --include-dashboard false --disable-usage-stats >ray-head.log 2>&1 &
    head=$!
    trap 'kill "$head" 2>/dev/null; wait "$head" 2>/dev/null || true' EXIT
    RAY_ADDRESS=127.0.0.1:$port python - "${RAY_GPUS:?say how many GPUs of the other machines to wait for}" <<'PYTHON'
import sys
import time

import ray

wanted, deadline = float(sys.argv[1]), time.monotonic() + 600
while True:
    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
        break
    except ConnectionError:
        if time.monotonic() > deadline:
            raise
        time.sleep(2)
while ray.cluster_resources().get("GPU", 0) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"ray: {ray.cluster_resources().get('GPU', 0):g} of {wanted:g} GPUs after 10 minutes")
    time.sleep(2)
PYTHON
    rlqwen run "$@" rollout.engine=vllm rollout.ray_address="127.0.0.1:$port" resume=auto
    ;;
worker)
    : "${RAY_AUTH_TOKEN:?make a secret, the same on all machines}"
    exec ray start --block --address "${2:?give the address of the head}:$port" --disable-usage-stats
    ;;
*)
    echo "usage: examples/ray-job.sh head RECIPE [KEY=VALUE]... | worker HEAD_ADDRESS" >&2
    exit 2
    ;;
esac
