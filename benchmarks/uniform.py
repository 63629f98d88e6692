"""What it costs that all blocks are alike: DeiT-Tiny at one budget, with widths that differ and with uniform ones.

    GOHSP_ASSETS=../shared python benchmarks/uniform.py

Method ``oneshot`` on images of the training split of imagenet-1k-mini, of which no label is read; top-1 is on the
validation split. The uniform model is scored as timm alone makes and loads it. A row that stands in the results is not
run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

import gohsp
from gohsp import Config, structure
from shared import (
    RESULTS,
    asset,
    drawn,
    machine,
    parser,
    read_results,
    say,
    scored,
    transform_of,
    versions,
    write_results,
)

NAME = "deit_tiny_patch16_224"
ARMS = {"free": False, "uniform": True}


def row(options: argparse.Namespace, dense: nn.Module, source: str, *, uniform: bool) -> dict[str, Any]:
    """Prune and score once; a twentieth of the images is held out."""
    config, held = Config(seed=options.seed), -(-options.images // 20)
    calibration = replace(config.calibration, images=options.images - held, holdout=held)
    images = drawn(source, options.images, transform_of(dense), seed=options.seed)
    began = time.perf_counter()
    config = replace(config, calibration=calibration)
    pruned = gohsp.prune(dense, images, options.budget, uniform=uniform, config=config)
    seconds, model = time.perf_counter() - began, pruned.model
    if uniform:
        with tempfile.TemporaryDirectory() as folder:
            gohsp.save_plain(model, folder)
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    metrics, network = scored(model, source, count=options.scored), gohsp.describe(model)
    return {
        "top1": metrics.top1,
        "n": metrics.n,
        "params": structure.count_params(network),
        "macs": structure.count_macs(network),
        "fidelity": pruned.fidelity.distance,
        "plan": structure.widths_to_json(pruned.widths),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run both, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--budget", default="params=4.0M")
    arguments.add_argument("--images", type=int, default=1000, help="to calibrate on")
    arguments.add_argument("--scored", type=int, help="validation images to score on; all, unless given")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--results", type=Path, default=RESULTS / "uniform.json")
    options = arguments.parse_args()
    dense = gohsp.open_model(NAME, weights=asset(f"models/{NAME}.safetensors"))
    source = f"hfds/{asset('data/imagenet-1k-mini')}"
    header = {
        "command": f"python benchmarks/uniform.py --budget {options.budget} --images {options.images} "
        f"--seed {options.seed}",
        "machine": machine(),
        "versions": versions(),
    }
    results = read_results(options.results, {**header, "runs": {}})
    if {name: results[name] for name in header} != header:
        sys.exit(f"{options.results} is of another machine, version or setting; give another file with --results")
    for name, uniform in ARMS.items():
        if name not in results["runs"]:
            found = results["runs"][name] = row(options, dense, source, uniform=uniform)
            write_results(options.results, results)
            say(f"{name}: {found['params']:,} parameters, top-1 {found['top1']:.1f} %, {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
