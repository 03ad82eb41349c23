"""Read a weight from a safetensors file that stays open, also after the file is deleted or replaced."""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlqwen.errors import SaveError
from rlqwen.models.hub import StoredTensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Names of dtypes in safetensors files."""


class OpenFile:
    """Hold a file open, so that it stays readable after it is deleted or replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._stamp = self._state()

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, start: int, count: int) -> bytearray:
        """Return `count` bytes from `start`; SaveError if the file has been changed since it was opened."""
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            read = os.preadv(self._descriptor, [view[done:]], start + done)
            if not read:
                break
            done += read
        if done < count or self._state() != self._stamp:
            raise SaveError(
                f"{self.path}, which holds weights that are copied unchanged to every folder that is written, has been "
                "overwritten since the model was loaded: restore the original file, and resume from the last checkpoint"
            )
        return data


@dataclass(frozen=True)
class StoredWeight:
    """Locate a weight in an open file."""

    file: OpenFile
    entry: StoredTensor

    def read(self) -> Tensor:
        start, end = self.entry.span
        if start == end:
            return torch.empty(self.entry.shape, dtype=DTYPES[self.entry.dtype])
        data = self.file.read(start, end - start)
        return torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[self.entry.dtype]).reshape(self.entry.shape)
