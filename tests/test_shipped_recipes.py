"""Every recipe out of the wheel, on a machine that has nothing but that: checked, and two steps of each algorithm.

The hub alone is faked: a script in a process of its own hands out the bundled rows for the datasets that recipes name,
and refuses any other name, config or split. Tiny models of their classes stand in for the hub's.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
HUB = {
    ("openai/gsm8k", "main", "train"): "questions",
    ("llamafactory/alpaca_zh", None, "train"): "instructions_zh",
    ("trl-lib/ultrafeedback_binarized", None, "train"): "pairs",
}
"""Datasets of the hub, whose columns the bundled rows have."""
MODELS = re.compile(r"Qwen/Qwen[\d.]+-[\w.-]+|builtin:tiny-qwen3|runs/quickstart/\w+/final")
TWO_STEPS = [
    "model.init_kwargs={hidden_size: 64, num_layers: 2}", "train.max_steps=2", "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=1", "train.save_strategy=no", "parallel={}",
]  # fmt: skip
SAMPLED = ["train.num_generations=2", "train.max_completion_length=8", "rollout.engine=transformers"]
WORDS = {
    "sft": TWO_STEPS,
    "reward": [*TWO_STEPS, "train.max_length=1024"],
    "dpo": [*TWO_STEPS, "train.max_length=1024"],
    "grpo": [*TWO_STEPS, *SAMPLED],
    "distillation": [*TWO_STEPS, *SAMPLED, "train.teacher=builtin:tiny-qwen3"],
    "ppo": [*TWO_STEPS, *SAMPLED, "train.num_mini_batches=1", "train.critic.warmup_rollouts=0"],
}
"""What makes two quick steps of a recipe of each algorithm."""
SCRIPT = """
import io, json, sys
import datasets
from contextlib import redirect_stdout, redirect_stderr
import rlqwen
from rlqwen.cli import main
from rlqwen.data.packaged_rows import bundled_file
from rlqwen.config.recipe_yaml import list_recipes

hub = {tuple(key): name for key, name in json.loads(sys.argv[1])}
words = json.loads(sys.argv[2])
stand_ins = {"qwen3.6_35b_a3b": "tiny-qwen3.5-moe", "qwen3.5": "tiny-qwen3.5"}

def load_dataset(path, name=None, *, split, revision=None, **kwargs):
    rows = [json.loads(line) for line in bundled_file("builtin:" + hub[path, name, split]).open()]
    return datasets.Dataset.from_list(rows)

datasets.load_dataset = load_dataset
found = {"package": rlqwen.__file__}
for recipe in list_recipes():
    algorithm = recipe.name.partition("_")[0]
    if algorithm == "quickstart":
        continue
    kind = next((kind for name, kind in stand_ins.items() if name in recipe.name), "tiny-qwen3")
    tiny = ["model.path=builtin:" + kind, *(["model.quantization=null"] if "qlora" in recipe.name else [])]
    first = algorithm in words
    commands = [["check", recipe.name, *tiny, "model.init_kwargs={max_length: 8192}"]]
    commands += [["run", recipe.name, *tiny, *words.pop(algorithm)]] if first and "lora" not in recipe.name else []
    for command in commands:
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = main(command)
        found[" ".join(command[:2])] = [code, said.getvalue()]
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each recipe: exit code and what was printed."""
    folder = tmp_path_factory.mktemp("machine")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "site")
    (folder / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([[list(key), name] for key, name in HUB.items()]), json.dumps(WORDS)],
        cwd=folder / "work",
        env=os.environ | {"PYTHONPATH": str(folder / "site"), "HF_HUB_OFFLINE": "1", "RLQWEN_DISPLAY": "plain"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "work" / "found.json").read_text())
    assert found.pop("package").startswith(str(folder / "site"))
    return dict(found)


def test_every_recipe_is_right_and_each_algorithm_trains_offline(found: dict[str, Any]) -> None:
    assert {name.split()[1].partition("_")[0] for name in found if name.startswith("run ")} == set(WORDS)
    assert len(found) >= 21 + len(WORDS)
    wrong = {name: said[-1500:] for name, (code, said) in found.items() if code}
    assert not wrong


def test_no_recipe_joins_question_and_answer_without_the_chat_template(found: dict[str, Any]) -> None:
    assert not [name for name, (_, said) in found.items() if "are plain text" in " ".join(said.split())]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_names_nothing_but_the_hub_and_what_comes_with_rlqwen(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "../" not in text
    for name in re.findall(r"^ +(?:path|- \{name): ([^\s,}]+)", text, re.MULTILINE):
        is_data = any(name == dataset for dataset, _, _ in HUB)
        is_reward = re.fullmatch(r"[a-z_]+", name)
        assert is_data or is_reward or MODELS.fullmatch(name), name
