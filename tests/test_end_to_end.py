"""The real thing, whole: a recipe with a stranger's reward, through Ray and vLLM, must raise its reward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PLUGIN = Path(__file__).parent / "plugins" / "rlqwen-reward-digits"

REWARD_FILE = '''
def evens(completion_ids, **kwargs):
    """Easy to learn from any start: the share of tokens with an even id."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Where the plugin is installed, as `pip install` would."""
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(PLUGIN)], check=True)
    return target


@pytest.mark.slow
def test_grpo_through_ray_and_vllm_raises_its_reward(tiny_model_path: Path, tmp_path: Path, site: Path) -> None:
    (tmp_path / "evens.py").write_text(REWARD_FILE)
    sums = {"generator": "arithmetic", "args": {"kind": "prompts", "size": 64}}
    recipe = {
        "algorithm": "grpo",
        "model": {"path": str(tiny_model_path)},
        "data": {"train": sums, "eval": sums},
        "rewards": ["digits", {"name": f"{tmp_path / 'evens.py'}:evens"}],
        "rollout": {"engine": "vllm", "num_cpus_per_worker": 0.5},
        "train": {
            "max_steps": 25, "per_device_train_batch_size": 64, "max_completion_length": 12, "learning_rate": 5e-3,
            "eval_on_start": True, "save_strategy": "no",
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from rlqwen.cli import main; sys.exit(main())", "run", "recipe.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site), "RLQWEN_DISPLAY": "plain"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["initial_eval"], summary["final_eval"]
    assert after["eval/reward/evens/mean"] > before["eval/reward/evens/mean"] + 0.1
    assert "eval/reward/digits/mean" in after
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [step["sync/canary_gap"] for step in steps if "sync/canary_gap" in step]
    assert len(gaps) >= 20
    assert max(gaps) < 1e-3
    assert max(step["sampling/logp_gap"] for step in steps if "sampling/logp_gap" in step) < 1e-3
    assert "before" in done.stdout
