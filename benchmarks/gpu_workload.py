"""Make the workload of gpu.py: shapes of models, rows of completions, and the operations of an update."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from rlqwen.packing.batch import Branch, PackedBatch, Tree


@dataclass(frozen=True)
class Shape:
    """The shape of a Qwen3 model; with experts, of a mixture."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of the feed-forward layer; with experts, of each."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int = 0
    experts_per_token: int = 0

    def build(self, device: torch.device, num_layers: int | None = None) -> Any:
        """Return a model of random float32 weights, the same every time."""
        torch.manual_seed(0)
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": num_layers or self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": not self.num_experts,
            "max_position_embeddings": 40960,
        }
        config: Qwen3Config | Qwen3MoeConfig = Qwen3Config(**common)
        if self.num_experts:
            config = Qwen3MoeConfig(
                **common,
                moe_intermediate_size=self.intermediate_size,
                num_experts=self.num_experts,
                num_experts_per_tok=self.experts_per_token,
            )
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def flops(self, batch: PackedBatch) -> float:
        """Return an update's operations without recomputation: 6 per weight used and token, and attention over what is seen."""
        width = self.hidden_size
        attention = width * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        feed_forward = 3 * width * self.intermediate_size * max(self.experts_per_token, 1) + width * self.num_experts
        layout = batch.layout
        starts = zip(layout.offsets, layout.segments, strict=True)
        seen = sum(segment.length * (before + segment.length / 2) for before, segment in starts)
        trunk = 6 * (attention + feed_forward) * batch.num_tokens + 12 * self.num_heads * self.head_dim * seen
        return self.num_layers * trunk + 6 * width * self.vocab_size * batch.num_targets


QWEN3_0_6B = Shape(151936, 1024, 3072, 28, 16, 8, 128)
QWEN3_30B_A3B_4_LAYERS = Shape(151936, 2048, 768, 4, 32, 4, 128, num_experts=128, experts_per_token=8)
TINY = Shape(1000, 64, 128, 2, 4, 2, 32)
TINY_MIXTURE = Shape(1000, 64, 32, 2, 4, 2, 32, num_experts=4, experts_per_token=2)


@dataclass(frozen=True)
class Rows:
    """Groups of 8 completions per prompt, of skewed lengths."""

    vocab_size: int
    budget: int
    """Tokens of a packed row, at most."""
    mean_length: int
    """Of a completion, before it is cut at four times as much; prompts have 0.4 to 1 times as many tokens."""

    def groups(self, seed: int, budget: int | None = None) -> list[Tree]:
        """Return as many groups as fit a row."""
        rng, trees, total = random.Random(seed), list[Tree](), 0
        while True:
            prompt = self._tokens(rng, rng.randint(self.mean_length * 2 // 5, self.mean_length))
            drawn = [int(rng.expovariate(1 / self.mean_length)) for _ in range(8)]
            lengths = [max(1, min(4 * self.mean_length, length)) for length in drawn]
            total += len(prompt) + sum(lengths)
            if trees and total > (budget or self.budget):
                return trees
            trees.append(Tree(prompt, [self._completion(rng, length) for length in lengths]))

    def sequences(self, seed: int) -> list[Tree]:
        """Return the completions of two thirds of a row's groups, each with its prompt, as sequences of their own."""
        trees = self.groups(seed, self.budget * 2 // 3)
        return [Tree([], [Branch(tree.prefix + one.token_ids)]) for tree in trees for one in tree.branches]

    def _completion(self, rng: random.Random, length: int) -> Branch:
        return Branch(
            self._tokens(rng, length),
            per_token={"sampler_logp": [-1.0] * length},
            per_sequence={"advantage": rng.choice((-1.0, 1.0))},
        )

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(self.vocab_size) for _ in range(count)]
