"""What the settings of healing are worth, on training images that neither the cut nor the healing has seen.

    gohsp prune deit_tiny_patch16_224 --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini \
        --data.train-split 'train[:80%]' --method oneshot --budget params=4.3M --out runs/cut80
    python benchmarks/heal.py runs/cut80 --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini

The last fifth of the training split is held out: defaults are chosen by it, and the validation split is not read.
Every line heals the same cut on the images of the other four and their mirror images. ``distance`` is that of the whole
healing, to its last window; ``kept`` says how many windows a run would keep, and ``agreement`` is of those. A line that
stands in the results is not run again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gohsp
from gohsp import Config, data, report
from shared import (
    RESULTS,
    data_name,
    drawn,
    machine,
    parser,
    read_results,
    say,
    transform_of,
    versions,
    write_results,
)

LINES = {"none": (0, 0.0)} | {
    f"epochs {epochs}, rate {rate:g}": (epochs, rate)
    for epochs, rate in ((1, 5e-4), (1, 1e-3), (2, 5e-4), (3, 5e-4), (3, 1e-3), (6, 5e-4))
}
"""Epochs and rate by name."""


@torch.no_grad()
def logits(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """What a model makes of images ``[N, classes]``."""
    return torch.cat([model.eval()(batch) for batch in images])


def compared(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Divergence in nats, and the share of images with the same first prediction."""
    distance = gohsp.classification().distance(expected, found).mean()
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return {"distance": round(float(distance), 4), "agreement": round(100 * float(agreement), 2)}


def line(
    cut: nn.Module,
    dense: nn.Module,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor],
    epochs: int,
    rate: float,
) -> dict[str, Any]:
    """Heal a copy of the cut once, and compare it with the dense model."""
    began, model, told = time.perf_counter(), copy.deepcopy(cut), {}
    if epochs:
        counts = {"images": sum(map(len, images)), "holdout": sum(map(len, held_out))}
        config = Config()
        config = replace(
            config,
            calibration=replace(config.calibration, **counts),
            heal=replace(config.heal, epochs=epochs, learning_rate=rate),
        )
        healing = gohsp.heal(model, dense, [*images, *held_out], config=config)
        told = {"distance": round(healing.curve[-1].distance, 4), "kept": healing.kept}
    seconds = round(time.perf_counter() - began, 1)
    return compared(logits(dense, held_out), logits(model, held_out)) | told | {"seconds": seconds}


def main() -> None:
    """Run all lines, writing the results after each."""
    arguments = parser(__doc__)
    arguments.add_argument("cut", type=Path, help="folder of a one-shot cut that was calibrated on train[:80%%]")
    arguments.add_argument("--model", default="deit_tiny_patch16_224")
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--data", required=True)
    arguments.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    arguments.add_argument("--most", type=int, help="images of each part to take at most")
    arguments.add_argument("--results", type=Path, default=RESULTS / "heal_deit_tiny.json")
    options = arguments.parse_args()
    cut, dense = gohsp.load(options.cut), gohsp.open_model(options.model, weights=options.weights)
    images, held_out = (part(options, dense, split) for split in ("train[:80%]", "train[80%:]"))
    results = read_results(options.results, {"lines": {}})
    results |= {
        "command": f"python benchmarks/heal.py {options.cut.name} --weights {options.weights.name} "
        f"--data {data_name(options.data)}",
        "machine": machine(),
        "versions": versions(),
        "held_out": sum(map(len, held_out)),
        "budget": report.read(options.cut).budget.requested,
    }
    for name in options.lines:
        if name not in results["lines"]:
            results["lines"][name] = line(cut, dense, images, held_out, *LINES[name])
            write_results(options.results, results)
            say(f"{name}: {results['lines'][name]}")


def part(options: argparse.Namespace, dense: nn.Module, split: str) -> list[Tensor]:
    """All images of a part of the training split, or the first that are drawn."""
    size = len(data.open_split(data.DataSource(source=options.data), split))
    return drawn(options.data, min(size, options.most or size), transform_of(dense), split=split)


if __name__ == "__main__":
    main()
