"""Method oneshot on DeiT-Tiny: accuracy, wall time and peak memory of every case, each in a process of its own.

    python benchmarks/oneshot.py --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini

Cases are budgets (``params=4.0M``); ``ffn``, ``qk`` and ``vo``, that kind alone halved in every block; or ``plan``, the
widths that were chosen for 4.0 M, to see what other settings make of the same shape. Images of the training split
calibrate, no label is read; top-1 is on the validation split. Results are written after each case; one that is there
already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import timm

import gohsp
from gohsp import report
from gohsp.structure import SublayerWidths, widths_to_json
from shared import (
    RESULTS,
    changed,
    data_name,
    gohsp_command,
    params_of,
    parser,
    plan_of,
    read_results,
    say,
    write_results,
)

CASES = ("params=4.0M", "params=4.3M", "params=3.06M", "macs=-30%", "latency=-25%", "ffn", "qk", "vo")
HALVED = {"ffn": "units", "qk": "qk", "vo": "vo"}


def halved(model: str, field: str) -> tuple[dict[str, SublayerWidths], int]:
    """Widths with a field halved in every sub-layer that has it, and their parameters."""
    dense = timm.create_model(model)
    widths = changed(gohsp.describe(dense).widths, lambda name, count: count // 2 if name == field else count)
    return widths, params_of(dense, widths)


def key_of(case: str, seed: int, images: int, flags: list[str]) -> str:
    """A case's name in the results."""
    return " ".join([case, f"seed={seed}", f"images={images}", *flags])


def widths_of(options: argparse.Namespace, case: str) -> tuple[dict[str, SublayerWidths], int] | None:
    """The widths that a case gives, and their parameters; None where a budget decides."""
    if case == "plan":
        runs = json.loads(options.results.read_text())["runs"]
        chosen = runs.get(key_of("plan", 0, 1000, [])) or runs[key_of("params=4.0M", 0, 1000, [])]
        return plan_of(chosen["plan"]), chosen["params"]
    return halved(options.model, HALVED[case]) if case in HALVED else None


def run_case(options: argparse.Namespace, case: str, seed: int, images: int, folder: Path) -> dict[str, Any]:
    """Prune and score one case; of ``images`` a twentieth, at most, is held out."""
    out, plan = folder / "run", folder / "plan.json"
    held = min(50, -(-images // 20))
    arguments = ["prune", options.model, "--weights", str(options.weights), "--data", options.data, "--out", str(out)]
    arguments += ["--method", "oneshot", "--seed", str(seed)]
    arguments += ["--calibration.images", str(images - held), "--calibration.holdout", str(held)]
    budget = case
    if given := widths_of(options, case):
        widths, params = given
        plan.write_text(json.dumps(widths_to_json(widths)))
        budget = f"params={params}"
        arguments += ["--plan", str(plan)]
    _, seconds, memory = gohsp_command(*arguments, "--budget", budget, *options.flags)
    text, *_ = gohsp_command("evaluate", str(out), "--data", options.data, "--json")
    return {
        "seed": seed,
        "images": images,
        "flags": options.flags,
        "top1": json.loads(text)["top1"],
        "seconds": round(seconds, 1),
        "peak_memory_mib": round(memory),
        **of_report(report.read(out)),
    }


def of_report(found: report.Report) -> dict[str, Any]:
    """What is worth keeping of a one-shot run's report."""
    content = found.model_dump(mode="json")
    kept = {name: content[name] for name in ("fidelity", "heal", "budget", "speed", "timings", "machine", "versions")}
    return {
        "params": found.pruned.params,
        "macs": found.pruned.macs,
        **kept,
        "stages": found.plan.stages,
        "plan": content["plan"]["pruned"],
    }


def add_arguments(options: argparse.ArgumentParser) -> None:
    """What one-shot runs of a model on a data source take; ``peers.py`` takes them, too."""
    options.add_argument("--model", default="deit_tiny_patch16_224")
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--data", required=True)
    options.add_argument(
        "--flags", action="append", default=[], help="one more flag of gohsp prune, as --flags=--NAME=VALUE"
    )


def main() -> None:
    """Run the cases."""
    arguments = parser(__doc__)
    add_arguments(arguments)
    arguments.add_argument("--images", type=int, nargs="+", default=[1000])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--cases", nargs="+", default=list(CASES))
    arguments.add_argument("--results", type=Path, default=RESULTS / "oneshot_deit_tiny.json")
    options = arguments.parse_args()
    command = f"python benchmarks/oneshot.py --weights {options.weights.name} --data {data_name(options.data)}"
    results = read_results(options.results, {"command": command, "runs": {}})
    for case, seed, images in product(options.cases, options.seeds, options.images):
        key = key_of(case, seed, images, options.flags)
        if key in results["runs"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            record = run_case(options, case, seed, images, Path(folder))
        results["runs"][key] = record
        write_results(options.results, results)
        say(
            f"{key}: {record['params']:,} parameters, top-1 {record['top1']:.1f} %, "
            f"{record['seconds']:.0f} s, {record['peak_memory_mib']} MiB"
        )


if __name__ == "__main__":
    main()
