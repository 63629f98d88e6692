"""Dense, pruned, int8, and pruned and int8: accuracy, bytes and time of a DeiT-Tiny on a CPU, in one run.

    pip install 'gohsp[hf,onnx,quant]'
    GOHSP_ASSETS=../shared python benchmarks/int8.py
    GOHSP_ASSETS=../shared python benchmarks/int8.py --pruned runs/mine     # a pruned DeiT-Tiny of your own

The model is pruned to the widths that ``benchmarks/oneshot.py`` found for ``params=4.0M``, cut and repaired on images
without labels, nothing trained. Both models run

- by PyTorch, in float32 and as torchao quantises their linear maps: weights alone, or with activations as they come
  (``dynamic``); as they are, and compiled;
- by ONNX Runtime, in float32 and in int8, calibrated on images of the same draw (``gohsp.export(..., int8=images)``).

Top-1 is on the validation images of imagenet-1k-mini and imagenet-1k-broad, bytes are those of the tensors or the file.
``gohsp.bench`` times what one runtime runs in turns; speed-ups are over the dense model in float32 there. A row that
stands in the results is not made again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import gohsp
from gohsp.benchmark import Benchmark, bytes_of
from gohsp.exporting.onnx import open_file
from shared import (
    RESULTS,
    asset,
    drawn,
    machine,
    parser,
    plan_of,
    read_results,
    say,
    sets_of_both,
    transform_of,
    versions,
    write_results,
)

MODEL, BUDGET = "deit_tiny_patch16_224", "params=4.0M"
PLAN = f"{BUDGET} seed=0 images=1000"
TORCHAO: dict[str, Callable[[], Any]] = {
    "int8 weights": Int8WeightOnlyConfig,
    "int8 dynamic": Int8DynamicActivationInt8WeightConfig,
}
COMPILED = ("float32", "int8 dynamic")
"""What is also timed compiled, by default; that takes up to a minute for each model and batch size."""

Sets = Mapping[str, Iterable[tuple[Tensor, Tensor]]]


def pruned(dense: nn.Module, images: list[Tensor], folder: Path) -> nn.Module:
    """The model in a folder; where there is none it is made first."""
    if not folder.exists():
        plan = read_results(RESULTS / "oneshot_deit_tiny.json", {})["runs"][PLAN]["plan"]
        gohsp.save(gohsp.prune(dense, images, BUDGET, widths=plan_of(plan)).model, folder)
    return gohsp.load(folder)


def by_torch(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Both models, as they are and quantised."""
    for name, model in models.items():
        yield f"{name}, float32", model
        for how, config in TORCHAO.items():
            quantised = copy.deepcopy(model)
            quantize_(quantised, config())
            yield f"{name}, {how}", quantised


def by_onnx(models: Mapping[str, nn.Module], images: list[Tensor], folder: Path) -> Iterator[tuple[str, Path]]:
    """Both models' files."""
    for name, model in models.items():
        for how, given in (("float32", None), ("int8", images)):
            file = folder / f"{name}_{how}.onnx"
            done = gohsp.export(model, file, int8=given)
            say(f"{file.name}: {done.check.relative:.0e}{f', {done.int8}' if done.int8 else ''}")
            yield f"{name}, {how}", file


@torch.no_grad()
def top1(run: Callable[[Tensor], Any], sets: Sets) -> dict[str, float]:
    """Percent of each set's images, and of both together, whose label is the first prediction, in float32."""
    right: dict[str, tuple[int, int]] = {}
    for name, batches in sets.items():
        hits = total = 0
        for images, labels in batches:
            hits += int((torch.as_tensor(run(images)).argmax(-1) == labels).sum())
            total += len(labels)
        right[name] = hits, total
    right["both"] = tuple(map(sum, zip(*right.values(), strict=True)))  # type: ignore[assignment]
    return {name: round(100 * hits / total, 2) for name, (hits, total) in right.items()}


def row(model: nn.Module | Path, sets: Sets) -> dict[str, Any]:
    """What a model scores and takes."""
    if isinstance(model, Path):
        file = open_file(model, torch.get_num_threads())
        return {"bytes": model.stat().st_size, "top1": top1(lambda images: file(images)[0], sets)}
    size = sum(map(bytes_of, [*model.parameters(), *model.buffers()]))
    return {"bytes": size, "top1": top1(model.eval(), sets)}


def times_of(found: Benchmark) -> dict[str, Any]:
    """Milliseconds, speed-ups and memory by model and batch size."""
    return {one.name: [dataclasses.asdict(timing) for timing in one.timings] for one in found.models}


def measure(results: dict[str, Any], options: argparse.Namespace, made: Mapping[str, Mapping[str, Any]]) -> None:
    """Score and time what is not in the results yet, writing them after each row."""
    loaded: dict[str, list[Any]] = {}
    for runtime, models in made.items():
        for name, model in models.items():
            key = f"{runtime}: {name}"
            if key not in results["rows"]:
                loaded = loaded or in_memory(options)
                results["rows"][key] = row(model, loaded)
                write_results(options.results, results)
            say(f"{key}: {results['rows'][key]}")
    loaded.clear()
    compiled = {name: model for name, model in made["torch"].items() if name.endswith(tuple(options.compiled))}
    for key, models in {**made, "torch.compile": compiled}.items():
        if models and key not in results["times"]:
            found = gohsp.bench(
                models,
                batch_sizes=options.batches,
                rounds=options.rounds,
                device="cpu",
                compile=key == "torch.compile",
            )
            results["times"][key] = times_of(found)
            write_results(options.results, results)
        for name, timings in results["times"].get(key, {}).items():
            told = ", ".join(
                f"batch {t['batch_size']} {t['milliseconds']['median']:.1f} ms, {t['speedup']['median']:.2f} times as "
                "fast"
                for t in timings
            )
            say(f"{key}: {name}: {told}")


def in_memory(options: argparse.Namespace) -> dict[str, list[Any]]:
    """The validation images, or the first of them, read once."""
    found = {}
    for name, batches in sets_of_both(gohsp.open_model(MODEL)).items():
        total, found[name] = 0, []
        for images, labels in batches:
            if options.count is not None and total >= options.count:
                break
            found[name].append((images, labels))
            total += len(labels)
    return found


def main() -> None:
    """Make all models, and measure what is missing."""
    arguments = parser(__doc__)
    arguments.add_argument("--pruned", type=Path, default=Path("runs/int8/pruned"), help="made where it is missing")
    arguments.add_argument("--images", type=int, default=500, help="to prune and to calibrate on")
    arguments.add_argument("--count", type=int, help="score on about so many images of each set; all by default")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("--compiled", nargs="*", choices=["float32", *TORCHAO], default=COMPILED)
    arguments.add_argument("--results", type=Path, default=RESULTS / "int8.json")
    options = arguments.parse_args()
    dense = gohsp.open_model(MODEL, weights=asset(f"models/{MODEL}.safetensors"))
    images = drawn(f"hfds/{asset('data/imagenet-1k-mini')}", options.images, transform_of(dense))
    models = {"dense": dense, "pruned": pruned(dense, images, options.pruned)}
    command = shlex.join(["python", "benchmarks/int8.py", *sys.argv[1:]])
    head = {"command": command, "machine": machine(), "versions": versions("torchao", "onnxruntime")}
    results = read_results(options.results, {**head, "rows": {}, "times": {}})
    if results["command"] != command:
        sys.exit(f"{options.results} is of another command; give another file with --results")
    networks = {name: gohsp.describe(model) for name, model in models.items()}
    results["models"] = {
        name: {"params": gohsp.count_params(network), "macs": gohsp.count_macs(network)}
        for name, network in networks.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        onnx = dict(by_onnx(models, images, Path(folder)))
        measure(results, options, {"torch": dict(by_torch(models)), "ONNX Runtime": onnx})


if __name__ == "__main__":
    main()
