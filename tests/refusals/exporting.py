"""Models, files and settings that nothing can be exported with."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import gohsp
from gohsp.errors import (
    ConfigError,
    ExportError,
    MissingPackageError,
    NonFiniteError,
    StorageError,
    UnsupportedModelError,
)
from refusals import Refusal

TITLE = "Exporting"

Act = Callable[[Path], object]
CALLS = itertools.count(1)


class Module(nn.Module):
    """A module of somebody's, of one map and a function of its output."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda image: image) -> None:
        super().__init__()
        self.map, self.output = nn.Conv2d(3, 2, 1), output

    def forward(self, images: Tensor) -> Any:
        return self.output(self.map(images))


def exported(model: Any, name: str = "small.pt2", to: Any = "torch", **options: Any) -> Act:
    return lambda folder: gohsp.export(model, folder / name, to, **{"images": torch.zeros(3, 8, 8), **options})


def returning(output: Callable[[Tensor], Any]) -> Act:
    return exported(Module(output))


def where_something_lies(name: str) -> Act:
    def act(folder: Path) -> None:
        (folder / name).write_text("precious")
        exported(Module())(folder)

    return act


def below_a_file(folder: Path) -> None:
    (folder / "file").write_text("precious")
    exported(Module(), "file/small.pt2")(folder)


def without(package: str, name: str, to: str) -> Act:
    def act(folder: Path) -> None:
        with patch.dict(sys.modules, {package: None}):
            exported(Module(), name, to)(folder)

    return act


def broken() -> nn.Module:
    model = Module()
    with torch.no_grad():
        model.map.weight[0, 0] = torch.nan
    return model


CASES = (
    Refusal("a target that is none", exported(Module(), to="onxx"), ConfigError, "did you mean 'onnx'?"),
    Refusal("a file of another target's suffix", exported(Module(), "small.onnx"), StorageError, "ends in .pt2"),
    Refusal("an export without a name", exported(Module(), ""), StorageError, "name one that ends in .pt2"),
    Refusal("an export that exists", where_something_lies("small.pt2"), StorageError, "overwrite=True"),
    Refusal("an export beside a JSON that exists", where_something_lies("small.pt2.json"), StorageError, "exists"),
    Refusal("an export below a file", below_a_file, StorageError, "cannot be written"),
    Refusal(
        "an export whose packages are missing",
        without("openvino", "small.xml", "openvino"),
        MissingPackageError,
        "needs openvino: pip install 'gohsp[openvino]'",
    ),
    Refusal("a tolerance of 0", exported(Module(), tolerance=0), ConfigError, "tolerance must be"),
    Refusal("something else than a module", exported({}), UnsupportedModelError, "give a torch.nn.Module"),
    Refusal("an export of NaN", exported(broken()), NonFiniteError, "'map.weight' holds 1"),
    Refusal(
        "an export of bfloat16 to a runtime without it",
        exported(Module().bfloat16(), "small.onnx", "onnx"),
        ExportError,
        "ONNX Runtime on the CPU takes float32, float16",
    ),
    Refusal(
        "images that the model cannot compute",
        exported(Module(), images=torch.zeros(1, 8, 8)),
        UnsupportedModelError,
        "cannot compute images of [2, 1, 8, 8]",
    ),
    Refusal(
        "an output without a tensor",
        returning(lambda _: {"boxes": []}),
        UnsupportedModelError,
        "give output=, a function that",
    ),
    Refusal("an output that is no tensor", exported(Module(), output=len), UnsupportedModelError, "of type int"),
    Refusal("an output that mixes images", returning(Tensor.mean), UnsupportedModelError, "one entry an image first"),
    Refusal("a forward that fixes the batch", returning(lambda x: x.view(len(x), -1)), ExportError, "x.shape[0]"),
    Refusal("another model each time", returning(lambda x: x * next(CALLS)), ExportError, "computes something else"),
)
