"""Time that a latency table predicts for the plans that ``oneshot.py`` found, beside the time they take.

    python benchmarks/latency_prediction.py deit_tiny_patch16_224

Weights do not matter to the clock. Predicted and measured time are each taken over the dense model's of the same kind,
so that what drifts between the table and the comparison cancels.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

import gohsp
from gohsp import latency, models, opening
from gohsp.core.allocation import WidthSettings
from gohsp.structure import BlockShape


def main() -> None:
    """Measure one table and all plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plans", type=Path, default=Path("benchmarks/results/oneshot_deit_tiny.json"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/latency_prediction.json"))
    options = parser.parse_args()
    model = opening.open_model(options.model).eval()
    structure, settings = models.describe(model), latency.LatencySettings(batch_size=options.batch_size)
    images = torch.randn(1, 3, *model.patch_embed.img_size)  # pyrefly: ignore[missing-attribute,not-iterable]
    table = latency.measure_table(model, structure, images, WidthSettings(), settings)
    dense = gohsp.model_cost(structure, structure.shapes, table)
    runs = json.loads(options.plans.read_text())["runs"]
    name = Path(options.model).name
    results = {
        "command": f"python benchmarks/latency_prediction.py {name} --batch-size {options.batch_size}",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plans": {},
    }
    for key, run in runs.items():
        if run["images"] != 1000 or run["seed"] or run["flags"]:
            continue
        shapes = [BlockShape(**block) for block in run["plan"]]
        predicted = gohsp.model_cost(structure, shapes, table) / dense
        before, after = latency.compare([model, models.resized(model, shapes)], images, settings)
        case = key.split(" ")[0]
        results["plans"][case] = {"predicted": round(predicted, 3), "measured": round(after / before, 3)}
        sys.stdout.write(f"{case}: {predicted:.3f} predicted, {after / before:.3f} measured\n")
        options.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
