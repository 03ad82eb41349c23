"""Measure the gap between sampler and trainer on a mixture of experts, with and without routing replay.

    python benchmarks/routing_replay.py [--model builtin:tiny-qwen3-moe] [--prompts 32] [--tokens 64]

A vLLM worker in bfloat16 samples completions with the policy's weights. The trainer's forward pass scores them twice: with
the experts that its own routers choose, and with those that vLLM recorded (`rollout.routing_replay`). The gap is the
absolute difference of the sampled tokens' logprobs, in nats. A token counts as having other experts if the trainer's
routers choose other experts than the recorded ones in at least one layer.
"""

import argparse
import os
import tempfile
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.simplefilter("ignore")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlqwen.config import GRPOConfig, RolloutConfig
from rlqwen.models.policy import Policy
from rlqwen.models.tiny import resolve_model_path
from rlqwen.packing.batch import Branch, PackedBatch, Tree, pack
from rlqwen.packing.routing_replay import routers_of
from rlqwen.rollout import build_engine
from rlqwen.types import Group, GroupRequest, Prompt, Sampling

SUMS = "What is {a} + {b}? Write the working, then the answer in a box."


def sample(folder: str, policy: Policy, args: argparse.Namespace) -> list[Group]:
    """Return groups sampled by a vLLM worker in bfloat16 with the policy's weights."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [SUMS.format(a=3 * number + 1, b=7 * number + 2) for number in range(args.prompts)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    ids = [list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats]
    prompts = [Prompt(number, token_ids, text) for number, (token_ids, text) in enumerate(zip(ids, texts, strict=True))]
    engine = build_engine(
        RolloutConfig(routing_replay=True, max_num_seqs=16), model_path=folder, tokenizer=tokenizer, compute_dtype="bfloat16",
        max_model_length=max(map(len, ids)) + args.tokens, seed=0,
    )  # fmt: skip
    try:
        engine.load_weights(1, policy.export_weights(), None)
        requests = [GroupRequest(prompt, tuple(range(args.generations)), Sampling(args.tokens)) for prompt in prompts]
        return sorted(engine.generate(requests), key=lambda group: group.prompt.index)
    finally:
        engine.close()


def score(policy: Policy, batches: list[PackedBatch]) -> tuple[Tensor, Tensor]:
    """Return (N,) gaps of the sampled tokens, and (N,) whether the trainer's routers choose other experts in some layer."""
    chosen: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda router, args, output: chosen.append(output[2]))
        for router in routers_of(policy.base_model).values()
    ]
    gaps, differ = [], []
    for batch in batches:
        chosen.clear()
        with policy.inference():
            logp_N, _ = policy.logprobs(batch)
        assert "sampler_logp" in batch.per_token
        gaps.append((logp_N - batch.per_token["sampler_logp"]).abs())
        assert batch.experts_TLK is not None
        recorded = batch.experts_TLK.long().sort(-1).values
        other_T = (torch.stack(chosen, 1).sort(-1).values != recorded).any(-1).any(-1)
        differ.append(other_T[batch.source_N])
    for hook in hooks:
        hook.remove()
    return torch.cat(gaps), torch.cat(differ)


def main() -> None:
    """Print the gaps as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny-qwen3-moe", help="a folder, or a built-in mixture of experts")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--initializer-range", type=float, default=0.02, help="spread of a built-in model's weights")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        folder = resolve_model_path(args.model, cache, initializer_range=args.initializer_range)
        policies: dict[str, Any] = {}
        for name, bf16 in (("float32", False), ("bfloat16", True)):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            policies[name] = Policy(model, GRPOConfig(bf16=bf16))
        groups = sample(folder, policies["float32"], args)
        trees = [
            Tree(
                group.prompt.token_ids,
                [
                    Branch(one.token_ids, per_token={"sampler_logp": one.logprobs}, experts=one.experts)
                    for one in group.completions
                ],
                group.prompt_experts,
            )
            for group in groups
        ]
        batches = [pack(trees[start : start + 4]) for start in range(0, len(trees), 4)]
        print(f"{sum(batch.num_targets for batch in batches)} sampled tokens\n")
        print("| trainer | replay | gap, mean | gap, largest | tokens with other experts |\n|---|---|---|---|---|")
        for name, policy in policies.items():
            for replay in (False, True):
                if replay:
                    policy.replay_routing()
                gaps, differ = score(policy, batches)
                row = [name, "on" if replay else "off", f"{gaps.mean():.5f}", f"{gaps.max():.4f}"]
                print(f"| {' | '.join(row)} | {differ.float().mean():.2%} |")


if __name__ == "__main__":
    main()
