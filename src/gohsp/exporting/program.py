"""A program of ``torch.export`` (``.pt2``): PyTorch runs it, without the code that the model was made by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

SUFFIX, BESIDE, NEEDS = ".pt2", (), ()
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FUSED = True
RUNTIME = "PyTorch on the CPU"
INT8 = None


def converted(program: ExportedProgram) -> ExportedProgram:
    """The program itself."""
    return program


def how(_program: ExportedProgram) -> str:
    """What made the file."""
    return "torch.export"


def save(program: ExportedProgram, path: Path) -> None:
    """Write the file."""
    torch.export.save(program, path)


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The file, read and ready to run."""
    return torch.export.load(path).module()
