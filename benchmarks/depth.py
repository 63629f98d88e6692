"""What it is worth to a latency budget that whole sub-layers may go: DeiT-Tiny at batch 1.

    GOHSP_ASSETS=../shared python benchmarks/depth.py

Every budget is met with and without ``widths.depth``, by method ``oneshot`` on images of the training split of
imagenet-1k-mini, of which no label is read. A row tells top-1 on the validation split, which sub-layers went, and the
time that sub-layers' measured times predict beside the time that the model takes, both over the dense model's. Clocks
are read on the machine that runs the script: let it be quiet. A row that stands in the results is not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

import gohsp
from gohsp import Config, latency, structure
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

BUDGETS = ("latency=-25%", "latency=-50%")
DEPTH = {"with depth": True, "without depth": False}


def config_of(options: argparse.Namespace, *, depth: bool) -> Config:
    """The settings of a row; a twentieth of the images is held out."""
    config, held = Config(seed=options.seed), -(-options.images // 20)
    return replace(
        config,
        widths=replace(config.widths, depth=depth),
        calibration=replace(config.calibration, images=options.images - held, holdout=held),
        latency=replace(config.latency, batch_size=1, rounds=options.rounds),
    )


def row(options: argparse.Namespace, dense: nn.Module, source: str, budget: str, config: Config) -> dict[str, Any]:
    """Prune, time and score once."""
    images = drawn(source, options.images, transform_of(dense), seed=options.seed)
    began = time.perf_counter()
    pruned = gohsp.prune(dense, images, budget, config=config)
    seconds, network = time.perf_counter() - began, pruned.network
    example = images[0][:1]
    times = latency.measure_times(dense, network, example, config.widths, config.latency)
    predicted = [structure.cost_of(network, widths, times) for widths in (network.widths, pruned.widths)]
    measured = latency.compare([dense, pruned.model], example, config.latency)
    metrics = scored(pruned.model, source, count=options.scored)
    return {
        "top1": metrics.top1,
        "n": metrics.n,
        "params": structure.count_params(gohsp.describe(pruned.model)),
        "predicted": round(predicted[1] / predicted[0], 3),
        "measured": round(measured[1] / measured[0], 3),
        "dense_ms": round(measured[0], 3),
        "pruned_ms": round(measured[1], 3),
        "fidelity": pruned.fidelity.distance,
        "absent": [name for name, of in pruned.widths.items() if structure.is_absent(of)],
        "plan": structure.widths_to_json(pruned.widths),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run all rows, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("--budgets", nargs="+", default=BUDGETS)
    arguments.add_argument("--images", type=int, default=1000, help="to calibrate on")
    arguments.add_argument("--scored", type=int, help="validation images to score on; all, unless given")
    arguments.add_argument("--rounds", type=int, default=Config().latency.rounds)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--results", type=Path, default=RESULTS / "depth.json")
    options = arguments.parse_args()
    weights = asset("models/deit_tiny_patch16_224.safetensors")
    source = f"hfds/{asset('data/imagenet-1k-mini')}"
    dense = gohsp.open_model("deit_tiny_patch16_224", weights=weights)
    header = {
        "command": f"python benchmarks/depth.py --images {options.images} --rounds {options.rounds} "
        f"--seed {options.seed}",
        "machine": machine(),
        "versions": versions(),
    }
    results = read_results(options.results, {**header, "runs": {}})
    if {name: results[name] for name in header} != header:
        sys.exit(f"{options.results} is of another machine, version or setting; give another file with --results")
    for budget, (name, depth) in product(options.budgets, DEPTH.items()):
        key = f"{budget} {name}"
        if key in results["runs"]:
            continue
        found = row(options, dense, source, budget, config_of(options, depth=depth))
        results["runs"][key] = found
        write_results(options.results, results)
        say(f"{key}: top-1 {found['top1']:.1f} %, {found['predicted']} predicted, {found['measured']} measured")


if __name__ == "__main__":
    main()
