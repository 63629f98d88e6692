"""ONNX, by PyTorch's exporter, and run by ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gohsp.exporting.traced import INPUT, OUTPUT

SUFFIX, BESIDE, NEEDS = ".onnx", (".onnx.data",), ("onnx", "onnxscript", "onnxruntime")
TYPES = (torch.float32, torch.float16)  # ONNX Runtime has no bfloat16 convolution on a CPU
FUSED = False  # its exporter takes attention apart
RUNTIME = "ONNX Runtime on the CPU"


def converted(program: ExportedProgram) -> Any:
    """The program in ONNX's operators."""
    with _quiet():
        return torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hear no warnings of onnxscript, which warns of every operator that it leaves as it is."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def how(model: Any) -> str:
    """What made the file."""
    return f"torch.export, torch.onnx.export(dynamo=True), opset {model.model.opset_imports['']}"


def save(model: Any, path: Path) -> None:
    """Write the file; weights of more than ONNX's 2 GB go into one beside it."""
    model.save(path)


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The file, read and ready to run."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
