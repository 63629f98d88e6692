"""How far exported files are from their models, and how much faster a pruned DeiT-Tiny is as an ONNX file.

    pip install 'gohsp[onnx,openvino,transformers,bench]'
    GOHSP_ASSETS=../shared python benchmarks/export.py
    python benchmarks/export.py --pruned runs/mine      # a pruned DeiT-Tiny of your own

Files of all targets are compared with their models, all of them pruned: a DeiT-Tiny, three of other families, and a
module of somebody's own with a decoder. That is an asset, without which the script ends there; weights of the others
are random. Widths are narrower by a share that is the same everywhere, queries and keys narrower than values.

Time does not depend on what the weights are, so that they are random; widths are those that gohsp found for
``params=-40%`` (``benchmarks/imagewoof.py``), and all cut alike to half the MACs. Dense and pruned file take turns
(``gohsp.bench``). The speed-up is given with its quartiles beside the ratio of MACs; ``achieved`` is their quotient.
ONNX Runtime's own profile says where a pass spends its time. What stands in the results is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import gohsp
from gohsp.exporting import TARGETS, Target
from gohsp.structure import SublayerWidths, narrowed, width
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
ALIKE = "params=-20%"
"""Budget of the models of which files are compared, before queries and keys are narrowed further."""

KINDS = {
    "products": ("MatMul", "Gemm", "Conv"),
    "softmax and norms": ("Softmax", "LayerNormalization"),
    "activations": ("Gelu", "Erf"),
}
"""Parts of operators' names by what they count as in a profile; all others are ``rest``."""


# Differences


def drawn_model(model: nn.Module) -> nn.Module:
    """A model of random weights, those drawn, too, that its library begins with at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def dinov2() -> nn.Module:
    """A DINOv2 ViT-S/14 of transformers."""
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224))


def saliency() -> nn.Module:
    """The module with a decoder."""
    from saliency import opened  # which imports Torch-Pruning, as the rest of this script does not

    return opened()


COMPARED: dict[str, Callable[[], nn.Module]] = {
    "DeiT-Tiny (timm)": lambda: drawn_model(gohsp.open_model(MODEL)),
    "Swin-Tiny (timm)": lambda: drawn_model(gohsp.open_model("swin_tiny_patch4_window7_224")),
    "DINOv2 ViT-S/14 (transformers)": lambda: drawn_model(dinov2()),
    "ViT-B/16 (torchvision)": lambda: drawn_model(gohsp.open_model("torchvision:vit_b_16")),
    "ViT-S/14 with a decoder": saliency,
}


def uneven(network: gohsp.Network) -> dict[str, SublayerWidths]:
    """Widths that are cut alike, but for queries and keys, of which a quarter more goes where it may."""
    widths = even_widths(network, ALIKE)
    for sub in network.present:
        if "qk" in sub.prunable:
            widths[sub.name] = narrowed(widths[sub.name], "qk", 3 * width(widths[sub.name], "qk") // 4)
    return widths


def differences(make: Callable[[], nn.Module]) -> dict[str, float]:
    """How far the file of each target is from a pruned model, over the output's scale."""
    dense, images = make(), torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = resized(dense, uneven(gohsp.describe(dense, images)), images)
    found = {}
    for target, of in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            path, to = Path(folder) / f"small{of.SUFFIX}", cast(Target, target)
            done = gohsp.export(model, path, to, images=images)
            found[target] = done.check.relative
    return found


# Time


def contestants(dense: nn.Module, pruned: Path | None) -> dict[str, Callable[[], nn.Module]]:
    """What makes pruned models, by what they are called."""
    if pruned is not None:
        return {pruned.name: lambda: gohsp.load(pruned)}
    found = read_results(RESULTS / "imagewoof.json", {})["runs"][FOUND]["oneshot"]["plan"]
    plans = {
        f"widths of {FOUND.split()[0]}": lambda: plan_of(found),
        f"{EVEN}, all cut alike": lambda: even_widths(gohsp.describe(dense), EVEN),
    }
    return {name: lambda of=of: resized(dense, of(), example_of(dense)) for name, of in plans.items()}


def profiled(file: Path, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a pass by kind of operator, the mean over some passes."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.enable_profiling, settings.profile_file_prefix = True, str(file.with_suffix(""))
    running = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).numpy()
    for _ in range(options.profiled):
        running.run(None, {"images": images})
    spent = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in json.loads(Path(running.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            kind = next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "rest")
            spent[kind] += event["dur"] / 1e3 / options.profiled
    return {kind: round(ms, 2) for kind, ms in spent.items()}


def measured(dense: nn.Module, pruned: nn.Module, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A pair of models: their files, and all batch sizes."""
    exports = {name: gohsp.export(model, folder / f"{name}.onnx") for name, model in
               (("dense", dense), ("pruned", pruned))}  # fmt: skip
    macs = [gohsp.count_macs(gohsp.describe(model)) for model in (dense, pruned)]
    ratio = macs[0] / macs[1]
    found = gohsp.bench(
        {name: export.path for name, export in exports.items()},
        batch_sizes=options.batches,
        rounds=options.rounds,
        device="cpu",
    )
    cases = [
        {
            "batch": small.batch_size,
            "ms": [round(timing.milliseconds.median, 2) for timing in (big, small)],
            "speedup": round(small.speedup.median, 3),
            "quartiles": [round(small.speedup.low, 3), round(small.speedup.high, 3)],
            "achieved": round(small.speedup.median / ratio, 3),
            "profile": [profiled(export.path, small.batch_size, options) for export in exports.values()],
        }
        for big, small in zip(*(one.timings for one in found.models), strict=True)
    ]
    return {
        "params": [export.params for export in exports.values()],
        "macs": macs,
        "ratio": round(ratio, 3),
        "bytes": [export.path.stat().st_size for export in exports.values()],
        "difference": [export.check.relative for export in exports.values()],
        "cases": cases,
    }


def main() -> None:
    """Measure every pair and compare every file, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--pruned", type=Path, help="folder of a pruned model, in place of the two")
    arguments.add_argument("--compared", nargs="*", choices=COMPARED, default=list(COMPARED))
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    arguments.add_argument("--rounds", type=int, default=51)
    arguments.add_argument("--profiled", type=int, default=5, help="passes that a profile is the mean of")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--results", type=Path, default=RESULTS / "export.json")
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dense = gohsp.open_model(MODEL)
    command = shlex.join(["python", "benchmarks/export.py", *sys.argv[1:]])
    head = {
        "command": command,
        "machine": machine(),
        "versions": versions("onnx", "onnxscript", "onnxruntime", "openvino"),
    }
    results = read_results(options.results, {**head, "runs": {}, "differences": {}})
    if results["command"] != command:
        sys.exit(f"{options.results} is of another command; give another file with --results")
    for name, pruned in contestants(dense, options.pruned).items():
        if name not in results["runs"]:
            with tempfile.TemporaryDirectory() as folder:
                results["runs"][name] = measured(dense, pruned(), Path(folder), options)
            write_results(options.results, results)
        say(f"{name}: {results['runs'][name]}")
    for name in options.compared:
        if name not in results["differences"]:
            results["differences"][name] = differences(COMPARED[name])
            write_results(options.results, results)
        say(f"{name}: {results['differences'][name]}")


if __name__ == "__main__":
    main()
