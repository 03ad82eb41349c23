"""Test what reads and writes tensors in parts: what is no whole state, or cannot be written, is one error."""

import json
import struct
from pathlib import Path

import pytest
import torch

from rlqwen.distributed import Ranks
from rlqwen.distributed.state_parts import read_layout, read_parts, save_parts
from rlqwen.errors import ConfigError
from tests.forked_ranks import run_ranks


def test_parts_that_cannot_be_written_raise_the_error_of_the_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def in_a_rank() -> str:
        ranks = Ranks()
        with pytest.raises(OSError, match="file") as caught:
            save_parts(tmp_path / "file" / "parts", {"a": torch.ones(3)}, ranks.group)
        return type(caught.value).__name__

    assert run_ranks(in_a_rank) == ["NotADirectoryError"] * 2


def test_parts_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(2)}
    run_ranks(lambda: save_parts(tmp_path / "parts", tensors, Ranks().group))
    assert {name: tuple(value.shape) for name, value in read_layout(tmp_path / "parts").items()} == {
        "a": (3, 4), "b": (2,),
    }  # fmt: skip
    read = {name: torch.zeros_like(value) for name, value in tensors.items()}
    read_parts(tmp_path / "parts", read, None)
    assert all(read[name].equal(tensors[name]) for name in tensors)
    with pytest.raises(ConfigError, match="does not hold a whole optimizer's state"):
        read_parts(tmp_path / "parts", {"missing": torch.zeros(3)}, None)
    for path in (tmp_path / "parts").iterdir():
        header = {
            "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 9]},
            "__metadata__": {"DCP_SHARDING_INFO": "["},
        }
        text = json.dumps(header).encode()
        for content in (b"", b"x" * 99, struct.pack("<Q", len(text)) + text):
            path.write_bytes(content)
            for read_it in (read_layout, lambda folder: read_parts(folder, dict(read), None)):
                with pytest.raises(ConfigError, match="does not hold"):
                    read_it(tmp_path / "parts")
