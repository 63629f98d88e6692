"""The one-shot route on DeiT-Tiny: accuracy, wall time and peak memory of every case, each in a process of its own.

    python benchmarks/oneshot.py --weights deit_tiny_patch16_224.safetensors --data hfds/imagenet-1k-mini

Cases are budgets (``params=4.0M``); ``ffn``, ``qk`` and ``vo``, that kind alone halved in every block; or ``plan``, the
widths that were chosen for 4.0 M, to see what other settings make of the same shape. Images of the training split
calibrate, no label is read; top-1 is on the validation split. Results are written after each case; one that is there
already is not run again. Damage curves are shared by the budgets of a seed, as they are for a user.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import timm

import gohsp
from gohsp.structure import shapes_to_json

CASES = ("params=4.0M", "params=4.3M", "params=3.06M", "macs=-30%", "latency=-25%", "ffn", "qk", "vo")
MAIN = "import sys; from gohsp.cli import main; sys.exit(main())"


def halved(model: str, kind: str) -> tuple[list[dict[str, int]], int]:
    """Widths with ``kind`` halved in every block, and their parameters."""
    structure = gohsp.describe(timm.create_model(model))
    widths = shapes_to_json(structure.shapes)
    for block in widths:
        block[kind] //= 2
    shapes = [gohsp.BlockShape(**block) for block in widths]
    return widths, gohsp.model_cost(structure, shapes, "params")


def gohsp_command(*arguments: str) -> tuple[str, float, float]:
    """Run gohsp; returns its output, its wall time in seconds and its peak memory in MiB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", MAIN, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"gohsp {' '.join(arguments)} failed with status {os.waitstatus_to_exitcode(status)}")
    return output, time.perf_counter() - began, usage.ru_maxrss / 1024


def key_of(case: str, seed: int, images: int, flags: list[str]) -> str:
    """A case's name in the results."""
    return " ".join([case, f"seed={seed}", f"images={images}", *flags])


def widths_of(options: argparse.Namespace, case: str) -> tuple[list[dict[str, int]], int] | None:
    """The widths that a case gives, and their parameters; None where a budget decides."""
    if case == "plan":
        runs = json.loads(options.results.read_text())["runs"]
        chosen = runs.get(key_of("plan", 0, 1000, [])) or runs[key_of("params=4.0M", 0, 1000, [])]
        return chosen["plan"], chosen["params"]
    return halved(options.model, case) if case in ("ffn", "qk", "vo") else None


def run_case(options: argparse.Namespace, case: str, seed: int, images: int, folder: Path) -> dict[str, Any]:
    """Prune and score one case."""
    out, plan = folder / "run", folder / "plan.json"
    arguments = ["prune", options.model, "--weights", str(options.weights), "--data", options.data, "--out", str(out)]
    arguments += ["--route", "oneshot", "--calibration-size", str(images), "--seed", str(seed)]
    budget = case
    if given := widths_of(options, case):
        widths, params = given
        plan.write_text(json.dumps(widths))
        budget = f"params={params}"
        arguments += ["--plan", str(plan)]
    _, seconds, memory = gohsp_command(*arguments, "--budget", budget, *options.flags)
    text, *_ = gohsp_command("evaluate", str(out), "--data", options.data, "--json")
    report = json.loads((out / "report.json").read_text())
    return {
        "seed": seed,
        "images": images,
        "flags": options.flags,
        "top1": json.loads(text)["top1"],
        "params": report["pruned"]["params"],
        "macs": report["pruned"]["macs"],
        "fidelity": report["fidelity"],
        "polish": report.get("polish"),
        "allocation_images": report["recipe"]["data"]["allocation_images"],
        "seconds": round(seconds, 1),
        "peak_memory_mib": round(memory),
        "budget": report["budget"],
        "speed": report["speed"],
        "timings": report["timings"],
        "machine": report["machine"],
        "versions": report["versions"],
        "plan": report["plan"]["pruned"],
    }


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument(
        "--flags", action="append", default=[], help="one more flag of gohsp prune, as --flags=--NAME=VALUE"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/oneshot_deit_tiny.json"))
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    name = f"python benchmarks/oneshot.py --weights {options.weights.name} --data hfds/{Path(options.data).name}"
    results.setdefault("command", name)
    for case, seed, images in product(options.cases, options.seeds, options.images):
        key = key_of(case, seed, images, options.flags)
        if key in results.setdefault("runs", {}):
            continue
        with tempfile.TemporaryDirectory() as folder:
            record = run_case(options, case, seed, images, Path(folder))
        results["runs"][key] = record
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        sys.stdout.write(
            f"{key}: {record['params']:,} parameters, top-1 {record['top1']:.1f} %, "
            f"{record['seconds']:.0f} s, {record['peak_memory_mib']} MiB\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
