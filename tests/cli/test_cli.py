"""Test the command line: what it prints, its exit codes, and its speed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlqwen import __version__
from rlqwen.cli import main, session
from rlqwen.config import Recipe, RewardSpec
from rlqwen.config.recipe_yaml import load_recipe, load_recipes
from rlqwen.errors import ConfigError, Interrupted, Preempted, RewardFailure, RewardSpecError
from rlqwen.evaluation import EvalConfig, evaluation_config
from rlqwen.reporting import MetricLogger, read_summary, write_summary
from rlqwen.run_folder.layout import mark_run_folder, move_run_aside
from rlqwen.runs import pipeline
from tests.narrowing import only_source, present
from tests.patience import PATIENCE_S

SFT = """\
algorithm: sft
model: {{path: {model}}}
data:
  train: {{generator: arithmetic, args: {{kind: sft, size: 16}}}}
  eval: {{generator: arithmetic, args: {{kind: sft, split: eval, size: 8}}}}
train: {{max_steps: 2, per_device_train_batch_size: 8, eval_strategy: steps, eval_on_start: true, save_strategy: no}}
output_dir: runs/sft
"""
GRPO = """\
algorithm: grpo
model: {{path: {model}}}
data: {{train: {{generator: arithmetic, args: {{size: 16}}}}}}
rewards: [accuracy, {{name: format, args: {{require: boxed}}}}]
rollout: {{engine: transformers}}
train: {{max_completion_length: 8, temperature: 0.7}}
output_dir: runs/grpo
"""


@pytest.fixture
def recipes(tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a working directory with sft.yaml and grpo.yaml on a tiny model."""
    monkeypatch.chdir(tmp_path)
    # The command line's own SIGTERM handler and environment must not outlive a test.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    handler = signal.getsignal(signal.SIGTERM)
    Path("sft.yaml").write_text(SFT.format(model=tiny_model_path))
    Path("grpo.yaml").write_text(GRPO.format(model=tiny_model_path))
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


class FakeTrainer:
    """Replace a trainer to test what happens around one; log two steps and write a summary."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.output_dir = Path(recipe.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def train(self) -> None:
        with MetricLogger(self.output_dir, total_steps=2, algorithm=self.recipe.algorithm) as logger:
            for step in (1, 2):
                logger.log(step, {"loss": 1.0 / step})
        write_summary(
            self.output_dir,
            algorithm=self.recipe.algorithm,
            steps=2,
            wall_time_s=1.0,
            initial_eval={"eval/accuracy": 0.25},
            final_eval={"eval/accuracy": 0.75},
            seed=0,
        )


@pytest.fixture
def fake_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlqwen.trainers.factory.build_trainer", FakeTrainer)


# Help and lists


@pytest.mark.parametrize("words", [["--help"], ["run", "-h"], ["eval", "--help"], ["recipes", "copy", "--help"]])
def test_help_everywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "Usage: rlqwen" in capsys.readouterr().out


def test_help_answers_within_a_second_and_without_torch() -> None:
    command = "import sys; from rlqwen.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    seconds = []  # of processor time, which other work does not lengthen
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert subprocess.run([sys.executable, "-c", command], stdout=subprocess.DEVNULL, check=False).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0  # 0.2 measured


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlqwen {__version__}\n"


def test_rewards_are_listed_with_origin_and_doc(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy"))
    assert f"rlqwen {__version__}" in line
    assert "math-verify" in line


@pytest.mark.parametrize(
    ("command", "name", "about"),
    [
        ("trainers", "grpo", "GRPOTrainer"),
        ("losses", "clipped", ""),
        ("losses", "sequence_mean", ""),
        ("advantages", "rloo", ""),
    ],
)
def test_plugins_of_each_kind_are_listed_with_origin_and_doc(
    capsys: pytest.CaptureFixture[str], command: str, name: str, about: str
) -> None:
    assert main([command]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert f"rlqwen {__version__}" in line
    assert about in line
    assert len(line.split(__version__)[1].strip()) > 20  # the first line of its docstring


def test_an_empty_list_is_a_plain_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlqwen.plugins.kinds.ENGINES.discover", dict)
    assert main(["engines"]) == 0
    assert capsys.readouterr().out.startswith("No rollout engines are registered: ")


def test_a_reward_that_two_packages_register_is_listed_as_unusable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlqwen.plugins.registry import PluginEntry

    entry = PluginEntry("accuracy", "a:b", "alpha", "1", conflict="registered by more than one package: alpha, beta")
    monkeypatch.setattr("rlqwen.plugins.kinds.REWARDS.discover", lambda: {"accuracy": entry})
    assert main(["rewards"]) == 0
    assert "unusable: registered by more than one package: alpha, beta" in capsys.readouterr().out


def test_recipes_are_listed_and_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes"]) == 0
    assert "quickstart_grpo" in capsys.readouterr().out
    assert main(["recipes", "copy", "quickstart_sft", str(tmp_path)]) == 0
    assert load_recipe(tmp_path / "quickstart_sft.yaml").algorithm == "sft"
    assert main(["recipes", "copy", "quickstart_sft", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


# Bad input: exit code 2, one message, no traceback


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere.yaml"], "neither a file nor a packaged recipe"),
        (["run", "train.max_steps=1"], "no recipe given"),
        (["run", "sft.yaml", "train.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["run", "sft.yaml", "train.max_steps=many"], "train.max_steps: input should be a valid integer"),
        (["run", "sft.yaml", "model.path=builtin:tiny-qwen9"], "there is no built-in model"),
        (["run", "sft.yaml", "data.train.args.sice=3"], "unknown key 'sice'; did you mean 'size'?"),
        (["run", "sft.yaml", "model.path=./missing"], "there is no such folder"),
        (["run", "grpo.yaml", "rewards.0.name=acuracy"], "did you mean 'accuracy'?"),
        (["check", "grpo.yaml", "rollout.max_num_seq=2"], "did you mean 'max_num_seqs'?"),
        (["eval", "./missing", "--data", "grpo.yaml"], "there is no such folder"),
        (["eval", "./missing", "--data", "x.jsonl"], "give --rewards"),
        (["eval", "./missing", "--data", "x.jsonl", "--rewards", "accuracy", "--column", "prompt"], "ours=theirs"),
        (["frobnicate"], "No such command"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    recipes: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_check_prints_what_it_found_and_ends_with_2_if_anything_is_wrong(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "sft.yaml", "grpo.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "runs/sft (sft)  ok" in printed
    assert "1 prompt x 8 generations = 8 completions" in printed
    assert main(["check", "grpo.yaml", "rewards.0.name=acuracy", "train.max_completion_length=4000"]) == 2
    printed = capsys.readouterr().out
    assert "runs/grpo (grpo)  2 wrong" in printed
    assert "did you mean 'accuracy'?" in printed
    assert "leaves no room for a prompt" in printed


# Run


def test_run_trains_and_shows_metrics_and_files(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "sft.yaml", "train.disable_tqdm=true"]) == 0
    printed = capsys.readouterr().out
    for part in ("8 sequences per update", "step 1/2", "step 2/2", "perplexity", "runs/sft/final/", "rlqwen run GRPO"):
        assert part in printed
    assert load_recipe("runs/sft/recipe.yaml") == load_recipe("sft.yaml", ["train.disable_tqdm=true"])
    assert Path("runs/sft/curves.png").is_file()
    assert main(["run", "sft.yaml"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_pipeline_leaves_a_summary_of_all_stages_in_the_shared_parent(
    recipes: Path, fake_trainers: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "sft.yaml", "grpo.yaml"]) == 0
    summary = read_summary("runs")
    assert summary["algorithm"] == "sft+grpo"
    assert summary["final_eval"] == {"eval/accuracy": 0.75}
    assert Path("runs/curves.png").is_file()
    printed = capsys.readouterr().out
    assert "stage 2 of 2: grpo in runs/grpo" in printed
    assert "+0.500" in printed


def test_one_run_leaves_nothing_in_the_parent(recipes: Path, fake_trainers: list[Any]) -> None:
    assert main(["run", "grpo.yaml"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["grpo"]


def test_a_used_folder_of_a_later_stage_stops_the_pipeline_before_the_first_stage(
    recipes: Path, fake_trainers: list[Any]
) -> None:
    Path("runs/grpo/final").mkdir(parents=True)
    with pytest.raises(ConfigError, match="'runs/grpo' holds a run already"):
        pipeline.run_pipeline(load_recipes(["sft.yaml", "grpo.yaml"]), print)
    assert not Path("runs/sft").exists()


@pytest.mark.parametrize(
    ("error", "code", "printed", "logged"),
    [
        (RewardFailure("reward 'x' failed"), 1, "rlqwen: reward 'x' failed", True),
        (ZeroDivisionError("oh"), 1, "Traceback (most recent call last)", True),
        (RewardSpecError("two rewards"), 2, "rlqwen: two rewards", False),
        (KeyboardInterrupt(), 130, "rlqwen: interrupted", False),
        (Interrupted("Ctrl-C: saved after update 3"), 130, "rlqwen: Ctrl-C: saved after update 3", False),
        (Preempted("SIGTERM: saved after update 3"), 75, "rlqwen: SIGTERM: saved after update 3", False),
    ],
    ids=["ours", "a bug", "input", "ctrl-c", "ctrl-c that saved", "sigterm"],
)
def test_exit_codes_of_a_run_that_fails(
    recipes: Path,
    fake_trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    printed: str,
    logged: bool,
) -> None:
    def fail(trainer: Any) -> None:
        raise error

    monkeypatch.setattr(FakeTrainer, "train", fail)
    assert main(["run", "sft.yaml"]) == code
    assert printed in capsys.readouterr().err
    log = Path("runs/sft/error.log")
    assert log.is_file() == logged
    if logged:
        assert "in fail" in log.read_text()


@pytest.mark.parametrize("moved", [True, False])
def test_a_stopped_run_does_not_offer_to_resume_the_run_it_was_to_replace(
    recipes: Path,
    fake_trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moved: bool,
) -> None:
    folder = Path("runs/sft")
    leave_a_run(folder)

    def stop(trainer: Any) -> None:
        if moved:
            move_run_aside(folder)
            (folder / "checkpoints" / "step-000001").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeTrainer, "train", stop)
    assert main(["run", "sft.yaml", "train.overwrite_output_dir=true"]) == 130
    assert ("resume with" in capsys.readouterr().err) == moved


def leave_a_run(folder: Path) -> None:
    """Leave the files of an earlier run."""
    folder.mkdir(parents=True)
    mark_run_folder(folder)
    (folder / "checkpoints" / "step-000009").mkdir(parents=True)


def test_a_stopped_run_prints_its_resume_command_with_the_users_own_arguments(
    recipes: Path, fake_trainers: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(trainer: Any) -> None:
        (trainer.output_dir / "checkpoints" / "step-000003").mkdir(parents=True)
        raise Interrupted("Ctrl-C: saved after update 3")

    monkeypatch.setattr(FakeTrainer, "train", stop)
    assert main(["run", "sft.yaml", "train.run_name=my run", "--allow-changes"]) == 130
    assert capsys.readouterr().err == (
        "rlqwen: Ctrl-C: saved after update 3\n"
        "rlqwen: resume with: rlqwen run sft.yaml 'train.run_name=my run' --allow-changes --resume\n"
    )


def test_run_says_what_it_loads_before_torch_is_imported(recipes: Path) -> None:
    """The first line comes from a process that has not imported torch yet, before the import takes its seconds."""
    program = (
        "import sys\n"
        "from rlqwen.cli import main, run_commands\n"
        "def prepare(**_): print('torch' in sys.modules, flush=True); sys.exit(0)\n"
        "run_commands.prepare = prepare\n"
        "main(['run', 'sft.yaml'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    first, second = done.stdout.splitlines()
    assert first.startswith("rlqwen: loading torch and transformers for sft of ")
    assert first.endswith(" on arithmetic, in runs/sft")
    assert second == "False"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_a_signal_ends_the_run_through_its_cleanup(recipes: Path, number: int, code: int) -> None:
    """A fake trainer waits in a process of its own; its `finally` must run."""
    program = (
        "import signal, sys, time, types, pathlib\n"
        # A shell that runs the tests in the background leaves SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Trainer:\n"
        "    def __init__(self, recipe): self.output_dir = pathlib.Path(recipe.output_dir)\n"
        "    def train(self):\n"
        "        try:\n"
        "            print('training', flush=True); time.sleep(600)\n"
        "        finally:\n"
        "            pathlib.Path('cleaned').touch()\n"
        "sys.modules['rlqwen.trainers.factory'] = types.SimpleNamespace(build_trainer=Trainer)\n"
        "from rlqwen.cli import main\n"
        "sys.exit(main(['run', 'sft.yaml']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        try:
            assert any(line == b"training\n" for line in present(process.stdout))
            os.kill(process.pid, number)
            assert process.wait(timeout=PATIENCE_S) == code
        finally:
            process.kill()
    assert Path("cleaned").is_file()


# Eval


def test_eval_takes_from_a_recipe_what_the_options_leave_open(recipes: Path, tiny_model_path: Path) -> None:
    config = evaluation_config("m", "grpo.yaml", num_samples=4, temperature=None, max_tokens=None)
    assert (config.temperature, config.max_tokens, config.num_samples) == (0.7, 8, 4)
    assert config.rewards == [RewardSpec(name="accuracy"), RewardSpec(name="format", args={"require": "boxed"})]
    assert config.rollout.engine == "transformers"
    changed = evaluation_config("m", "grpo.yaml", reward_names="accuracy, length", temperature=0.0, engine="vllm")
    assert [spec.name for spec in changed.rewards] == ["accuracy", "length"]
    assert (changed.temperature, changed.rollout.engine) == (0.0, "vllm")
    assert only_source(evaluation_config("m", "sft.yaml", reward_names="accuracy").data).args["split"] == "eval"
    with pytest.raises(ConfigError, match="leave --split out"):
        evaluation_config("m", "grpo.yaml", source={"split": "test", "system_prompt": None})


def test_eval_reads_a_data_file_by_column_map() -> None:
    config = evaluation_config(
        "m", "rows.jsonl", reward_names="accuracy", columns=["prompt=question"], source={"system_prompt": "Be brief."}
    )
    assert isinstance(config, EvalConfig)
    source = only_source(config.data)
    assert (source.path, source.columns) == ("rows.jsonl", {"prompt": "question"})
    assert source.system_prompt == "Be brief."


def test_eval_prints_one_json_object_and_nothing_else(
    recipes: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(tiny_model_path), "--data", "grpo.yaml", "-k", "2", "--limit", "3", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_prompts"], result["num_samples"]) == (3, 2)
    assert set(result["rewards"]) == {"accuracy", "format"}
    assert set(result["rewards"]["accuracy"]["pass_at"]) == {"1", "2"}
    assert 0 < result["mean_length"] <= 8
    assert main(words[:-1]) == 0
    printed = capsys.readouterr().out
    assert "3 prompts x 2 samples" in printed
    assert "majority@2" in printed


@pytest.mark.fault("Ctrl-C in the middle of an import, which makes another error of it", "exit code 130 and one line")
def test_an_interrupt_that_surfaces_as_another_error_is_reported_as_an_interrupt(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_something(words: tuple[str, ...]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'x'") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("rlqwen.cli.run_commands.read_recipes", import_something)
    try:
        assert main(["run", "sft.yaml"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "rlqwen: interrupted\n"


def test_warnings_of_rlqwen_are_printed_without_file_and_code() -> None:
    format_warning = session._one_line(lambda message, category, filename, *rest: f"{filename}: {message}\n")
    own = str(Path(session.__file__).parents[1] / "rollout" / "engine.py")
    assert format_warning(UserWarning("workers compute in bfloat16"), UserWarning, own, 1, None) == (
        "rlqwen: workers compute in bfloat16\n"
    )
    assert format_warning("x", UserWarning, "other/engine.py", 1, None) == "other/engine.py: x\n"
