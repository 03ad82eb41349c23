"""Test metric sinks, displays, curves, the summary and the report at the end of a run."""

import io
import json
import math
import shlex
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rlqwen.config import GRPOConfig, RewardConfig, SFTConfig
from rlqwen.errors import ConfigError, DataError
from rlqwen.reporting import (
    CompletionLog,
    MetricLogger,
    plot_curves,
    plot_pipeline,
    read_completions,
    read_metrics,
    read_summary,
    write_pipeline_summary,
    write_summary,
)
from rlqwen.reporting.console import TerminalConsole
from rlqwen.reporting.curves import choose_panels
from rlqwen.reporting.display import (
    LiveDisplay,
    PlainDisplay,
    Progress,
    details,
    format_duration,
    format_evaluation,
    headline,
    sparkline,
    speed,
)
from rlqwen.reporting.end_of_run import auto_class, pick_samples, show_report
from rlqwen.run_folder.layout import refuse_used_folder
from rlqwen.types import Completion, Group, Prompt

STEP = {
    "loss": 0.25,
    "reward/mean": 0.5,
    "reward/accuracy/mean": 0.4,
    "reward/format/mean": 1.0,
    "completions/mean_length": 6.25,
    "completions/truncated": 0.25,
    "kl": 0.001,
    "entropy": 0.5,
    "tokens/generated": 1000.0,
    "time/step": 2.0,
    "time/rollout": 1.0,
    "time/train": 0.5,
}


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "off")


@pytest.fixture
def groups() -> list[Group]:
    """Return two groups with two completions each; the second reward is missing once."""

    def completion(text: str, finish: Literal["stop", "length"]) -> Completion:
        return Completion([1] * len(text), [-0.5] * len(text), finish, text)

    first = Group(
        Prompt(7, [1, 2], [{"role": "system", "content": "be\nbrief"}, {"role": "user", "content": "1+1=?"}]),
        [completion("2", "stop"), completion("333", "length")],
        policy_version=4,
        rewards={"accuracy": [1.0, 0.0], "format": [None, 0.5]},
        call_statuses={"accuracy": ["ok", "ok"], "format": ["timeout", "ok"]},
        total_rewards_G=[1.0, 0.1],
        advantages_G=[0.9, -0.9],
    )
    second = Group(Prompt(3, [1], "2+2="), [completion("4", "stop"), completion("五", "stop")], policy_version=4)
    second.rewards = {"accuracy": [1.0, 0.0]}
    return [first, second]


def finished_run(folder: Path, algorithm: str, groups: list[Group] | None = None, **evals: float) -> Path:
    with MetricLogger(folder, total_steps=2, algorithm=algorithm) as logger:
        for step in (1, 2):
            logger.log(step, {"loss": 1.0 / step, **({"reward/mean": 0.1 * step} if algorithm == "grpo" else {})})
    if groups:
        CompletionLog(folder).write(2, groups)
    (folder / "final").mkdir()
    (folder / "recipe.yaml").write_text("algorithm: grpo\n")
    before = {"eval/accuracy": evals["before"]} if evals else None
    after = {"eval/accuracy": evals["after"], "eval/time": 3.0} if evals else None
    write_summary(folder, algorithm=algorithm, steps=2, wall_time_s=61.0, initial_eval=before, final_eval=after, seed=5)
    plot_curves(folder)
    return folder


# Sinks


def test_jsonl_is_flushed_per_step_and_has_null_for_nonfinite_values(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path, total_steps=2, algorithm="sft")
    logger.log(1, {"loss": torch.tensor(0.5), "grad_norm": math.inf, "kl": math.nan})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logger.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "grad_norm": None, "kl": None, "nonfinite": {"grad_norm": "inf", "kl": "nan"}}
    ]


def test_an_incomplete_last_line_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "nothing") == []


def test_unknown_and_uninstalled_sinks_are_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="unknown metric sink 'mlflow'; known: tensorboard, wandb, trackio, none"):
        MetricLogger(tmp_path, report_to="mlflow", total_steps=1, algorithm="sft")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricLogger(tmp_path, report_to=["wandb"], total_steps=1, algorithm="sft")


def test_tensorboard_gets_the_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricLogger(tmp_path, report_to="tensorboard", total_steps=2, algorithm="sft") as logger:
        logger.log(1, {"loss": 0.5})
        logger.log(2, {"loss": 0.25})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_sinks_get_run_name_steps_and_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A fake module that records calls replaces the service's package."""
    calls: list[tuple[Any, ...]] = []

    class Service(types.ModuleType):
        def init(self, **arguments: Any) -> Any:
            calls.append(("init", arguments["name"]))
            return self

        def log(self, metrics: Mapping[str, float], step: int) -> None:
            calls.append(("log", metrics, step))

        def finish(self) -> None:
            calls.append(("finish",))

    monkeypatch.setitem(sys.modules, name, Service(name))
    with MetricLogger(tmp_path, report_to=[name], run_name="r", total_steps=1, algorithm="sft") as logger:
        logger.log(1, {"loss": 0.5})
    assert calls == [("init", "r"), ("log", {"loss": 0.5}, 1), ("finish",)]


def test_display_variable_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "loud")
    with pytest.raises(ConfigError, match="RLQWEN_DISPLAY='loud'"):
        MetricLogger(tmp_path, total_steps=1, algorithm="sft")


# Completions


def test_completions_hold_prompt_rewards_advantage_and_failed_calls(tmp_path: Path, groups: list[Group]) -> None:
    path = CompletionLog(tmp_path).write(12, groups)
    assert path == tmp_path / "completions" / "step-000012.jsonl"
    rows = read_completions(tmp_path)
    assert len(rows) == 4
    assert rows[0] == {
        "prompt_index": 7,
        "prompt": groups[0].prompt.content,
        "completion": "2",
        "rewards": {"accuracy": 1.0, "format": None},
        "reward": 1.0,
        "advantage": 0.9,
        "outcomes": {"format": "timeout"},
        "finish_reason": "stop",
        "num_tokens": 1,
        "policy_version": 4,
    }
    assert (rows[1]["finish_reason"], rows[3]["completion"], rows[3]["reward"]) == ("length", "五", None)


def test_completions_are_read_from_the_last_evaluation_if_there_is_one(tmp_path: Path, groups: list[Group]) -> None:
    log = CompletionLog(tmp_path)
    log.write(9, groups)
    log.write(1, groups[:1], evaluation=True)
    log.write(5, groups[1:], evaluation=True)
    assert [row["prompt_index"] for row in read_completions(tmp_path)] == [3, 3]


# Display


def test_plain_lines_respect_the_interval_except_first_last_and_evaluations() -> None:
    lines: list[str] = []
    now = [0.0]
    display = PlainDisplay(10, interval=5.0, write=lines.append, clock=lambda: now[0])
    display.show_evaluation(0, {"eval/accuracy": 0.5, "eval/time": 1.0})
    for step in range(1, 11):
        now[0] += 2.0
        display.show(step, STEP)
    display.close()
    assert [line.split("  eval")[0][:12] for line in lines] == [
        "step  0/10",
        "step  1/10  ",
        "step  4/10  ",
        "step  7/10  ",
        "step 10/10  ",
    ]
    assert lines[0] == "step  0/10  eval  accuracy 0.5"


def test_plain_display_prints_the_last_step_on_close() -> None:
    lines: list[str] = []
    display = PlainDisplay(10, interval=5.0, write=lines.append, clock=lambda: 0.0)
    display.show(1, STEP)
    display.show(2, STEP)
    display.close()
    assert [line[:10] for line in lines] == ["step  1/10", "step  2/10"]


def test_a_line_shows_reward_lengths_kl_entropy_speed_and_shares_of_time() -> None:
    assert headline(STEP) == ["reward 0.500", "accuracy 0.400", "format 1.000"]
    assert headline({"loss": 0.12345}) == ["loss 0.1235"]
    assert details(STEP) == ["len 6.2", "cut off 25%", "kl 0.001", "entropy 0.500"]
    assert speed(STEP) == ["500 tok/s", "rollout 50% train 25%"]
    evaluation = {
        "eval/reward/mean": 0.5,
        "eval/reward/format/mean": 0.25,
        "eval/reward/format/error": 2.0,
        "eval/reward/format/timeout": 0.0,
        "eval/completions/truncated": 0.0,
        "eval/tokens": 9.0,
        "eval/time": 1.0,
    }
    assert format_evaluation(evaluation) == "eval  reward 0.5  format 0.25  format/error 2  cut off 0"


def test_remaining_time_excludes_start_up() -> None:
    now = [0.0]
    progress = Progress(11, lambda: now[0])
    assert progress.remaining() is None
    now[0] = 60.0
    progress.advance(1)
    now[0] = 62.0
    progress.advance(2)
    assert progress.remaining() is None  # one step is too few for a pace
    now[0] = 64.0
    progress.advance(3)
    assert progress.remaining() == 16.0  # 8 steps at 2 s, although the first took a minute
    assert (format_duration(16.0), format_duration(3723.0), format_duration(None)) == ("0:16", "1:02:03", "-")


def test_sparkline_spans_the_range_and_skips_nan() -> None:
    assert sparkline([0.0, math.nan, 1.0]) == "▁█"
    assert sparkline([0.5, 0.5]) == "▁▁"
    assert len(sparkline([float(n) for n in range(1000)])) == 32


def test_live_display_keeps_prints_whole_and_restores_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    console = TerminalConsole(file=screen, force_terminal=True, width=100)
    display = LiveDisplay(10, "grpo · run", console)
    display.show_evaluation(0, {"eval/accuracy": 0.5})
    display.show(3, STEP)
    print("a user's own print")
    display.note("[not markup]")
    display.close()
    text = screen.getvalue()
    assert "a user's own print" in text
    assert capsys.readouterr().out == ""
    for part in ("[not markup]", "step 3/10", "reward 0.500", "entropy 0.500", "500 tok/s", "step 0  eval  accuracy"):
        assert part in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")  # the cursor is visible again


# Curves


def test_panels_depend_on_the_logged_metrics() -> None:
    sft = choose_panels([{"step": 1, "loss": 1.0}, {"step": 1, "eval/loss": 2.0}])
    assert [(panel.title, panel.train_keys, panel.eval_keys) for panel in sft] == [("loss", ("loss",), ("eval/loss",))]
    grpo = choose_panels([{"step": 1, **STEP}, {"step": 1, "eval/reward/mean": 1.0, "eval/accuracy": 0.5}])
    assert [(panel.title, panel.train_keys, panel.eval_keys) for panel in grpo] == [
        ("reward", ("reward/mean",), ("eval/reward/mean",)),
        ("accuracy", ("reward/accuracy/mean",), ("eval/accuracy",)),
        ("other rewards", ("reward/format/mean",), ()),
    ]


def test_curves_are_drawn_for_one_run_and_for_a_pipeline(tmp_path: Path) -> None:
    sft = finished_run(tmp_path / "sft", "sft")
    grpo = finished_run(tmp_path / "grpo", "grpo", before=0.5, after=0.9)
    for path in (sft / "curves.png", plot_pipeline(tmp_path, [sft, grpo])):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.png").stat().st_size > (sft / "curves.png").stat().st_size


def test_curves_of_a_run_that_logged_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no metrics were logged"):
        plot_curves(tmp_path)


# Summary and report


def test_summary_holds_metrics_and_versions(tmp_path: Path) -> None:
    write_summary(
        tmp_path,
        algorithm="sft",
        steps=3,
        wall_time_s=1.234,
        initial_eval=None,
        final_eval={"eval/loss": math.nan},
        seed=1,
    )
    summary = read_summary(tmp_path)
    assert summary["versions"].keys() >= {"python", "torch", "transformers"}
    del summary["versions"]
    assert summary == {
        "algorithm": "sft",
        "steps": 3,
        "wall_time_s": 1.23,
        "initial_eval": None,
        "final_eval": {"eval/loss": None},
        "seed": 1,
    }


def test_pipeline_summary_has_the_evaluations_of_the_last_stage_at_the_top(tmp_path: Path) -> None:
    sft = finished_run(tmp_path / "sft", "sft")
    grpo = finished_run(tmp_path / "grpo", "grpo", before=0.5, after=0.9)
    write_pipeline_summary(tmp_path, [sft, grpo])
    summary = read_summary(tmp_path)
    assert (summary["algorithm"], summary["steps"], summary["wall_time_s"]) == ("sft+grpo", 4, 122.0)
    assert (summary["initial_eval"], summary["final_eval"]["eval/accuracy"]) == ({"eval/accuracy": 0.5}, 0.9)
    assert [stage["algorithm"] for stage in summary["stages"]] == ["sft", "grpo"]


def test_the_next_command_can_be_pasted_whatever_the_path(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "我的 run's", "grpo")
    screen = io.StringIO()
    show_report([run], TerminalConsole(file=screen, width=400), next_command="rlqwen eval {final}")
    command = screen.getvalue().splitlines()[-1]
    assert shlex.split(command) == ["rlqwen", "eval", str(run / "final")]


def test_the_report_shows_metrics_files_samples_and_the_next_command(tmp_path: Path, groups: list[Group]) -> None:
    sft = finished_run(tmp_path / "sft", "sft")
    grpo = finished_run(tmp_path / "grpo", "grpo", groups, before=0.5, after=0.9)
    write_pipeline_summary(tmp_path, [sft, grpo])
    screen = io.StringIO()
    show_report([sft, grpo], TerminalConsole(file=screen, width=400), next_command=GRPOConfig.next_command)
    text = screen.getvalue()
    for part in (
        "sft, 2 steps in 1:01",
        "No evaluation was requested",
        "1+1=? → 2   [accuracy 1.00  format missing]",
        "2+2= → 4   [accuracy 1.00]",
        f"{tmp_path / 'summary.json'}",
        f"{grpo / 'curves.png'}",
        f"{sft / 'final'}/",
        f"rlqwen eval {grpo / 'final'} --data {grpo / 'recipe.yaml'} -k 8",
    ):
        assert part in text
    row = next(line.split() for line in text.splitlines() if line.startswith("accuracy"))
    assert row == ["accuracy", "0.500", "0.900", "+0.400"]
    assert "time" not in text.split("Sample")[0].split("accuracy")[1]


def test_the_report_names_the_class_that_loads_a_model(tmp_path: Path) -> None:
    assert auto_class(tmp_path) == "AutoModelForCausalLM"
    for architecture, expected in (
        ("Qwen3_5ForConditionalGeneration", "AutoModelForCausalLM"),
        ("Qwen3_5ForSequenceClassification", "AutoModelForSequenceClassification"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert auto_class(tmp_path) == expected


def test_samples_are_spread_over_prompts(groups: list[Group]) -> None:
    rows = [{"prompt_index": index, "n": n} for index in range(10) for n in range(2)]
    assert pick_samples(rows, 3) == [{"prompt_index": index, "n": 0} for index in (0, 3, 6)]
    assert pick_samples([], 3) == []


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (GRPOConfig, "rlqwen eval F --data R -k 8"),
        (SFTConfig, "rlqwen run GRPO_RECIPE model.path=F     (rlqwen recipes lists recipes)"),
        (
            RewardConfig,
            "rlqwen eval MODEL --data PROMPTS --rewards F     (in a PPO or GRPO recipe: rewards: [{name: F}])",
        ),
    ],
)
def test_a_config_names_the_next_command(config: Any, command: str) -> None:
    assert config.next_command.format(final="F", recipe="R") == command


def test_a_used_run_folder_is_refused_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    refuse_used_folder(tmp_path, overwrite=False)
    finished_run(tmp_path / "run", "sft")
    with pytest.raises(ConfigError, match=r"holds a run already \(found metrics.jsonl, final, summary.json\)"):
        refuse_used_folder(tmp_path / "run", overwrite=False)
    refuse_used_folder(tmp_path / "run", overwrite=True)
