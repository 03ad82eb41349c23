"""Imports point strictly down, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rlqwen"

# From the ground up; a module may import from its own row (but for the trainers and the command line) and those below.
LAYERS = [
    {"errors", "types", "secrets"},
    {
        "config",
        "entry_points",
        "registry",
        "attention",
        "attention_rules",
        "batch",
        "delta_net",
        "delta_plan",
        "hidden",
        "experts",
        "lora_targets",
        "model_support",
        "routing",
        "routing_replay",
        "sequence",
        "advantages",
        "logprobs",
        "truncation",
        "losses",
        "tiny",
    },
    {
        "recipe",
        "data",
        "loading",
        "carried_weights",
        "float32_weights",
        "model_classes",
        "text_only",
        "vision_language",
        "model_sources",
        "model_files",
        "quantization",
        "adapters",
        "tensor_parallel",
        "packed_model",
        "policy",
        "critic",
        "reference",
    }
    | {"likelihood", "parallel", "scoring", "checkpoint", "metrics", "rollout", "watch"},
    {"check"},
    {"audit"},
    {"trainers"},
    {"evaluation", "pairs", "stages", "pipeline", "supervisor", "launch", "verification", "export", "model_card"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NO_TORCH = {"errors", "types", "secrets", "config", "entry_points", "registry", "recipe", "cli"}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def top_name(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = top_name(path)
    assert own in RANK, f"give {own} a place in LAYERS"
    modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    for module in modules:
        parts = module.split(".")
        if parts[0] == "rlqwen" and len(parts) > 1:
            assert RANK[parts[1]] <= RANK[own], f"{own} imports {module}, which stands above it"
        if parts[0] in ("ray", "vllm"):
            assert own == "rollout", f"{own} imports {parts[0]}"


def test_the_built_in_rewards_take_no_private_path():
    assert not [path for path in MODULES if "rlqwen_rewards" in path.read_text(encoding="utf-8")]
    rewards = ROOT.parent / "rewards"
    for path in rewards.rglob("*.py"):
        imports = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        assert not any(name.split(".")[0] == "rlqwen" for name in imports)


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_light_modules_import_no_torch(name):
    code = f"import sys, rlqwen.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
