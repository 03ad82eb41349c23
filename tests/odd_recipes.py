"""Make recipes that nobody would write: shipped ones with values, keys and characters changed at random, by seed."""

import copy
import random
from typing import Any

import yaml

from rlqwen.config.recipe_yaml import list_recipes

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**32, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), "", " ", "no", "off", "auto", "null", "0", "-1", "1e400", "nan", ".", "..", "/", "~",
    "~nobody/x", "$HOME/x", "${UNSET_VARIABLE}", "a" * 300, "a" * 5000, "a/" * 3000, "x" * 100_000, "\0", "a\0b", "\ud800", "\x1b[2J",
    "日本語/路径", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/root/../..", "builtin:", "builtin:tiny-qwen3", ":", "a:b", "a.py:b",
    "os:system", "http://[", "owner/name@", "@", "{", "%s%n", "[", "(?", "*", "a,b", "sft", "grpo", "linear", [], {}, [[]],
    [None], [1, 2], ["a"], [{}], {"a": 1}, {"path": 1}, {"name": None}, {"": 0}, {"a" * 3000: 1}, {"threshold": "x"},
    [{"name": "accuracy"}] * 3, {"a": {"b": {"c": [1, {"d": None}]}}}, "2024-01-01", "1:30", "010", b"bytes",
]  # fmt: skip
"""Values of any type to put in the place of any value."""
ODD_TEXTS = [
    "", "\n", "---\n", "- ", ": ", "? ", "[", "]", "{", "}", "&a ", "*a ", "<<: *a\n", "!!python/object:os.system ",
    "!!int x ", "!!bool maybe ", "!!timestamp 9999-99-99 ", "!!binary é ", "!!set ", "!x ", "\t", "\0", "\ud800", "\x85", "\ufeff",
    '"\\ud800"', '"\\0"', "|\n", ">\n ", "%YAML 9.9\n", "...\n", "'", '"', "#", "1" * 5000, "0x" + "f" * 6000, "0o7", "010",
    "190:20:30", ".inf", ".nan", "1e999", "[" * 2000, "{a: " * 2000, "- " * 2000, "a" * 20_000, "=", "~", "2024-01-01",
]  # fmt: skip
"""Texts to put at any place of a file."""


SECTIONS: dict[str, Any] = {
    "model": {
        "path": "builtin:tiny-qwen3", "lora": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}},
        "quantization": {"bits": 4}, "init_kwargs": {"attn_implementation": "eager"},
    },
    "data": {
        "train": [{"path": "rows.jsonl", "weight": 1}, {"generator": "arithmetic", "args": {"size": 4}, "limit": 2}],
        "eval": {"path": "rows.jsonl", "columns": {"prompt": "q"}},
        "cleaning": {"exact_duplicates": True, "near_duplicates": {"threshold": 0.8}, "drop_patterns": [{"name": "a", "pattern": "b"}]},
    },
    "parallel": {
        "zero_stage": 1,
        "deepspeed": {
            "train_batch_size": 8, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        },
    },
}  # fmt: skip
"""Sections that the shipped recipes do not have."""
WATCH = {"kl": {"threshold": 2, "action": "stop"}, "entropy": "off", "webhook": "$HOOK"}


def recipe_texts() -> list[str]:
    """Return the texts of the shipped recipes, and of recipes with every key of their algorithm."""
    texts = [recipe.path.read_text("utf-8") for recipe in list_recipes()]
    for algorithm in ("sft", "reward", "dpo", "ppo", "grpo", "distillation"):
        samples = algorithm in ("ppo", "grpo")
        values: dict[str, Any] = {"algorithm": algorithm, "output_dir": "runs/all", "train": {"watch": WATCH}}
        values |= {"rewards": [{"name": "accuracy"}]} if samples else {}
        texts.append(yaml.dump(values | SECTIONS))
    return texts


def odd_recipe(rng: random.Random, texts: list[str]) -> str:
    """Return the text of one recipe, changed in its characters or in its values."""
    text = rng.choice(texts)
    return _changed_characters(rng, text) if rng.random() < 0.3 else _changed_values(rng, text)


def _changed_characters(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 3, 20]))
        text = text[:start] + rng.choice(ODD_TEXTS) + text[end:]
    return text


def _changed_values(rng: random.Random, text: str) -> str:
    values = yaml.safe_load(text)
    for _ in range(rng.choice([1, 1, 2, 4])):
        holder, key = rng.choice(list(_places(values)))
        chosen = rng.random()
        if chosen < 0.7:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif chosen < 0.8:
            del holder[key]
        elif chosen < 0.9 and isinstance(holder, dict):
            odd = rng.choice([f"{key}x", "", "a" * 500, "ünknown", "a.b", "weights", "seed", "model", "0"])
            holder[odd] = holder[key]
        else:
            holder[key] = rng.choice([[holder[key]], {"inner": holder[key]}, str(holder[key])])
    written: str = yaml.dump(values, allow_unicode=True)
    return written


def _places(values: Any) -> Any:
    """Yield (container, key) of every value."""
    for key, inner in list(values.items() if isinstance(values, dict) else enumerate(values)):
        yield values, key
        if isinstance(inner, dict | list):
            yield from _places(inner)
