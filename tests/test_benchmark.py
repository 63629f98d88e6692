"""Models side by side: what is measured, how it is summed up, and what is refused before anything is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import gohsp
from gohsp import benchmark, cli, exporting
from gohsp.benchmark import peak_memory
from gohsp.errors import UnsupportedModelError
from refusals.bench import file as onnx_file

CPU = torch.device("cpu")


def turns_of(*times: Sequence[float]) -> Callable[..., list[list[float]]]:
    """A clock that shows these times, by contestant and round, and counts nothing."""
    return lambda _calls, _device, _rounds: [list(mine) for mine in times]


def test_ratios_are_taken_round_by_round_and_the_middle_half_is_shown(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    # The machine slows down tenfold in the last two rounds, which is no news of the models.
    monkeypatch.setattr(benchmark, "turns", turns_of([10, 12, 14, 100, 120], [5, 6, 7, 50, 30]))
    found = gohsp.bench({"dense": model, "small": model}, batch_sizes=[4])
    (dense,), (small,) = (one.timings for one in found.models)
    assert (dense.milliseconds.median, dense.milliseconds.low, dense.milliseconds.high) == (14, 12, 100)
    assert (dense.speedup.low, dense.speedup.high) == (1, 1)
    assert (small.speedup.median, small.speedup.low, small.speedup.high) == (2, 2, 2)
    assert (small.images_per_second, small.batch_size) == (pytest.approx(4000 / 7), 4)
    assert found.threads == torch.get_num_threads()


class Spy(nn.Module):
    """Two convolutions, which gohsp cannot describe; notes what it is called with."""

    seen: list[Any]

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 2)
        self.seen = []

    def __deepcopy__(self, _memo: Any) -> Spy:
        copied = Spy()
        copied.seen = self.seen
        return copied

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((tuple(images.shape), images.dtype, self.conv.weight.dtype, self.training))
        return self.conv(images)


def test_whatever_can_be_called_is_timed_on_the_same_batches(model: nn.Module):
    called: list[Tensor] = []
    spy = Spy()
    given = {"vit": model.train(), "spy": spy, "function": called.append}
    found = gohsp.bench(given, torch.rand(2, 3, 16, 16), batch_sizes=[1, 5], dtype="bfloat16", rounds=2)
    shapes = {(1, 3, 16, 16), (5, 3, 16, 16)}
    assert {tuple(batch.shape) for batch in called} == shapes
    assert {batch.dtype for batch in called} == {torch.bfloat16}
    assert set(spy.seen) >= {(shape, torch.bfloat16, torch.bfloat16, False) for shape in shapes}
    assert (spy.training, spy.conv.weight.dtype, model.training) == (True, torch.float32, True)
    vit, other, function = found.models
    network = gohsp.describe(model)
    assert (vit.params, vit.macs) == (gohsp.count_params(network), gohsp.count_macs(network))
    assert (other.params, other.macs) == (52, None)
    assert (function.params, function.macs, function.timings[0].memory) == (None, None, None)
    assert [timing.batch_size for timing in vit.timings] == [1, 5]
    assert (found.image, found.dtype, found.device, found.rounds) == ((3, 16, 16), "bfloat16", "cpu", 2)


def test_peak_memory_is_what_is_held_at_once_and_no_more(capfd: pytest.CaptureFixture[str]):
    def call() -> None:
        first = torch.ones(1000, 100)
        second = first + 1
        del first
        second.mul(2)  # of which two, not three, are there at once

    assert peak_memory(call, CPU) == pytest.approx(800_000, rel=0.01)
    assert peak_memory(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""


def test_memory_is_that_of_weights_batch_and_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "peak_memory", lambda _call, _device: 1000)
    found = gohsp.bench({"a": nn.Conv2d(3, 4, 2)}, torch.rand(1, 3, 8, 8), batch_sizes=[2], rounds=1)
    assert found.models[0].timings[0].memory == 4 * (52 + 2 * 3 * 8 * 8) + 1000


def test_every_model_is_compiled_for_every_batch_size(monkeypatch: pytest.MonkeyPatch):
    compiled: list[object] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    models = {str(layers): nn.Sequential(*[nn.Conv2d(3, 3, 1)] * layers) for layers in (1, 2)}
    with torch._dynamo.config.patch(recompile_limit=1):
        found = gohsp.bench(models, torch.rand(1, 3, 4, 4), batch_sizes=[1, 2], compile=True, rounds=1)
    assert len(compiled) == 4
    assert found.compiled


def test_a_batch_that_one_model_cannot_compute_ends_it_before_anything_is_timed(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    def untimed(*_: Any) -> Any:
        raise AssertionError("timed")

    def picky(images: Tensor) -> None:
        if len(images) > 1:
            raise ValueError("one at a time")

    monkeypatch.setattr(benchmark, "turns", untimed)
    with pytest.raises(UnsupportedModelError, match=r"'picky' cannot compute a batch \[3, 3, 16, 16\].*one at a time"):
        gohsp.bench({"vit": model, "picky": picky}, batch_sizes=[1, 3])


# ONNX files


def test_an_onnx_file_is_measured_beside_a_module(model: nn.Module, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    file = onnx_file(tmp_path, shape=("batch", 3, 16, 16))
    found = gohsp.bench({"vit": model, "file": file}, batch_sizes=[2], rounds=2, device="cpu")
    assert found.image == (3, 16, 16)
    vit, small = found.models
    assert (small.params, small.macs) == (None, None)
    assert vit.timings[0].memory is not None
    if Path("/proc/self/clear_refs").exists():
        assert small.timings[0].memory is not None
        assert 0 < small.timings[0].memory < 2**27
    else:
        assert small.timings[0].memory is None
    told = {"path": file.name, "params": 12, "macs": 34}
    file.with_name(f"{file.name}.json").write_text(json.dumps(told))
    assert exporting.told_costs(file) == (12, 34)
    file.with_name(f"{file.name}.json").write_text(json.dumps({**told, "path": "another.onnx"}))
    assert exporting.told_costs(file) == (None, None)


def test_a_file_alone_tells_the_size_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(benchmark, "_memory_of_file", lambda _file, batch: batch.numel())
    monkeypatch.chdir(tmp_path)
    onnx_file(tmp_path, "a.onnx", shape=("batch", 1, 4, 6))
    arguments = ["bench", "a.onnx", "a.onnx", "--batch-sizes", "3", "--rounds", "1", "--device", "cpu", "--json"]
    with monkeypatch.context() as context:
        said: list[str] = []
        context.setattr(cli, "_say", said.append)
        assert cli.main(arguments) == 0
    found = json.loads(said[0])
    assert (found["image"], [one["name"] for one in found["models"]]) == ([1, 4, 6], ["a.onnx", "a.onnx (2)"])
    assert found["models"][0]["timings"][0]["memory"] == 3 * 24


def test_a_weight_that_is_made_of_others_takes_what_they_take():
    """As torchao's quantised ones are."""
    weight = TwoTensor(torch.zeros(4, 10), torch.zeros(4, 10))
    assert benchmark.bytes_of(weight) == 2 * 4 * 10 * 4
    assert benchmark.bytes_of(torch.zeros(4, 10, dtype=torch.int8)) == 40


# The command line


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> str:
    gohsp.save(model, tmp_path / "[tiny]")
    return str(tmp_path / "[tiny]")


def test_the_command_line_prints_one_line_of_json(folder: str, capsys: pytest.CaptureFixture[str]):
    assert (
        cli.main(["bench", folder, folder, "--batch-sizes", "1", "2", "--rounds", "2", "--device", "cpu", "--json"])
        == 0
    )
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert [one["name"] for one in found["models"]] == [folder, f"{folder} (2)"]
    assert [timing["batch_size"] for timing in found["models"][1]["timings"]] == [1, 2]
    assert found["threads"] == torch.get_num_threads()


def test_the_command_line_prints_a_table(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(benchmark, "turns", turns_of([40, 50, 60], [20, 25, 30]))
    monkeypatch.chdir(Path(folder).parent)  # so that the table's lines hold its whole name
    assert cli.main(["bench", *2 * [Path(folder).name], "--batch-sizes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "[tiny]" in printed.replace("\n", "")
    rows = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines() if "│ 2 " in line]
    assert [row[3:6] for row in rows] == [["50.0 ± 5.0", "40.0", "1"], ["25.0 ± 2.5", "80.0", "2.00 ± 0.00"]]


def test_names_of_the_hub_are_fetched_and_others_are_drawn(monkeypatch: pytest.MonkeyPatch, model: nn.Module):
    opened: dict[str, bool] = {}

    def open_model(name: str, *, pretrained: bool) -> nn.Module:
        opened[name] = pretrained
        return model

    monkeypatch.setattr("gohsp.opening.open_model", open_model)
    names = ["vit_tiny_patch16_224", "torchvision:vit_b_16", "me/vit", "hf-hub:me/vit"]
    assert cli.main(["bench", *names, "--rounds", "1", "--batch-sizes", "1"]) == 0
    assert opened == dict(zip(names, [False, False, True, True], strict=True))
