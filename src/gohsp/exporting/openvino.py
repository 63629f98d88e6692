"""OpenVINO's intermediate representation, by its own converter: ``.xml``, and ``.bin`` beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gohsp.exporting.traced import INPUT, OUTPUT

SUFFIX, BESIDE, NEEDS = ".xml", (".bin",), ("openvino",)
TYPES = (torch.float32, torch.float16)  # its arrays are NumPy's, which has no bfloat16
FUSED = True
RUNTIME = "OpenVINO on the CPU, computing in float32"
INT8 = None


def converted(program: ExportedProgram) -> Any:
    """The program in OpenVINO's operators, for images of its size."""
    import openvino

    model = openvino.convert_model(program)
    (images,), (output,) = model.inputs, model.outputs
    size = next(node.meta["val"] for node in program.graph.nodes if node.name == INPUT).shape[1:]
    model.reshape({images: [-1, *size]})
    images.set_names({INPUT})
    output.set_names({OUTPUT})
    return model


def how(_model: Any) -> str:
    """What made the file."""
    return "torch.export, openvino.convert_model, weights not compressed"


def save(model: Any, path: Path) -> None:
    """Write both files."""
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)  # else a float32 model comes back as another one


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The files, read and ready to run, in float32 where a processor would be let compute in less."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled([images.numpy()])[OUTPUT])
