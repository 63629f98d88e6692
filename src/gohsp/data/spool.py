"""Tensors kept on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gohsp import files


class Spool(MutableSequence[Tensor]):
    """A list of tensors that lies on disk, so that memory does not grow with the number of images.

    Args:
        folder: Where; None for the system's temporary folder. The files go with the spool.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=".gohsp-", dir=folder))
        weakref.finalize(self, _remove, self._folder)
        self._files: list[Path] = []
        self._written = 0

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return load_file(self._files[index])["x"]

    def __setitem__(self, index: Any, value: Any) -> None:
        fresh = self._write(value)
        self._files[index].unlink()
        self._files[index] = fresh

    def __delitem__(self, index: Any) -> None:
        self._files.pop(index).unlink()

    def insert(self, index: int, value: Tensor) -> None:
        """Write a tensor and put it before ``index``."""
        self._files.insert(index, self._write(value))

    def _write(self, value: Tensor) -> Path:
        # A new name each time: a tensor read before may still be mapped from the old file.
        path = self._folder / f"{self._written}.safetensors"
        self._written += 1
        with files.storing(path):
            files.write_tensors(path, {"x": value})
        return path


def _remove(folder: Path) -> None:
    """Remove a folder, even if that is interrupted once."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
