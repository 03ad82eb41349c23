"""Imports point strictly down, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rlqwen"

# From the bottom up; a package imports only from packages in lower rows.
LAYERS = [
    {"terminal", "stop_signals"},
    {"errors", "types", "secrets"},
    {"plugins"},
    {"config"},
    {"run_folder"},
    {"packing", "reporting", "monitoring"},
    {"distributed", "algorithms"},
    {"models"},
    {"data"},
    {"rewards"},
    {"rollout", "checkpoint"},
    {"preflight"},
    {"planning", "evaluation"},
    {"trainers"},
    {"runs"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
NO_TORCH = {
    "errors", "stop_signals", "terminal", "types", "secrets", "config.recipe_yaml", "plugins.registry", "rewards.registry", "reporting", "monitoring",
    "cli",
}  # fmt: skip
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
def test_imports_point_down(path: Path) -> None:
    own = top_name(path)
    assert own in RANK, f"give {own} a place in LAYERS"
    modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    for module in modules:
        parts = module.split(".")
        if parts[0] == "rlqwen" and len(parts) > 1:
            below = parts[1] == own or RANK[parts[1]] < RANK[own]
            assert below, f"{own} imports {module}, which is in the same layer or above"
        if parts[0] in ("ray", "vllm"):
            assert own == "rollout", f"{own} imports {parts[0]}"


def test_the_built_in_rewards_take_no_private_path() -> None:
    assert not [path for path in MODULES if "rlqwen_rewards" in path.read_text(encoding="utf-8")]
    rewards = ROOT.parent / "rewards"
    for path in rewards.rglob("*.py"):
        imports = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        assert not any(name.split(".")[0] == "rlqwen" for name in imports)


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_light_modules_import_no_torch(name: str) -> None:
    code = f"import sys, rlqwen.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
