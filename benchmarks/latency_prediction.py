"""Time that measured sub-layer times predict for the plans that ``oneshot.py`` found, beside the time they take.

    python benchmarks/latency_prediction.py deit_tiny_patch16_224

Weights do not matter to the clock. Predicted and measured time are each taken over the dense model's of the same kind,
so that what drifts between the two measurements cancels.
"""

from __future__ import annotations

import json
from pathlib import Path

import gohsp
from gohsp import Config, latency, structure
from gohsp.config import LatencySettings
from shared import RESULTS, example_of, machine, parser, plan_of, resized, say, versions, write_results


def main() -> None:
    """Measure sub-layers once, and all plans."""
    arguments = parser(__doc__)
    arguments.add_argument("model")
    arguments.add_argument("--plans", type=Path, default=RESULTS / "oneshot_deit_tiny.json")
    arguments.add_argument("--most", type=int, help="plans to measure at most")
    arguments.add_argument("--batch-size", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=LatencySettings().rounds)
    arguments.add_argument("--results", type=Path, default=RESULTS / "latency_prediction.json")
    options = arguments.parse_args()
    settings = LatencySettings(batch_size=options.batch_size, rounds=options.rounds)
    model = gohsp.open_model(options.model)
    network, images = gohsp.describe(model), example_of(model)
    times = latency.measure_times(model, network, images, Config().widths, settings)
    dense = structure.cost_of(network, network.widths, times)
    results = {
        "command": f"python benchmarks/latency_prediction.py {Path(options.model).name} "
        f"--batch-size {options.batch_size}",
        "machine": machine(),
        "versions": versions(),
        "plans": {},
    }
    runs = json.loads(options.plans.read_text())["runs"]
    wanted = [key for key, run in runs.items() if run["images"] == 1000 and not run["seed"] and not run["flags"]]
    for key in wanted[: options.most]:
        widths = plan_of(runs[key]["plan"])
        predicted = structure.cost_of(network, widths, times) / dense
        before, after = latency.compare([model, resized(model, widths, images)], images, settings)
        case = key.split(" ")[0]
        results["plans"][case] = {"predicted": round(predicted, 3), "measured": round(after / before, 3)}
        say(f"{case}: {predicted:.3f} predicted, {after / before:.3f} measured")
        write_results(options.results, results)


if __name__ == "__main__":
    main()
