"""Measure that no phase of a run under FSDP2 holds a whole model in one process: memory of a rank over the model's size.

torchrun --nproc-per-node 2 -m tests.distributed.test_fsdp_memory FOLDER
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlqwen import SFTConfig
from rlqwen.config import ParallelConfig
from rlqwen.distributed import ParameterGroup, Ranks, build_optimizer_step, state_parts
from rlqwen.models.loading import load_with_reference
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import Branch, Tree, pack
from tests.models.test_policy import make_model
from tests.patience import PATIENCE_S

NUM_RANKS = 2
LAYERS = (4, 8, 12)
SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 128, "num_attention_heads": 8, "head_dim": 64,
}  # fmt: skip


class Memory:
    """Measure the peak of this process's own memory, without pages of files, while something is done."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    def of(self, phase: str, work: Callable[[], Any]) -> Any:
        """Return what `work` returns, and keep its peak in bytes under `phase`."""
        peak, stop = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stop.is_set():
                peak = max(peak, own_bytes())
                time.sleep(0.001)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            result = work()
        finally:
            stop.set()
            thread.join()
        self.peaks[phase] = max(peak, own_bytes())
        return result


def own_bytes() -> int:
    fields = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in fields if line.startswith(("RssAnon:", "RssShmem:")))


def run_phases(folder: Path, *, reference: bool) -> dict[str, float]:
    """Return the peak of each phase in bytes, above what the process held before."""
    args = SFTConfig(
        use_cpu=True, optim="adamw_torch", parallel=ParallelConfig(engine="fsdp2"), gradient_checkpointing=True
    )
    ranks = Ranks(args.parallel)
    batch = pack([Tree([1, 2, 3], [Branch([4, 5, 6, 7]), Branch([8, 9])])])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, memory = own_bytes(), Memory()
    model, frozen = memory.of(
        "load", lambda: load_with_reference(str(folder), args, peft_config=None, reference=reference)
    )
    policy: Policy = memory.of("prepare", lambda: Policy(model, args, reference=frozen))
    group = ParameterGroup("policy", policy.trained_parameters, 1e-3, policy.trained_names, policy.root)
    step = build_optimizer_step([group], args, total_updates=9, ranks=ranks)

    def update() -> None:
        for _ in range(2):
            logp_N, _ = policy.logprobs(batch)
            if reference:
                logp_N = logp_N - policy.reference_logprobs(batch)
            step.backward(-logp_N.mean() / NUM_RANKS)
            step.step()

    memory.of("step", update)
    memory.of("export", lambda: sum(weight.numel() for _, weight in policy.export_weights()))
    checkpoint = folder / f"checkpoint{' with reference' if reference else ''}"
    checkpoint.mkdir(exist_ok=True)
    memory.of("save", lambda: step.save_checkpoint(checkpoint))
    ranks.barrier()
    step = build_optimizer_step([group], args, total_updates=9, ranks=ranks)
    gc.collect()
    memory.of("resume", lambda: step.load_checkpoint(checkpoint))
    return {phase: peak - before for phase, peak in memory.peaks.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    state_parts.FILE_BYTES = 1 << 20
    found = {
        f"{layers}{' with reference' if reference else ''}": run_phases(folder / str(layers), reference=reference)
        for reference in (False, True)
        for layers in (LAYERS[0], *LAYERS)  # the first run pays for what is imported
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def test_memory_of_a_rank_grows_with_its_share_of_the_model(tmp_path: Path) -> None:
    """Compare bytes for each parameter of a rank's share: 2 when loaded, 4 as float32, 4 more as gradient, 8 as moments.

    For a moment a weight is held in both dtypes. A reference has its own 2 or, in a float32 forward, 4. Objects of Python
    take some of each layer.
    """
    sizes = []
    for layers in LAYERS:
        model = make_model("qwen3", num_hidden_layers=layers, **SHAPE).bfloat16()
        sizes.append(sum(weight.numel() for weight in model.parameters()) / NUM_RANKS)
        model.save_pretrained(tmp_path / str(layers))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}",
        "-m", "tests.distributed.test_fsdp_memory", str(tmp_path),
    ]  # fmt: skip
    # Without it rlqwen keeps the memory that it frees.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(NUM_RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for kind, frozen in (("", 0.0), (" with reference", 4.0)):
            peaks = [found[f"{layers}{kind}"] for layers in LAYERS]
            slopes = {phase: slope(sizes, [peak[phase] for peak in peaks]) for phase in peaks[0]}
            limits = {"load": 2.0, "prepare": 6.5, "step": 16.0, "export": 12.0, "save": 12.0, "resume": 12.0}
            assert {phase: found for phase, found in slopes.items() if found > 1.1 * (limits[phase] + frozen)} == {}, (
                slopes
            )


def slope(sizes: list[float], peaks: list[float]) -> float:
    """Return the slope of the least-squares line."""
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(peaks, dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
