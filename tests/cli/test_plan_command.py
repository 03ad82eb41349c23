"""Test `rlqwen plan`: what it prints, its JSON, its exit codes, and that it needs neither weights nor network."""

import json
import re
from pathlib import Path

import pytest

from rlqwen.cli import main

pytestmark = pytest.mark.usefixtures("wide")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_a_plan_says_memory_time_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "Qwen/Qwen3-30B-A3B", "--gpus", "16xH100-80G", "--layout", "fsdp=16,ep=8"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"Qwen/Qwen3-30B-A3B \(sft\) on 16xH100-80G +ok", shown)
    for line in (
        r"layout +fsdp=16,ep=8: 16 training ranks see 16 different rows at a time",
        r"batch +64 sequences, 262,144 tokens per update = 16 data ranks x 4 micro-batches of up to 4,096 tokens",
        r"memory +[\d.]+ of 79.6 GiB per GPU, at the peak in forward/backward",
        r"update +[\d.]+ s: .*expert parallel \d+%",
        r"throughput +[\d,]+ tokens/s, [\d,]+ per GPU; updates at \d+% of peak FLOP/s \(MFU\)",
        r"run +1,000 steps: [\d.]+ hours, \d+ GPU-hours \(--rows gives",
        r"memory of each of 16 GPUs, GiB +load +forward/backward +optimizer step +peak",
    ):
        assert re.search(line, shown), line


def test_what_does_not_fit_ends_with_two_and_names_the_cheapest_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "Qwen/Qwen2.5-72B", "--gpus", "8xH100"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"which needs a GPU of 16\d\.\d GiB, and H100-80G has 79.6 GiB", shown)
    assert "the cheapest change that fits is --gpus 24xH100-80G parallel.engine=fsdp2" in shown


def test_the_best_layout_of_grpo_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "Qwen/Qwen3-30B-A3B", "algorithm=grpo", "rollout.engine=transformers", "--gpus", "16xH100"]
    assert main([*words, "--best", "--mean-tokens", "2000", "--rows", "3200", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"]
    assert 0 < values["rollout_share"] < 1
    assert values["steps"] == 150  # three epochs of 3,200 prompts, 64 per step
    assert values["gpu_hours"] == pytest.approx(values["steps"] * values["step_seconds"] * 16 / 3600)
    assert "--layout" in values["settings"]
    assert values["memory"]["weights"]["load"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Qwen/Qwen3-5B"], "did you mean Qwen/Qwen3-8B"),
        (["Qwen/Qwen3-8B", "--gpus", "3xH300"], "did you mean H800"),
        (["Qwen/Qwen3-8B", "--gpus", "8xH100", "--layout", "tp=3"], "makes fsdp=2 x tp=3 x pp=1 = 6 ranks"),
        (["Qwen/Qwen3-8B", "--layout", "ep=8"], "ep=8: the model has no experts"),
        (["Qwen/Qwen3-8B", "--layout", "tp=2", "--best"], "leave one of them out"),
        (["Qwen/Qwen3-8B", "Qwen/Qwen3-4B"], "one recipe or model at a time, and 2 are given"),
        (["Qwen/Qwen3-8B", "train.max_lenght=8"], "did you mean"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_needs_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[2] / "rlqwen" / "planning" / "configs" / "Qwen3-0.6B.json"
    (tmp_path / "config.json").write_text(config.read_text())
    assert main(["plan", str(tmp_path), "--gpus", "1xRTX4090", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 596_049_920
