"""Exports of tiny random models: what a file computes and its JSON says, and what is left where an export fails."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from zoo import made

import gohsp
from gohsp import cli, exporting, files
from gohsp.data import DataSource
from gohsp.errors import ExportError, StorageError
from gohsp.exporting.int8 import Int8, calibration_of, quantised
from gohsp.models import example_image
from gohsp.models.attention import PrunedAttention
from gohsp.models.modules import Constant
from gohsp.structure import Attention, AttentionKept, keep_everything, keep_none

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": (), "openvino": ("openvino",)}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}


def pruned(model: nn.Module) -> nn.Module:
    """A model whose first attention has unequal widths, and without the last sub-layer that may go."""
    network = gohsp.describe(model)
    first = next(sub for sub in network.present if isinstance(sub, Attention))
    kept = keep_everything(network)
    kept[first.name] = AttentionKept(heads=(0,), qk=((0, 2, 3),), vo=((0, 2, 3, 5, 7),))
    kept |= {sub.name: keep_none(sub.widths) for sub in [sub for sub in network.present if sub.removable][-1:]}
    return gohsp.compact(model, kept, example_image(model)).model


def run_by_onnxruntime(path: Path, images: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def run_by_torch(path: Path, images: Tensor) -> Tensor:
    return torch.export.load(path).module()(images)


def run_by_openvino(path: Path, images: Tensor) -> Tensor:
    openvino: Any = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model({"images": images.numpy()})["output"])


RUN: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "onnx": run_by_onnxruntime,
    "torch": run_by_torch,
    "openvino": run_by_openvino,
}


@pytest.fixture(scope="module")
def small() -> nn.Module:
    pytest.importorskip("transformers")
    model: Any = pruned(made("transformers vit"))
    names = ("a", "b", "c", "d", "e")
    model.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "label_names": names}
    assert {PrunedAttention, Constant} <= {type(module) for module in model.modules()}
    return model


@pytest.mark.parametrize("to", exporting.TARGETS)
def test_a_file_computes_what_the_model_does(to: Any, small: nn.Module, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CI", "true")  # in which OpenVINO tells nobody that it is used
    for package in NEEDS[to]:
        pytest.importorskip(package)
    path = tmp_path / "new" / f"small{SUFFIXES[to]}"
    done = gohsp.export(small.train(), path, to)
    assert small.training
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(RUN[to](path, images), small.eval()(images).logits, rtol=1e-4, atol=1e-4)
    assert 0 <= done.check.relative < 1e-5
    assert done.check.batches == (1, 3)
    assert (done.input.shape, done.output.shape) == (("batch", 3, 32, 32), ("batch", 5))
    assert (done.returned, done.part) == ("ImageClassifierOutput", "logits")
    assert done.class_names == ("a", "b", "c", "d", "e")
    assert done.preprocessing is not None
    assert done.preprocessing["mean"] == (0.5, 0.4, 0.3)
    assert {"gohsp", "torch", "transformers", *NEEDS[to]} == done.versions.keys()
    written = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert written == json.loads(json.dumps({**dataclasses.asdict(done), "path": path.name}))
    beside = {".bin"} if to == "openvino" else set()
    assert {file.suffix for file in path.parent.iterdir()} == {path.suffix, ".json", *beside}
    assert b"modeling_vit.py" not in path.read_bytes()  # nor any other file of the machine that exports


def swin() -> nn.Module:
    """Two blocks, the second of which shifts its windows."""
    sizes = {"img_size": 16, "patch_size": 4, "window_size": 2, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=5).eval()


# `len` of a tensor once made a number of their batches.
@pytest.mark.parametrize("make", [swin, lambda: made("torchvision vit")], ids=["swin", "torchvision"])
def test_the_batch_stays_open_in_other_families(make: Callable[[], nn.Module], tmp_path: Path):
    model = pruned(make())
    done = gohsp.export(model, tmp_path / "small.pt2", "torch")
    images = torch.randn(5, *done.input.shape[1:])
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(run_by_torch(done.path, images), expected, rtol=1e-4, atol=1e-5)


def test_a_pruned_model_compiles_without_graph_breaks(small: nn.Module):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images: Tensor = torch.randn(2, 3, 32, 32)
    compiled: Any = torch.compile(small.eval(), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, small(images).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


class Pair(nn.Module):
    """A module of somebody's, which returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.dropout, self.noise = nn.Conv2d(3, 2, 1), nn.Dropout(0.5), 0.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        image = self.dropout(self.map(images))
        return image.mean((2, 3)), image + self.noise * torch.rand_like(image)


def test_of_a_pair_what_counts_is_exported(tmp_path: Path):
    done = gohsp.export(Pair(), tmp_path / "a.pt2", "torch", images=torch.zeros(3, 8, 6))
    assert (done.returned, done.part, done.output.shape) == ("tuple", "0", ("batch", 2))
    done = gohsp.export(Pair(), tmp_path / "b.pt2", "torch", images=torch.zeros(3, 8, 6), output=lambda pair: pair[1])
    assert (done.part, done.output.shape) == ("1", ("batch", 2, 8, 6))
    assert (done.class_names, done.preprocessing) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_stays_in_it(dtype: torch.dtype, tmp_path: Path):
    done = gohsp.export(Pair().to(dtype), tmp_path / "half.pt2", "torch", images=torch.zeros(3, 8, 8))
    images = torch.zeros(1, 3, 8, 8, dtype=dtype)
    assert run_by_torch(done.path, images).dtype == dtype
    assert f"torch.{done.input.dtype}" == f"torch.{done.output.dtype}" == str(dtype)


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path):
    path, model = tmp_path / "new.pt2", Pair()
    options: Any = {"to": "torch", "images": torch.zeros(3, 8, 8), "output": lambda pair: pair[1]}
    model.noise = 1.0
    with pytest.raises(ExportError, match="the file computes something else: it differs from the model by"):
        gohsp.export(model, path, **options)
    assert not list(tmp_path.iterdir())
    model.noise = 0.0
    gohsp.export(model, path, **options)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(StorageError, match=r"new\.pt2' exists"):
        gohsp.export(model, path, **options)
    model.noise = 1.0
    with pytest.raises(ExportError):
        gohsp.export(model, path, **options, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    gohsp.export(model, path, **options, overwrite=True, tolerance=10.0)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} != before


def test_overwriting_removes_what_lay_beside_the_earlier_file(tmp_path: Path):
    """As of weights of more than 2 GB, which ONNX keeps apart."""
    names = ["a.onnx", "a.onnx.data", "a.onnx.json"]
    for name in names:
        (tmp_path / name).write_text("old")
    with files.together(tmp_path, names) as folder:
        (folder / "a.onnx").write_text("new")
        (folder / "a.onnx.json").write_text("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.onnx": "new", "a.onnx.json": "new"}


def test_the_command_line_exports(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gohsp.save(model, tmp_path / "model")
    path = tmp_path / "small.pt2"
    path.write_text("precious")
    arguments = ["export", str(tmp_path / "model"), "--to", "torch", "--out", str(path)]
    assert cli.main(arguments) == 1
    assert "exists; name another file, or replace it with overwrite=True (--overwrite)" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert cli.main([*arguments, "--overwrite"]) == 0
    told = capsys.readouterr().out
    assert "images: float32 [batch, 3, 16, 16]\noutput: float32 [batch, 5]\n" in told
    assert f"wrote {path} and {path}.json" in told
    assert run_by_torch(path, torch.zeros(2, 3, 16, 16)).shape == (2, 5)


# Int8


def test_an_int8_file_is_told_how_far_it_is_from_the_model(small: nn.Module, tmp_path: Path):
    for package in NEEDS["onnx"]:
        pytest.importorskip(package)
    onnx: Any = pytest.importorskip("onnx")
    images = [{"pixel_values": image} for image in torch.randn(50, 3, 32, 32)]
    done = gohsp.export(small, tmp_path / "small.onnx", int8=images)
    assert done.int8 is not None
    assert {file.name for file in tmp_path.iterdir()} == {"small.onnx", "small.onnx.json"}
    held_out = torch.stack([image["pixel_values"] for image in images[40:]])
    with torch.no_grad():
        ours, theirs = small.eval()(held_out).logits, run_by_onnxruntime(done.path, held_out)
    assert (done.int8.images, done.int8.held_out) == (40, 10)
    assert done.int8.difference == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-3)
    assert 1e-4 < done.int8.difference < 0.2
    assert done.int8.agreement == pytest.approx(100 * float((theirs.argmax(1) == ours.argmax(1)).float().mean()))
    assert done.int8.size == done.path.stat().st_size
    assert done.check.relative < 1e-5
    written = json.loads((tmp_path / "small.onnx.json").read_text())
    assert written["int8"] == dataclasses.asdict(done.int8)
    assert (written["params"], written["macs"]) == exporting.told_costs(done.path)
    graph = onnx.load(done.path).graph
    made_by = {node.output[0]: node for node in graph.node}
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    makers = [made_by[node.input[1]] for node in products if node.input[1] in made_by]
    weights = [node.input for node in makers if node.op_type == "DequantizeLinear"]  # and no product of attention
    by_channel = [sizes[weight[1]] for weight in weights if weight[0] in sizes]
    # Patches, queries with keys and values, readouts, both maps of FFNs but the last, which is gone, and the head.
    network = gohsp.describe(small)
    maps = 1 + sum(4 if isinstance(sub, Attention) else 2 for sub in network.present) + 1
    assert len(weights) == len(by_channel) == maps
    assert all(math.prod(scale) > 1 for scale in by_channel)


def test_an_int8_file_of_images_alone_is_compared_on_the_one(tmp_path: Path):
    model, calibration = nn.Conv2d(3, 3, 1), calibration_of([torch.ones(3, 4, 4)])
    assert [len(part[0]) for part in (calibration.images, calibration.holdout)] == [1, 1]
    target: Any = SimpleNamespace(
        RUNTIME="a runtime",
        INT8="by hand",
        quantise=lambda source, path, batches: path.write_bytes(b"x" * len(batches)),
        opened=lambda path: lambda images: 1.25 * model(images),
    )
    (tmp_path / "float").write_bytes(b"four")
    done = quantised(model, tmp_path / "float", tmp_path / "int8", target, calibration)
    difference = pytest.approx(0.25)
    assert done == Int8(
        how="by hand", images=1, held_out=1, difference=difference, agreement=None, size=1, float_size=4
    )


def test_the_command_line_gives_images_for_int8(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gohsp.save(model, tmp_path / "model")
    images, drawn, given = [torch.zeros(2, 3, 16, 16)], [], {}

    def export(_model: nn.Module, _path: str, _to: str, **options: Any) -> None:
        given.update(options)
        raise ExportError("enough")

    def draw(source: DataSource, split: str, count: int, *, seed: int, **_: Any) -> list[Tensor]:
        drawn.append((source.source, split, count, seed))
        return images

    monkeypatch.setattr(exporting, "export", export)
    monkeypatch.setattr("gohsp.data.calibration_images", draw)
    arguments = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "small.onnx")]
    assert cli.main([*arguments, "--int8", "photographs", "--split", "all", "--seed", "3"]) == 1
    assert drawn == [("photographs", "all", exporting.INT8_IMAGES, 3)]
    assert given["int8"] is images
