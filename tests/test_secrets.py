"""Test that secrets of the environment reach neither reward workers nor files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlqwen.cli import main
from rlqwen.secrets import is_secret, redact, redact_values, without_secrets
from tests.rewards.test_scorer import make_group, scoring

CANARY = "canary-5f2c-value"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "x", True),
        ("WANDB_API_KEY", "x", True),
        ("aws_secret_access_key", "x", True),
        ("PGPASSWORD", "x", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json", True),
        ("DATABASE_URL", "postgres://me:hunter22@host/db", True),
        ("PLAIN", "sk-abcdefghijklmnop", True),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("PATH", "/usr/bin", False),
        ("HTTP_PROXY", "http://proxy:3128", False),
    ],
)
def test_secrets_are_recognized_by_name_or_value(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) is secret
    assert (name in without_secrets({name: value})) is not secret
    assert without_secrets({name: value}, allowed=[name]) == {name: value}


def test_values_of_secrets_are_replaced_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER_TOKEN", f"{CANARY}-longer")
    monkeypatch.setenv("INNER_TOKEN", CANARY)
    monkeypatch.setenv("SHORT_TOKEN", "true")
    assert redact(f"a {CANARY}-longer b {CANARY} true") == "a [redacted: OUTER_TOKEN] b [redacted: INNER_TOKEN] true"
    assert redact_values({CANARY: [1, (CANARY, None)]}) == {
        "[redacted: INNER_TOKEN]": [1, ["[redacted: INNER_TOKEN]", None]]
    }


def test_workers_get_only_the_secrets_in_scoring_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", CANARY)
    monkeypatch.setenv("JUDGE_API_KEY", "judge-value-99")

    def look(completions: list[str]) -> list[float]:
        return [float(name in os.environ) for name in completions]

    group = make_group("CANARY_TOKEN", "JUDGE_API_KEY", "PATH")
    with scoring(look, env=["JUDGE_API_KEY"], timeout=60.0) as scorer:
        scorer.score([group])
    assert group.rewards["look"] == [0.0, 1.0, 1.0]


REWARD = '''
import os

def leaky(completions, log_metric=None, log_extra=None, key="", **_):
    """Log the secret in its argument."""
    log_metric(f"leak/{key}", 1.0)
    log_extra("leak", [key] * len(completions))
    return [1.0] * len(completions)

def raises(completions, key="", **_):
    raise RuntimeError(f"could not log in with {key}")
'''


@pytest.mark.fault("a secret of the environment in a recipe, and rewards that log it and raise with it", "in no file")
@pytest.mark.parametrize("reward", ["leaky", "raises"])
def test_a_secret_is_in_no_file_of_the_run_folder_nor_on_the_terminal(
    reward: str,
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CANARY_TOKEN", CANARY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    recipe: dict[str, Any] = {
        "algorithm": "grpo",
        "model": {"path": str(tiny_model_path)},
        "data": {"train": {"generator": "arithmetic", "args": {"kind": "prompts", "size": 8}}},
        "rewards": [{"name": f"{tmp_path / 'rewards.py'}:{reward}", "args": {"key": CANARY}}],
        "rollout": {"engine": "transformers"},
        "train": {
            "max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4,
            "save_steps": 1,
        },
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = main(["run", "recipe.yaml"])
    assert code == (1 if reward == "raises" else 0)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"recipe.yaml", "error.log" if reward == "raises" else "summary.json"}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    captured = capfd.readouterr()
    assert CANARY not in captured.out + captured.err
    if reward == "raises":
        assert "could not log in with [redacted: CANARY_TOKEN]" in (tmp_path / "run" / "error.log").read_text()
    else:
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert any(path.name == "trainer_state.json" for path in files)
        assert any("leak/[redacted: CANARY_TOKEN]" in json.loads(line) for line in lines)
