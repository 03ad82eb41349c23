"""Measure on one GPU whether the packed update is right, how fast it is, and what it is made of; in some four minutes.

    python benchmarks/gpu.py --out FOLDER                      # the shape of Qwen3-0.6B, random weights
    python benchmarks/gpu.py --out FOLDER --only attention,head
    python benchmarks/gpu.py --out FOLDER --tiny               # a dry run, on any machine

Each measurement is printed and appended to `results.jsonl` in the folder as soon as it is there, a failure too. Neither
Ray nor vLLM is needed. Rows are made as GSM8K's groups are: prompts of 100 to 250 tokens with 8 completions each, whose
lengths are drawn from an exponential distribution of mean 250, cut at 1,024.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.simplefilter("ignore")

import torch
from gpu_workload import QWEN3_0_6B, QWEN3_30B_A3B_4_LAYERS, TINY, TINY_MIXTURE, Rows, Shape
from torch import Tensor

from rlqwen import GRPOConfig
from rlqwen.algorithms.losses import GRPOLoss, Totals
from rlqwen.distributed import OptimizerStep, ParameterGroup
from rlqwen.models.policy import Policy
from rlqwen.packing.batch import PackedBatch, Tree, pack
from rlqwen.packing.block_attention import attend_in_blocks
from rlqwen.packing.cascade_attention import cascade_attention
from rlqwen.packing.logprobs import chunked_logprobs
from rlqwen.rollout.weight_sync import ExpectedWeights, publish


class Check:
    """The sections of the check, on one device."""

    def __init__(self, out: Path, *, tiny: bool) -> None:
        self.out = out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape, self.mixture = (TINY, TINY_MIXTURE) if tiny else (QWEN3_0_6B, QWEN3_30B_A3B_4_LAYERS)
        self.rows = Rows(self.shape.vocab_size, 400 if tiny else 16384, 12 if tiny else 250)
        self.rounds = 2 if tiny else 5
        self.half = torch.bfloat16
        self.began = time.monotonic()
        self.peak_flops = 1e12
        """Floating-point operations per second of a large matrix product, once `ceilings` has measured it."""

    # What the sections are written with

    def report(self, name: str, **values: Any) -> None:
        """Print a measurement, and append it to the results."""
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"name": name, **values}, default=str) + "\n")
        shown = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        print(f"[{time.monotonic() - self.began:6.1f} s] {name}: {shown}", flush=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], rounds: int | None = None) -> tuple[float, float]:
        """Return the time of the first call, and the median of the calls after it."""
        times = []
        for _ in range(1 + (rounds or self.rounds)):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return times[0], statistics.median(times[1:])

    @contextmanager
    def peak_memory(self, values: dict[str, Any]) -> Iterator[None]:
        """Fill in the peak of allocated memory, and how much of it was not there before."""
        gc.collect()
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        peak = torch.cuda.max_memory_allocated()
        values |= {"peak_gib": peak / 2**30, "added_gib": (peak - before) / 2**30}

    def config(self, *, bf16: bool = True, **options: Any) -> GRPOConfig:
        options = {"gradient_checkpointing": False} | options
        return GRPOConfig(output_dir=str(self.out / "run"), bf16=bf16, **options)

    # Sections

    def environment(self) -> None:
        """Say what is measured on."""
        values: dict[str, Any] = {"torch": torch.__version__, "device": self.device.type}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(0)
            values |= {"gpu": properties.name, "gib": properties.total_memory / 2**30}
        self.report("environment", **values)

    def ceilings(self) -> None:
        """Measure what the machine can do at best: matrix products, and copies in device memory."""
        size = 8192 if self.device.type == "cuda" else 256
        left, right = (torch.randn(size, size, device=self.device, dtype=self.half) for _ in range(2))
        self.peak_flops = 2 * size**3 / self.seconds(lambda: left @ right, 10)[1]
        source = torch.randn(size * size, device=self.device)
        target = torch.empty_like(source)
        copied = 8 * source.numel() / self.seconds(lambda: target.copy_(source), 10)[1]
        self.report("ceilings", tflops=self.peak_flops / 1e12, copy_tb_s=copied / 1e12)

    def correctness(self) -> None:
        """Compare the packed row with each sequence alone through transformers: logprobs and gradients."""
        layers = min(4, self.shape.num_layers)
        trees = self.rows.groups(1, self.rows.budget // 8)
        weights = [
            torch.rand(len(branch.token_ids), device=self.device) - 0.5 for tree in trees for branch in tree.branches
        ]
        exact = self._alone(trees, weights, layers, bf16=False)
        for name, values in (
            ("packed, float32", self._packed(trees, weights, layers, bf16=False)),
            ("packed, bf16", self._packed(trees, weights, layers, bf16=True)),
            ("alone, bf16", self._alone(trees, weights, layers, bf16=True)),
        ):
            difference = (values[0] - exact[0]).abs()
            names = exact[1]
            square = sum((values[1][name] - names[name]).square().sum() for name in names)
            norm = sum(gradient.square().sum() for gradient in names.values())
            relative = float((square / norm).sqrt())
            self.report(
                f"correctness against alone in float32: {name}",
                mean=float(difference.mean()),
                largest=float(difference.max()),
                gradient=relative,
            )

    def _packed(self, trees: list[Tree], weights: list[Tensor], layers: int, *, bf16: bool) -> tuple[Tensor, Any]:
        policy = Policy(self.shape.build(self.device, layers), self.config(bf16=bf16), device=self.device)
        logp_N, _ = policy.logprobs(pack(trees).to(self.device))
        (logp_N * torch.cat(weights)).sum().backward()
        return logp_N.detach(), {name: weight.grad for name, weight in policy.model.named_parameters()}

    def _alone(self, trees: list[Tree], weights: list[Tensor], layers: int, *, bf16: bool) -> tuple[Tensor, Any]:
        model = self.shape.build(self.device, layers)
        model.set_attn_implementation("sdpa")
        logps: list[Tensor] = []
        for tree in trees:
            for branch in tree.branches:
                ids = torch.tensor([tree.prefix + branch.token_ids], device=self.device)
                with torch.autocast(self.device.type, self.half, enabled=bf16):
                    hidden = model.model(ids).last_hidden_state[0, len(tree.prefix) - 1 : -1]
                    logits = (hidden @ model.lm_head.weight.T).float()
                logp = logits.log_softmax(-1).gather(1, ids[0, len(tree.prefix) :, None])[:, 0]
                (logp * weights[len(logps)]).sum().backward()
                logps.append(logp.detach())
        return torch.cat(logps), {name: weight.grad for name, weight in model.named_parameters()}

    def attention(self) -> None:
        """Time one layer's attention, forward and backward, on layouts not seen before and then again."""
        heads = (self.shape.num_heads, *[self.shape.num_kv_heads] * 2)
        ways: dict[str, Any] = {"two calls": cascade_attention, "blocks": attend_in_blocks}
        if self.device.type != "cuda":
            del ways["two calls"]
        for name, attend in ways.items():
            new, again = [], []
            values: dict[str, Any] = {}
            with self.peak_memory(values):
                for seed in (10, 11, 12):
                    layout = pack(self.rows.groups(seed)).layout.to(self.device)
                    shape = (layout.num_tokens, self.shape.head_dim)
                    tensors = [
                        torch.randn(shape[0], count, shape[1], device=self.device, dtype=self.half, requires_grad=True)
                        for count in heads
                    ]

                    def work(attend: Any = attend, tensors: list[Tensor] = tensors, layout: Any = layout) -> None:
                        out = attend(*tensors, layout)
                        out.backward(torch.ones_like(out))

                    first, later = self.seconds(work)
                    new.append(1e3 * first)
                    again.append(1e3 * later)
            self.report(
                f"attention, {name}", new_ms=statistics.median(new), again_ms=statistics.median(again), **values
            )

    def head(self) -> None:
        """Time logprobs with their backward against the four matrix products that they cannot do without."""
        num_tokens, width, vocabulary = self.rows.budget, self.shape.hidden_size, self.shape.vocab_size
        hidden = torch.randn(num_tokens, width, device=self.device, dtype=self.half, requires_grad=True)
        weight = (torch.randn(vocabulary, width, device=self.device) * 0.05).requires_grad_()
        target = torch.randint(0, vocabulary, (num_tokens,), device=self.device)
        half = weight.detach().to(self.half)

        def products() -> None:
            for part in hidden.detach().split(4096):
                logits, again = part @ half.T, part @ half.T
                _, _ = again @ half, logits.T @ part

        floor = self.seconds(products, 3)[1]
        for entropy in (False, True):
            values: dict[str, Any] = {}

            def work(entropy: bool = entropy) -> None:
                hidden.grad = weight.grad = None
                chunked_logprobs(hidden, weight, target, entropy=entropy)[0].sum().backward()

            with self.peak_memory(values):
                time_taken = self.seconds(work, 3)[1]
            name = f"head, {'with' if entropy else 'without'} entropy"
            self.report(name, ms=1e3 * time_taken, over_products=time_taken / floor, **values)

    def update(self) -> None:
        """Time whole GRPO updates on layouts that are new each time, with and without recomputed activations."""
        self._updates("update", self.shape)

    def experts(self) -> None:
        """Time updates of a mixture of experts: four layers of Qwen3-30B-A3B."""
        self._updates("update of a mixture", self.mixture)

    def _updates(self, name: str, shape: Shape) -> None:
        variants: dict[str, dict[str, Any]] = {"": {}, ", recomputed activations": {"gradient_checkpointing": True}}
        if shape is self.shape:
            variants[", deterministic"] = {"full_determinism": True}
        for variant, options in variants.items():
            config = self.config(**options)
            policy = Policy(shape.build(self.device), config, device=self.device)
            optimizer = _optimizer(policy, config)
            for seed in (98, 99):
                self._update(policy, optimizer, config, pack(self.rows.groups(seed)))
            values: dict[str, Any] = {}
            stages: dict[str, list[float]] = {}
            taken, tokens, flops = 0.0, 0, 0.0
            with self.peak_memory(values):
                for seed in range(100, 100 + self.rounds):
                    trees = self.rows.groups(seed)
                    self.wait()
                    started = time.perf_counter()
                    micro = pack(trees)
                    stages.setdefault("pack_s", []).append(time.perf_counter() - started)
                    self._update(policy, optimizer, config, micro)
                    self.wait()
                    stages.setdefault("update_s", []).append(time.perf_counter() - started)
                    taken += stages["update_s"][-1]
                    tokens += micro.num_tokens
                    flops += shape.flops(micro)
            medians = {stage: statistics.median(times) for stage, times in stages.items()}
            self.report(
                name + variant,
                **medians,
                tokens_s=tokens / taken,
                mfu=flops / taken / self.peak_flops,
                **values,
            )
            if not variant and shape is self.shape and self.device.type == "cuda":
                self._look_inside(policy, optimizer, config)
                self._export(policy)

    def _update(self, policy: Policy, optimizer: OptimizerStep, config: GRPOConfig, micro: PackedBatch) -> None:
        micro = micro.to(self.device)
        logp_N, entropy_N = policy.logprobs(micro, temperature=config.temperature, entropy=True)
        totals = Totals(tokens=float(micro.num_targets), sequences=float(micro.num_sequences))
        optimizer.backward(GRPOLoss(config)(logp_N, entropy_N, micro, totals)[0])
        optimizer.step()

    def _look_inside(self, policy: Policy, optimizer: OptimizerStep, config: GRPOConfig) -> None:
        """Count the calls that wait for the GPU in one update, and write a profile of it."""
        from torch.profiler import ProfilerActivity, profile

        micro = pack(self.rows.groups(100))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self._update(policy, optimizer, config, micro)
            torch.cuda.set_sync_debug_mode("default")
        where = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
            self._update(policy, optimizer, config, micro)
            self.wait()
        table = run.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
        (self.out / "profile.txt").write_text(table)
        on_gpu = sum(event.self_device_time_total for event in run.key_averages()) / 1e6
        self.report("inside one update", waits=len(where), where=" ".join(where), on_gpu_s=on_gpu)

    def _export(self, policy: Policy) -> None:
        """Time the trainer's half of a weight sync: merged, cast, copied to the host."""

        def work() -> int:
            bundle = publish(
                1,
                policy.export_weights(),
                None,
                dtype="bfloat16",
                expected=ExpectedWeights(None),
                put=lambda chunk: chunk,
            )
            return bundle.num_bytes

        first, again = self.seconds(work, 3)
        self.report("weights to the host", first_s=first, again_s=again, gb_s=work() / again / 1e9)

    def sft(self) -> None:
        """Time SFT updates on the same sequences, each a row of its own tokens."""
        config = self.config()
        policy = Policy(self.shape.build(self.device), config, device=self.device)
        optimizer = _optimizer(policy, config)
        taken, tokens = [], 0
        values: dict[str, Any] = {}
        with self.peak_memory(values):
            for seed in range(self.rounds + 1):
                micro = pack(self.rows.sequences(seed))
                self.wait()
                started = time.perf_counter()
                optimizer.backward(-policy.logprobs(micro.to(self.device))[0].mean())
                optimizer.step()
                self.wait()
                if seed:
                    taken.append(time.perf_counter() - started)
                    tokens += micro.num_tokens
        self.report("SFT update", update_s=statistics.median(taken), tokens_s=tokens / sum(taken), **values)

    def padded(self) -> None:
        """Time the same updates as TRL makes them: padded rows, its fused head, autocast, recomputed activations."""
        from trl.trainer.utils import add_fused_lm_head

        model = self.shape.build(self.device).train()
        model.set_attn_implementation("sdpa")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=self.device.type == "cuda")
        taken, tokens = [], 0
        values: dict[str, Any] = {}
        with self.peak_memory(values):
            for seed in range(100, 100 + min(self.rounds, 3) + 1):
                trees = self.rows.groups(seed)
                self.wait()
                started = time.perf_counter()
                self._padded_update(model, optimizer, trees)
                self.wait()
                if seed > 100:
                    taken.append(time.perf_counter() - started)
                    tokens += sum(tree.num_tokens for tree in trees)
        self.report(
            "update, padded rows", update_s=statistics.median(taken), packed_tokens_s=tokens / sum(taken), **values
        )

    def _padded_update(self, model: Any, optimizer: torch.optim.Optimizer, trees: list[Tree]) -> None:
        rows = [(tree.prefix, branch) for tree in trees for branch in tree.branches]
        prompt = max(len(prefix) for prefix, _ in rows)
        longest = max(len(branch.token_ids) for _, branch in rows)
        total = sum(len(branch.token_ids) for _, branch in rows)
        size = max(1, self.rows.budget // (prompt + longest))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            ids = torch.zeros(len(part), prompt + longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prefix, branch) in enumerate(part):
                begin, end = prompt - len(prefix), prompt + len(branch.token_ids)
                ids[row, begin:end] = torch.tensor(prefix + branch.token_ids)
                mask[row, begin:end] = 1
            ids, mask = ids.to(self.device), mask.to(self.device)
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :prompt] = -100
            with torch.autocast(self.device.type, self.half):
                output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
            advantage = torch.tensor([branch.per_sequence["advantage"] for _, branch in part], device=self.device)
            logp = output.log_probs[:, -longest:]
            (-(logp * advantage[:, None] * mask[:, prompt:]).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(policy: Policy, config: GRPOConfig) -> OptimizerStep:
    group = ParameterGroup("policy", policy.trained_parameters, 1e-6, policy.trained_names, policy.root)
    return OptimizerStep([group], config, total_updates=1000)


SECTIONS = ("environment", "ceilings", "correctness", "attention", "head", "update", "sft", "experts", "padded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and profile.txt")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    check = Check(args.out, tiny=args.tiny)
    failed = False
    for name in args.only.split(","):
        try:
            getattr(check, name)()
        except Exception as error:  # noqa: BLE001 the other sections are still worth their time
            failed = True
            traceback.print_exc()
            check.report(name, failed=f"{type(error).__name__}: {error}"[:300])
        gc.collect()
        if check.device.type == "cuda":
            torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
