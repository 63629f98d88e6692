"""Models that cannot be measured side by side."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch

import gohsp
from gohsp.errors import CheckpointError, ConfigError, GohspError, UnsupportedModelError
from refusals import Refusal

TITLE = "Benchmarks"

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}


def tiny(**arguments: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **arguments})


def benched(small: Any = None, **options: Any) -> Callable[[Path], object]:
    return lambda _: gohsp.bench({"dense": tiny(), "small": tiny() if small is None else small}, **options)


def file(folder: Path, name: str = "small.onnx", kind: int = 1, shape: Sequence[Any] = ("batch", 1, 8, 8)) -> Path:
    """An ONNX file that gives back what it takes, of ONNX's type of that number (1: float32, 7: int64)."""
    onnx: Any = importlib.import_module("onnx")
    port = [onnx.helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "graph", port[:1], port[1:])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), folder / name)
    return folder / name


def with_file(write: Callable[[Path], Path], **options: Any) -> Callable[[Path], object]:
    return lambda folder: benched(write(folder), **options)(folder)


def damaged(folder: Path) -> Path:
    (folder / "small.onnx").write_text("no graph")
    return folder / "small.onnx"


def with_file_on_a_gpu(folder: Path) -> None:
    with patch("gohsp.benchmark.pick_device", lambda _: torch.device("cuda")):
        with_file(file)(folder)


def without_gpu(folder: Path) -> None:
    with patch("torch.cuda.is_available", lambda: False):
        benched(device="cuda")(folder)


def uncompilable(folder: Path) -> None:
    def fail(model: Any, **_: Any) -> Any:
        def call(_images: torch.Tensor) -> object:
            raise NotImplementedError("no C++ compiler")

        return call

    with patch("torch.compile", fail):
        benched(compile=True)(folder)


def refusal(given: str, act: Callable[[Path], object], error: type[GohspError], says: str) -> Refusal:
    return Refusal(f"{given}, to be measured", act, error, says)


CASES = (
    refusal("models without names", lambda _: gohsp.bench([tiny()]), ConfigError, "such as {'dense': model"),  # type: ignore[arg-type]
    refusal("no model", lambda _: gohsp.bench({}), ConfigError, "at least one model"),
    refusal("models for images of different sizes", benched(tiny(img_size=16)), UnsupportedModelError,
            "'dense' [1, 8, 8], 'small' [1, 16, 16]"),
    refusal("models for images of different channels", benched(tiny(in_chans=3)), UnsupportedModelError, "[3, 8, 8]"),
    refusal("a number", benched(3), UnsupportedModelError, "'small' cannot be called"),
    refusal("functions alone, without images", lambda _: gohsp.bench({"f": print}), ConfigError, "give images"),
    refusal("models on images that are no batch", benched(images=torch.ones(1, 8, 8)), UnsupportedModelError,
            "[B, C, H, W]"),
    refusal("models on images that one does not take", benched(images=torch.ones(1, 1, 16, 16)), UnsupportedModelError,
            "'dense' cannot compute"),
    refusal("models on an unknown device", benched(device="gpu"), ConfigError, "device 'gpu' is unknown"),
    refusal("models on a GPU that is not there", without_gpu, ConfigError, "give 'auto' or 'cpu'"),
    refusal("models in an unknown data type", benched(dtype="bf16"), ConfigError, "did you mean 'bfloat16'?"),
    refusal("models at no batch size", benched(batch_sizes=[]), ConfigError, "batch_sizes must be a list"),
    refusal("models at a batch size of 0", benched(batch_sizes=[0, 1]), ConfigError, "batch_sizes must be a whole"),
    refusal("models in no round", benched(rounds=0), ConfigError, "rounds must be"),
    refusal("a model that cannot be compiled", uncompilable, UnsupportedModelError, "'dense' cannot be compiled"),
    refusal("a function, compiled", benched(len, compile=True), UnsupportedModelError, "leave compile out"),
    refusal("no ONNX file", with_file(lambda folder: folder / "none.onnx"), CheckpointError, "is no ONNX file"),
    refusal("a damaged ONNX file", with_file(damaged), CheckpointError, "cannot open"),
    refusal("an ONNX file that takes words", with_file(lambda folder: file(folder, kind=7)), UnsupportedModelError,
            "takes tensor(int64)"),
    refusal("an ONNX file for other images", with_file(lambda folder: file(folder, shape=["b", 3, 4, 4])),
            UnsupportedModelError, "'small' [3, 4, 4]"),
    refusal("an ONNX file in another data type", with_file(file, dtype="bfloat16"), UnsupportedModelError,
            "takes images of float32"),
    refusal("an ONNX file on a GPU", with_file_on_a_gpu, UnsupportedModelError, "--device cpu"),
    refusal("an ONNX file, compiled", with_file(file, compile=True), UnsupportedModelError, "leave compile out"),
)  # fmt: skip
