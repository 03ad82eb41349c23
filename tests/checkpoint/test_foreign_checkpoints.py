"""Test that checkpoints and run folders of strangers are refused in one message, before anything of the run is changed."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlqwen.checkpoint.atomic_folder import MANIFEST_FILE, find_fault, write_manifest
from rlqwen.config import SFTConfig
from rlqwen.distributed.optimizer_state import refuse_other_shapes
from rlqwen.errors import ConfigError, InputError, ModelError
from rlqwen.models.critic import HEAD_FILE, ValueHead
from rlqwen.models.tiny import build_tiny_qwen3
from rlqwen.runs.stages import is_finished
from rlqwen.trainers.sft import SFTTrainer
from tests.forked_ranks import run_ranks

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


def reshaped(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    for path in folder.glob("optimizer*.safetensors"):
        save_file({name: change(tensor).contiguous() for name, tensor in load_file(path).items()}, path)


def of_another_width(folder: Path) -> None:
    build_tiny_qwen3(folder, hidden_size=32)


OF_ANOTHER_SHAPE: list[tuple[Callable[[Path], object], str]] = [
    (lambda at: reshaped(at, lambda it: torch.cat([it, it]) if it.ndim else it), "with the shape"),
    (lambda at: reshaped(at, lambda it: it[:1].clone() if it.ndim else it), "with the shape"),
    (lambda at: reshaped(at, lambda it: it.flatten()), "with the shape"),
    (lambda at: reshaped(at, lambda it: it if it.ndim else torch.zeros(2)), "holds step of"),
    (of_another_width, "it is of another model"),
]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_state_of_another_shape_is_refused_by_every_engine(
    saved: Path, stage: int, tiny_model_path: Path, tmp_path: Path
) -> None:
    """DeepSpeed would cut moments of another shape, or fill them up with zeros, to the shards that it holds."""
    for number, (change, _) in enumerate(OF_ANOTHER_SHAPE):
        shutil.copytree(saved, tmp_path / str(number))
        change(tmp_path / str(number))
        (tmp_path / str(number) / MANIFEST_FILE).unlink()
        write_manifest(tmp_path / str(number))

    def resume() -> list[str]:
        warnings.simplefilter("ignore")  # those of importing DeepSpeed
        messages = []
        for number in range(len(OF_ANOTHER_SHAPE)):
            options = {"parallel": {"zero_stage": stage}, "per_device_train_batch_size": 2}
            run = trainer(tiny_model_path, tmp_path / f"run-{number}", resume_allow_changes=True, **options)
            try:
                run.train(resume_from_checkpoint=tmp_path / str(number))
                messages.append("")
            except InputError as error:
                messages.append(str(error))
        return messages

    for messages in run_ranks(resume):
        for number, (message, (_, found)) in enumerate(zip(messages, OF_ANOTHER_SHAPE, strict=True)):
            assert found in message, number
            assert str(tmp_path / str(number)) in message
            assert len(message.splitlines()) == 1


def test_8_bit_moments_of_another_size_are_refused() -> None:
    """Blocks that lack their scale would be read beyond the end of the tensor."""
    weight = torch.nn.Parameter(torch.zeros(100, 64))
    state = {"step": torch.tensor(1), "state1": torch.zeros(100, 64, dtype=torch.uint8), "state2": torch.zeros(100, 64),
             "qmap1": torch.zeros(256), "qmap2": torch.zeros(256), "absmax1": torch.zeros(25), "absmax2": torch.zeros(25)}  # fmt: skip
    refuse_other_shapes("w", state, tuple(weight.shape))
    for key in state:
        with pytest.raises(ConfigError, match=f"holds {key} of w with the shape"):
            refuse_other_shapes("w", state | {key: torch.zeros(24)}, tuple(weight.shape))


def test_a_value_head_of_another_size_is_not_repeated(tmp_path: Path) -> None:
    head = ValueHead(8, train_trunk=False, device=torch.device("cpu"))
    for weight in (torch.ones(1, 1), torch.ones(8), torch.ones(1, 16)):
        save_file({"weight": weight}, tmp_path / HEAD_FILE)
        with pytest.raises(ModelError, match=r"instead of \(1, 8\): it is of another model"):
            head.load_checkpoint(tmp_path)


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
