"""Test what `overwrite_output_dir` moves aside and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from rlqwen.config import Recipe, SFTConfig
from rlqwen.errors import ConfigError
from rlqwen.preflight import check_before_run, check_pipeline
from rlqwen.run_folder.layout import RUN_MARKER, find_run_files
from rlqwen.runs.pipeline import run_recipe
from rlqwen.trainers.sft import SFTTrainer


def recipe(start: str | Path, folder: str | Path, **more: Any) -> Recipe:
    return Recipe.parse(
        {
            "algorithm": "sft",
            "model": {"path": str(start)},
            "data": {"train": {"generator": "arithmetic", "args": {"kind": "sft", "size": 8}}},
            "train": {"max_steps": 1, "save_strategy": "no", "overwrite_output_dir": True},
            "output_dir": str(folder),
        }
        | more
    )


def make_used_folder(folder: Path) -> Path:
    """Make a run folder that holds a run with a final model."""
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text("{}")
    (folder / RUN_MARKER).touch()
    return folder


def test_only_files_of_the_run_are_moved_aside(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    folder = tmp_path / "run"
    for seed in (1, 2):
        run_recipe(recipe(tiny_model_path, folder, train={"max_steps": seed, "save_strategy": "no", "seed": seed,
                                                          "overwrite_output_dir": True}), print)  # fmt: skip
        (folder / "notes.txt").write_text("mine")
    assert f"the run that was in {folder} is in {folder / 'previous-1'} now" in capsys.readouterr().out
    aside = folder / "previous-1"
    assert find_run_files(aside) == ["metrics.jsonl", "final", "summary.json"]
    assert "seed: 1\n" in (aside / "recipe.yaml").read_text()
    assert "seed: 2\n" in (folder / "recipe.yaml").read_text()
    assert (aside / "curves.png").is_file()
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "previous-2").exists()


def test_a_folder_that_no_run_wrote_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    """The folder holds a model in `final`, but no marker of a run."""
    (make_used_folder(tmp_path / "theirs") / RUN_MARKER).unlink()
    with pytest.raises(ConfigError, match=r"holds final, but no run of rlqwen wrote that"):
        check_before_run([recipe(tiny_model_path, tmp_path / "theirs")])
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ConfigError, match=r"no run of rlqwen wrote that"):
        SFTTrainer(
            str(tiny_model_path),
            args=SFTConfig(output_dir=str(tmp_path / "theirs"), overwrite_output_dir=True),
            train_dataset=rows,
        )
    assert (tmp_path / "theirs" / "final" / "config.json").is_file()
    assert not (tmp_path / "theirs" / RUN_MARKER).exists()


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("model.path", {"model": {"path": "run/final"}}),
        ("data.train.path", {"data": {"train": {"path": "run/rows.jsonl"}}}),
        ("data.train.0.path", {"data": {"train": [{"path": "run/rows.jsonl"}, {"generator": "arithmetic"}]}}),
        ("data.eval.path", {"data": {"train": {"generator": "arithmetic"}, "eval": {"path": "./run/rows.jsonl"}}}),
        ("train.ref_model", {"algorithm": "dpo", "train": {"ref_model": "run/final", "overwrite_output_dir": True}}),
        ("rewards.0.name", {"algorithm": "grpo", "train": {"overwrite_output_dir": True}, "rewards": ["run/final"]}),
        ("rewards.0.name", {"algorithm": "grpo", "train": {"overwrite_output_dir": True}, "rewards": ["run/r.py:f"]}),
    ],
)
def test_a_run_may_not_need_files_in_the_folder_that_it_clears(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, more: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_used_folder(Path("run"))
    Path("run/rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("run/r.py").write_text("def f(completions, **kwargs): return [0.0] * len(completions)\n")
    message = rf"{key} '.*run/.*' lies in output_dir 'run', which train.overwrite_output_dir=true clears"
    with pytest.raises(ConfigError, match=message):
        check_before_run([recipe(tiny_model_path, "run", **more)])
    (report,) = check_pipeline([recipe(tiny_model_path, "run", **more)])
    assert any("which train.overwrite_output_dir=true clears" in str(fault) for fault in report.faults)
    assert Path("run/final/config.json").is_file()


def test_a_later_recipe_may_start_from_the_final_model_of_an_earlier_one_only(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    first = recipe(tiny_model_path, make_used_folder(tmp_path / "first"))
    check_before_run([first, recipe(tmp_path / "first" / "final", tmp_path / "second")])
    (tmp_path / "first" / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model.path '.*step-000001' lies in output_dir '.*first'"):
        check_before_run([first, recipe(tmp_path / "first" / "checkpoints" / "step-000001", tmp_path / "second")])


def test_a_script_may_not_overwrite_the_model_that_it_loads(tmp_path: Path) -> None:
    folder = make_used_folder(tmp_path / "run")
    args = SFTConfig(output_dir=str(folder), overwrite_output_dir=True)
    with pytest.raises(ConfigError, match=r"model '.*final' lies in output_dir"):
        SFTTrainer(str(folder / "final"), args=args, train_dataset=[{"prompt": "a", "completion": "b"}])
