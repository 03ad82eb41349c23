"""Write the README.md of an exported model: its base, its training and its evaluation."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from rlqwen.reporting.summary import SUMMARY_FILE, package_versions, read_summary
from rlqwen.run_folder.layout import RECIPE_FILE
from rlqwen.terminal import printable

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INT8 = """
The projections are int8, with a scale for each output channel; activations are rounded to int8 for each token. vLLM
loads this, and transformers with the package compressed-tensors.
"""


def write_card(folder: Path, *, run: Path | None, base: str, int8: bool = False, note: str | None = None) -> Path:
    """Write `folder/README.md` from the recipe and summary of `run`, if there is one; return its path.

    `note`: a further sentence about the weights.
    """
    recipes = _recipes(run)
    if recipes:
        base = recipes[0]["model"]["path"]
    sources = list(dict.fromkeys(source for recipe in recipes for source in _sources(recipe)))
    algorithms = [recipe["algorithm"] for recipe in recipes]
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=[source for source in sources if _is_hub_id(source)] or None,
        library_name="transformers",
        tags=["rlqwen", *dict.fromkeys(algorithms)],
    )
    summary = read_summary(run) if run and (run / SUMMARY_FILE).is_file() else {}
    parts = [f"# {folder.name.removeprefix('.').removesuffix('.partial')}\n", _opening(base, algorithms, sources)]
    if int8:
        parts.append(_INT8)
    if note is not None:
        parts.append(f"{note[0].upper()}{note[1:]}.\n")
    if summary.get("final_eval"):
        parts.append(_evaluation_table(summary))
    if run is not None:
        recipe = (run / RECIPE_FILE).read_text(encoding="utf-8")
        parts.append(f"## Recipe\n\n```yaml\n{recipe}```\n")
    versions = summary.get("versions") or package_versions()
    parts.append("## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + printable("\n".join(parts))).save(path)
    return path


def _recipes(run: Path | None) -> list[dict[str, Any]]:
    """Return the recipe of `run`, after those of the earlier runs that it started from, if they still exist."""
    if run is None or not (run / RECIPE_FILE).is_file():
        return []
    recipe = yaml.safe_load((run / RECIPE_FILE).read_text(encoding="utf-8"))
    earlier = Path(recipe["model"]["path"]).parent
    return [*(_recipes(earlier) if earlier != run else []), recipe]


def _sources(recipe: dict[str, Any]) -> list[str]:
    """Return the names of the recipe's training data; for a local file, its name without the folder."""
    train = recipe["data"]["train"]
    names = []
    for source in train if isinstance(train, list) else [train]:
        path = source.get("path")
        if path is None:
            names.append(f"rlqwen's generator {source['generator']}")
        else:
            names.append(path if _is_hub_id(path) else Path(path).name)
    return names


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _opening(base: str, algorithms: list[str], sources: list[str]) -> str:
    start = f"`{base if _is_hub_id(base) or base.startswith('builtin:') else Path(base).name}`"
    if not algorithms:
        return f"Exported by rlqwen from {start}.\n"
    return f"{start}, trained by rlqwen with {', then '.join(algorithms)} on {', '.join(sources)}.\n"


def _evaluation_table(summary: dict[str, Any]) -> str:
    """Return a table of the evaluation before and after training."""
    before = summary.get("initial_eval") or {}
    rows = [
        f"| {name.removeprefix('eval/')} | {_number(before.get(name))} | {_number(value)} |"
        for name, value in summary["final_eval"].items()
        if name != "eval/time"
    ]
    table = "\n".join(["| held-out | before | after |", "|---|---|---|", *rows])
    return f"## Figures\n\n{table}\n\nAfter {summary['steps']} steps, seed {summary['seed']}.\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
