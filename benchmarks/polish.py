"""What the settings of the polish are worth, on training images that neither the cut nor the polish has seen.

    gohsp prune deit_tiny_patch16_224 --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini \
        --data.train-split 'train[:80%]' --route oneshot --calibration-size 1000 --budget params=4.3M --out runs/cut80
    python benchmarks/polish.py runs/cut80 --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini

The last fifth of the training split is held out: defaults are chosen by it, and the validation split is not read.
Every line polishes the same cut on the images of the other four and their mirror images. A line that stands in the
results is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gohsp
from gohsp import data, models, training
from gohsp.core import fisher, sensitivity
from gohsp.polish import PolishSettings, polish

LINES = {"none": PolishSettings(epochs=0)} | {
    f"windows of {window}, epochs {epochs}, rate {rate:g}": PolishSettings(
        epochs=epochs, learning_rate=rate, window=window
    )
    for window, epochs, rate in (
        (1, 1, 1e-3),
        (1, 3, 5e-4),
        (1, 3, 1e-3),
        (1, 3, 2e-3),
        (1, 6, 5e-4),
        (1, 6, 1e-3),
        (2, 3, 5e-4),
        (3, 2, 5e-4),
    )
}
WEIGHED = 256
"""Images that token weights are measured on, as in a run."""


def outputs(model: nn.Module, batches: Sequence[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Log-probabilities of batches."""
    stages = models.stages(model)
    with torch.no_grad():
        return sensitivity.predictions(stages, [stages.embed(x) for x in batches], precision)


def compared(expected: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Divergence in nats, and the share of images with the same first prediction."""
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(expected, found, strict=True)])
    return {
        "kl": round(sensitivity.divergence(expected, found), 4),
        "agreement": round(100 * float(same.float().mean()), 2),
    }


def line(
    options: argparse.Namespace,
    dense: nn.Module,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
    settings: PolishSettings,
) -> dict[str, Any]:
    """Polish the cut once, all of its blocks, and compare it with the dense model."""
    precision = training.PRECISIONS[training.resolve_precision("auto", cpu=True)]
    cut = gohsp.load(options.cut).requires_grad_()
    began = time.perf_counter()
    if settings.epochs:
        few = calibration[: -(-WEIGHED // len(calibration[0]))]
        weights = fisher.token_weights(dense, models.describe(dense), few, attention=0.0, ffn=settings.fisher)
        teacher = models.stages(dense)
        with torch.no_grad():
            embedded = [teacher.embed(view) for x in calibration for view in (x, x.flip(-1))]
        with training.fast_attention(precision, dense, cut):
            # Falling numbers in the place of held-out images: every block is kept tuned.
            polish(
                models.stages(cut),
                teacher,
                embedded,
                [of_block.ffn for of_block in weights],
                settings,
                divergence=iter(range(99, 0, -1)).__next__,
                precision=precision,
                store=data.Spool,
            )
    seconds = time.perf_counter() - began
    expected, found = (outputs(model, held_out, precision) for model in (dense, cut))
    return compared(expected, found) | {"seconds": round(seconds, 1)}


def main() -> None:
    """Run all lines, writing the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cut", type=Path, help="folder of a one-shot cut that was calibrated on train[:80%%]")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/polish_deit_tiny.json"))
    options = parser.parse_args()
    dense = gohsp.open_model(options.model, weights=options.weights).eval()
    source, transform = data.DataSource(source=options.data), data.eval_transform(data.Preprocessing.from_model(dense))
    splits = [data.open_split(source, split) for split in ("train[:80%]", "train[80%:]")]
    calibration, held_out = (
        data.calibration_images(source, split, len(images), transform=transform, batch_size=64)
        for split, images in zip(("train[:80%]", "train[80%:]"), splits, strict=True)
    )
    held_out = [view for x in held_out for view in (x, x.flip(-1))]
    results = json.loads(options.results.read_text()) if options.results.exists() else {"lines": {}}
    results |= {
        "command": f"python benchmarks/polish.py {options.cut.name} --weights {options.weights.name} "
        f"--data hfds/{Path(options.data).name}",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "held_out": len(splits[1]),
        "budget": json.loads((options.cut / "report.json").read_text())["budget"]["requested"],
    }
    for name in options.lines:
        if name not in results["lines"]:
            results["lines"][name] = line(options, dense, calibration, held_out, LINES[name])
            options.results.write_text(json.dumps(results, indent=1) + "\n")
            sys.stdout.write(f"{name}: {results['lines'][name]}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
