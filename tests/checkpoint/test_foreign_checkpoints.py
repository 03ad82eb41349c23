"""Test that checkpoints and run folders of strangers are refused in one message, before anything of the run is changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlqwen.checkpoint.atomic_folder import MANIFEST_FILE, find_fault, write_manifest
from rlqwen.config import SFTConfig
from rlqwen.errors import InputError
from rlqwen.runs.stages import is_finished
from rlqwen.trainers.sft import SFTTrainer

ROWS = [{"prompt": f"{number} + 1 =", "completion": f"{number + 1}"} for number in range(4)]


def trainer(model: Path, folder: Path, **options: Any) -> SFTTrainer:
    given = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, **options}
    return SFTTrainer(str(model), args=SFTConfig(output_dir=str(folder), **given), train_dataset=ROWS)


@pytest.fixture(scope="module")
def saved(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a run after one update."""
    folder = tmp_path_factory.mktemp("run")
    trainer(tiny_model_path, folder, max_steps=1).train()
    return folder / "checkpoints" / "step-000001"


def state(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "state.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def moments(folder: Path) -> None:
    for path in folder.glob("optimizer*.safetensors"):
        save_file(
            {name: tensor[:1].clone() if tensor.dim() else tensor for name, tensor in load_file(path).items()}, path
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda at: (at / "state.json").write_text("[" * 100_000),
        lambda at: (at / "state.json").write_text("[]"),
        lambda at: (at / "state.json").write_text('{"stream": {"__tensor__": "nowhere"}}'),
        lambda at: state(at, dict.clear),
        lambda at: state(at, lambda content: content.update({key: [5] for key in content})),
        lambda at: (at / "fingerprint.json").write_text("5"),
        lambda at: (at / "trainer_state.json").write_text("[1, 2]"),
        lambda at: (at / "trainer_state.json").write_text('{"a":' * 100_000),
        lambda at: state(at, lambda content: content.update(global_step="x"), "trainer_state.json"),
        lambda at: state(at, lambda content: content.update(evil=1), "trainer_state.json"),
        lambda at: (at / "rng-0.json").write_text('{"python": 5}'),
        moments,
        lambda at: (at / "model.safetensors").write_bytes(b"x" * 100),
    ],
)
def test_state_of_strangers_is_refused(
    saved: Path,
    change: Callable[[Path], object],
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RLQWEN_DISPLAY", "plain")
    theirs = tmp_path / "theirs"
    shutil.copytree(saved, theirs)
    change(theirs)
    (theirs / MANIFEST_FILE).unlink()
    write_manifest(theirs)
    assert find_fault(theirs) is None
    run = trainer(tiny_model_path, tmp_path / "run", resume_allow_changes=True)
    with pytest.raises(InputError) as caught:
        run.train(resume_from_checkpoint=theirs)
    assert str(theirs) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_manifest_of_any_content_is_a_fault(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "theirs")
    outside = '{"format": 1, "files": {"../x": {"sha256": "a", "bytes": 1}}}'
    for text in ("[" * 100_000, '{"files": ' * 100_000, "[]", "5", '{"files": 5}', '{"files": {"a": 5}}', outside):
        (tmp_path / "theirs" / MANIFEST_FILE).write_text(text)
        assert find_fault(tmp_path / "theirs") is not None


def test_a_summary_of_any_content_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    for text in ("[" * 100_000, "{", "\0"):
        (tmp_path / "summary.json").write_text(text)
        assert not is_finished(tmp_path)
