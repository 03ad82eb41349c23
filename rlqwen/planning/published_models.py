"""Find the config of a published Qwen model by its name, without the hub."""

import difflib
import re
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"
_SUFFIXES = re.compile(r"(-(Base|Instruct|Thinking|Chat|\d{4}|FP8|AWQ|Int4|Int8|GPTQ(-Int[48])?))+$", re.IGNORECASE)
"""Ends of names whose models have the shape of the model without them."""
_SAME_SHAPE = {
    "Qwen2-0.5B": "Qwen2.5-0.5B", "Qwen2-1.5B": "Qwen2.5-1.5B", "Qwen2-7B": "Qwen2.5-7B", "Qwen2-72B": "Qwen2.5-72B",
    "Qwen3-Coder-30B-A3B": "Qwen3-30B-A3B", "Qwen3-Coder-Next": "Qwen3-Next-80B-A3B",
}  # fmt: skip
"""Other names of a shape."""
_LONG = re.compile(r"-2507\b|Qwen3-Coder-30B")
"""Releases of Qwen3 with a context of 262,144 tokens where the first has 40,960."""


def published_names() -> list[str]:
    """Return the models whose configs come with rlqwen, by family and size."""
    return sorted((file.stem for file in CONFIGS.glob("*.json")), key=_by_size)


def published_config(name: str) -> Any | None:
    """Return the config of transformers for `Qwen/Qwen3-30B-A3B-Instruct-2507` or `Qwen3-30B-A3B`; None if unknown."""
    from transformers import AutoConfig

    known = find_published(name)
    if known is None:
        return None
    config = AutoConfig.from_pretrained(CONFIGS / f"{known}.json")
    if _LONG.search(name):
        config.max_position_embeddings = 262_144
    return config


def find_published(name: str) -> str | None:
    """Return the name under which rlqwen has the config of a model; None if it has none."""
    owner, _, last = name.rpartition("/")
    if owner not in ("", "Qwen"):
        return None
    plain = re.sub(r"^(Qwen2\.5)-(Math|Coder)-", r"\1-", _SUFFIXES.sub("", last))
    plain = _SAME_SHAPE.get(plain, plain)
    return next((known for known in published_names() if known.lower() == plain.lower()), None)


def nearest_published(name: str) -> str | None:
    """Return the known name that is most like `name`; None if none is."""
    near = difflib.get_close_matches(name.rpartition("/")[2], published_names(), n=1)
    return near[0] if near else None


def _by_size(name: str) -> tuple[str, float]:
    family, _, rest = name.partition("-")
    found = re.search(r"([\d.]+)([BT])", rest)
    return family, float(found[1]) * (1000 if found[2] == "T" else 1) if found else 0.0
