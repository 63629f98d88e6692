"""How much faster a pruned DeiT-Tiny is than the dense one as ONNX files, under ONNX Runtime.

    pip install 'gohsp[onnx]'
    python benchmarks/export.py
    python benchmarks/export.py --pruned runs/mine      # a pruned DeiT-Tiny of your own

Time does not depend on what the weights are, so that they are random; widths are those that gohsp found for
``params=-40%`` (``benchmarks/imagewoof.py``), and all cut alike to half the MACs. Dense and pruned file take turns. The
speed-up is the median over the pairs of turns, given with its quartiles beside the ratio of MACs; ``achieved`` is their
quotient. ONNX Runtime's own profile says where a pass spends its time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gohsp
from shared import (
    RESULTS,
    even_widths,
    example_of,
    machine,
    parser,
    plan_of,
    read_results,
    resized,
    say,
    versions,
    write_results,
)

MODEL, EVEN, FOUND = "deit_tiny_patch16_224", "macs=-50%", "params=-40% seed=0"
KINDS = {
    "products": ("MatMul", "Gemm", "Conv"),
    "softmax and norms": ("Softmax", "LayerNormalization"),
    "activations": ("Gelu", "Erf"),
}
"""Parts of operators' names by what they count as in a profile; all others are ``rest``."""


def contestants(dense: nn.Module, pruned: Path | None) -> dict[str, nn.Module]:
    """Pruned models by what they are called."""
    if pruned is not None:
        return {pruned.name: gohsp.load(pruned)}
    found = read_results(RESULTS / "imagewoof.json", {})["runs"][FOUND]["oneshot"]["plan"]
    plans = {
        f"widths of {FOUND.split()[0]}": plan_of(found),
        f"{EVEN}, all cut alike": even_widths(gohsp.describe(dense), EVEN),
    }
    return {name: resized(dense, widths, example_of(dense)) for name, widths in plans.items()}


def session(file: Path, threads: int, profile: Path | None = None) -> Any:
    """ONNX Runtime on the CPU with a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def seconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def profiled(file: Path, images: Any, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a pass by kind of operator, the mean over some passes."""
    running = session(file, options.threads, file.with_suffix(""))
    for _ in range(options.profiled):
        running.run(None, {"images": images})
    spent = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in json.loads(Path(running.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            kind = next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "rest")
            spent[kind] += event["dur"] / 1e3 / options.profiled
    return {kind: round(ms, 2) for kind, ms in spent.items()}


def case(dense: Path, pruned: Path, ratio: float, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both files at one batch size."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).numpy()
    calls = [
        lambda s=s: s.run(None, {"images": images})
        for s in (session(file, options.threads) for file in (dense, pruned))
    ]
    pairs = [tuple(map(seconds, calls)) for _ in range(options.rounds + 2)][2:]  # after two to warm up
    low, speedup, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return {
        "batch": batch,
        "ms": [round(1e3 * statistics.median(times), 2) for times in zip(*pairs, strict=True)],
        "speedup": round(speedup, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "achieved": round(speedup / ratio, 3),
        "profile": [profiled(file, images, options) for file in (dense, pruned)],
    }


def measured(dense: nn.Module, pruned: nn.Module, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A pair of models: their files, and all batch sizes."""
    exports = [
        gohsp.export(model, folder / f"{name}.onnx", overwrite=True)
        for name, model in (("dense", dense), ("pruned", pruned))
    ]
    macs = [gohsp.count_macs(gohsp.describe(model)) for model in (dense, pruned)]
    ratio = macs[0] / macs[1]
    return {
        "params": [export.params for export in exports],
        "macs": macs,
        "ratio": round(ratio, 3),
        "bytes": [export.path.stat().st_size for export in exports],
        "difference": [export.check.relative for export in exports],
        "cases": [case(exports[0].path, exports[1].path, ratio, batch, options) for batch in options.batches],
    }


def main() -> None:
    """Measure every pair, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--pruned", type=Path, help="folder of a pruned model, in place of the two")
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    arguments.add_argument("--rounds", type=int, default=50, help="pairs of turns; two at least")
    arguments.add_argument("--profiled", type=int, default=5, help="passes that a profile is the mean of")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments.add_argument("--results", type=Path, default=RESULTS / "export.json")
    options = arguments.parse_args()
    torch.manual_seed(0)
    dense = gohsp.open_model(MODEL)
    results: dict[str, Any] = {
        "command": " ".join(["python benchmarks/export.py", *sys.argv[1:]]),
        "machine": machine() | {"threads": options.threads},
        "versions": versions("onnx", "onnxscript", "onnxruntime"),
        "runs": {},
    }
    for name, pruned in contestants(dense, options.pruned).items():
        with tempfile.TemporaryDirectory() as folder:
            results["runs"][name] = measured(dense, pruned, Path(folder), options)
        write_results(options.results, results)
        say(f"{name}: {results['runs'][name]}")


if __name__ == "__main__":
    main()
