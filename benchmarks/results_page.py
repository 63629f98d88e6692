"""Make ``docs/results.md``, its plots and the README's table from what the benchmarks wrote.

    python benchmarks/results_page.py            # rewrite them
    python benchmarks/results_page.py --check    # fail if a text is not what would be written

A benchmark that has no results yet has no section.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import timm
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gohsp
from gohsp.report import Plan, Report, plots
from gohsp.structure import keep_all
from shared import plan_of

RESULTS, DOCS, README = Path("benchmarks/results"), Path("docs"), Path("README.md")
BEGIN, END = "<!-- benchmarks/results_page.py: begin -->", "<!-- benchmarks/results_page.py: end -->"
DENSE_TINY = (5_717_416, 1_253_683_200, 71.7)
"""DeiT-Tiny: parameters, MACs (``gohsp.count_macs``), top-1 on the 1,000 validation images (``gohsp evaluate``)."""

STYLE = {"font.size": 9, "svg.hashsalt": "gohsp", "axes.spines.top": False, "axes.spines.right": False}
OURS = "#2563eb"
BUDGETS = ("params=5.0M", "params=4.3M", "params=4.0M", "params=3.5M", "params=3.06M", "params=2.5M", "macs=-30%")
HALVES = {"qk": "q/k halved in every block", "vo": "v/o halved", "ffn": "FFNs halved"}
HEALED = (" --heal.epochs=2", " --polish.epochs=2")
"""Flags that heal a cut, the second as gohsp 0.1 had it; so below."""

STAGES = {
    "": "",
    " --widths.stages=1": ", one stage",
    " --widths.stages=2": ", two stages",
    " --allocation-stages=1": ", one stage",
    " --allocation-stages=2": ", two stages",
}

Json = Mapping[str, Any]


def read(name: str) -> Json | None:
    """A result file, or None where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def either(record: Json, name: str, before: str) -> Any:
    """An entry under its name, or under the one that gohsp 0.1 gave it."""
    return record[name] if name in record else record.get(before)


def distance_of(run: Json) -> float:
    """Divergence on held-out images, in nats."""
    return either(run["fidelity"], "distance", "kl")


def admm_epochs(recipe: Json) -> int:
    """Epochs of ADMM in the settings of either edition."""
    stage = recipe.get("admm_stage") or recipe["admm"]
    return stage["epochs"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def share(value: float, whole: float) -> str:
    """A change in percent."""
    return f"{100 * (value / whole - 1):+.1f} %"


def oneshot_row(run: Json) -> list[str]:
    """Size, accuracy, time and memory of a one-shot run."""
    return [
        f"{run['params']:,} ({share(run['params'], DENSE_TINY[0])})",
        f"{run['macs'] / 1e9:.3f} G ({share(run['macs'], DENSE_TINY[1])})",
        f"{run['top1']:.1f} %",
        f"{distance_of(run):.2f}",
        f"{run['seconds']:.0f} s",
        f"{run['peak_memory_mib'] / 1024:.1f} GiB",
        curves_on(run),
    ]


def curves_on(run: Json) -> str:
    """Images that damage curves were measured on, where any were; their number was a setting of gohsp 0.1."""
    fidelity = run["fidelity"]
    if "predicted_distance" in fidelity:
        return "128" if fidelity["predicted_distance"] is not None else ""
    return str(run.get("allocation_images", 256)) if fidelity["predicted_kl"] is not None else ""


def name_of(key: str) -> str:
    """How the table calls a one-shot run."""
    case = key.split(" ")[0]
    return HALVES.get(case, f"`{case}`") + next(
        (name for flag, name in STAGES.items() if flag and key.endswith(flag)), ""
    )


def drawn(runs: Json, case: str) -> str:
    """Top-1 of a budget by seed, of the runs that measured curves on as many images as that of seed 0."""
    name = f"{case} seed={{}} images=1000"
    like = runs[name.format(0)].get("allocation_images")
    found = {s: run for s in range(3) if (run := runs.get(name.format(s))) and run.get("allocation_images") == like}
    mean = sum(run["top1"] for run in found.values()) / len(found)
    return ", ".join(f"{run['top1']:.1f} (seed {s})" for s, run in found.items()) + f", mean {mean:.1f} %"


def oneshot() -> str | None:
    """Budgets, halves, seeds and calibration sizes of the one-shot route."""
    if (found := read("oneshot_deit_tiny")) is None:
        return None
    runs = found["runs"]
    cases = [f"{case} seed=0 images=1000" for case in (*BUDGETS, "latency=-25%", *HALVES)]
    rows = [
        [name_of(key), *oneshot_row(runs[key])]
        for case in cases
        for key in (case + flag for flag in STAGES)
        if key in runs
    ]
    header = ["", "parameters", "MACs", "top-1", "divergence", "time", "peak memory", "curves on"]
    dense = ["dense", f"{DENSE_TINY[0]:,}", f"{DENSE_TINY[1] / 1e9:.3f} G", f"{DENSE_TINY[2]:.1f} %", *[""] * 4]
    sizes = calibration_sizes(runs)
    counts = sorted({n for line in sizes.values() for n in line})
    text = [
        "## One-shot, DeiT-Tiny",
        f"    {found['command']}",
        "1,000 training images without labels calibrate (950, 50 are held out), nothing is trained; top-1 on 1,000 "
        "validation images, standard error 1.5. "
        "*Divergence*: of the predictions on the held-out images, in nats. *One*, *two stages*: "
        "`--allocation-stages`, where it is not as by default. *Curves on*: calibration images that they were measured "
        "on. Seed 0, two CPU cores. Rows with curves on 128 images are of one machine with AVX-512 bf16; their times "
        "include the curves where they were not there yet (4.3 and 4.0 M; the second stage of 3.06 M). All others, the "
        "accuracies by calibration images, too, are of earlier code on one with units for bf16 matrices (AMX), where "
        "times are upper bounds, since it was shared for most rows.",
        table(header, [dense, *rows]),
        "Top-1 with other draws of images, seed by seed: "
        + "; ".join(f"`{case}` {drawn(runs, case)}" for case in ("params=4.3M", "params=4.0M"))
        + ". By calibration images, at given widths of 4.0 M:",
        table(
            ["images", *map(str, counts)],
            [[label, *(f"{line[n]:.1f} %" if n in line else "" for n in counts)] for label, line in sizes.items()],
        ),
        "![Top-1 against the number of calibration images](oneshot_images.svg)",
    ]
    if speed := latency_text(runs):
        text.append(speed)
    if ablation := read("oneshot_ablation_deit_tiny"):
        lines = [[name, f"{line['top1']:.1f} %"] for name, line in ablation["lines"].items()]
        text += [
            f"What each part is worth at {ablation['budget'].removeprefix('params=')} parameters, one thing added "
            f"a line (`{ablation['command'].split(' --')[0]}`, all of it in float32; the lines before the allocation "
            "are of earlier code):",
            table(["", "top-1"], lines),
        ]
    return "\n\n".join(text)


def polish() -> str | None:
    """The same cuts with and without the polish."""
    if (found := read("oneshot_heal_deit_tiny") or read("oneshot_polish_deit_tiny")) is None:
        return None
    rows = []
    for key, run in sorted(found["runs"].items(), key=lambda entry: (-entry[1]["params"] // 10**5, entry[1]["seed"])):
        flag = next((flag for flag in HEALED if key.endswith(flag)), None)
        if flag is not None:
            sides = (found["runs"][key.removesuffix(flag)], run)
            cells = [f"{side['top1']:.1f} %" for side in sides]
            cells += [f"{distance_of(side):.3f}" for side in sides]
            cells += [f"{side['fidelity']['agreement']:.0f} %" for side in sides]
            seconds = either(run["timings"], "heal", "polish")
            rows.append([f"`{key.split(' ')[0]}`, seed {run['seed']}", *cells, f"{seconds:.0f} s"])
    header = ["", "top-1", "polished", "divergence", "polished", "same first prediction", "polished", "time of polish"]
    text = [
        "## Polish, DeiT-Tiny",
        f"    {found['command']}",
        "As above, on machines of one kind (two CPU cores, AVX-512 bf16); 4.0 M with seed 0 alone. "
        "Divergence and first predictions are on the "
        "50 held-out training images, which chose how far the polish goes; top-1 is on the 1,000 validation "
        "images (standard error 1.5).",
        table(header, rows),
    ]
    if settings := read("heal_deit_tiny") or read("polish_deit_tiny"):
        lines = [
            [name, f"{either(line, 'distance', 'kl'):.4f}", f"{line['agreement']:.1f} %", f"{line['seconds']:.0f} s"]
            for name, line in settings["lines"].items()
        ]
        text += [
            f"Settings of the polish (`{settings['command']}`): `{settings['budget']}`, cut and polished on four "
            f"fifths of the training images, compared with the dense model on the other {settings['held_out']} and "
            "their mirror images, tuned to the end:",
            table(["", "divergence", "same first prediction", "time"], lines),
        ]
    return "\n\n".join(text)


def deep() -> str | None:
    """ADMM against its absence where most is cut, at two lengths of training."""
    rows, commands, before = [], [], []
    for name in ("own_data_deep", "own_data_long"):
        if (found := read(name)) is None:
            return None
        commands.append(
            f"    {found['command']} --budgets params=-75% --methods start dense no-ADMM gohsp "
            + ("--dense runs/own_data/dense " if found["dense"] else "")
            + f"--results benchmarks/results/{name}.json"
        )
        stages = [admm_epochs(found["recipe"]), found["recipe"]["finetune"]["epochs"]]
        methods = by_method(found["runs"])
        before += methods.get("start", {}).get("", [])
        for budget, runs in methods["gohsp"].items():
            row = [mean_top1(of) for of in (methods["dense"][""], methods["no-ADMM"][budget], runs)]
            epochs = f"{stages[0]} of ADMM, {stages[1]} of fine-tuning"
            rows.append([budget, epochs, *(f"{value:.2f} %" for value in row)])
    return "\n\n".join(
        [
            "## imagewoof-160 at 112 px, DeiT-Tiny: ADMM and its absence where most is cut",
            "\n".join(commands),
            f"One dense model ({mean_top1(before):.2f} %), one seed, 2,000 validation "
            "images (standard errors 0.8 and 1.0). Without ADMM its epochs go to fine-tuning. ADMM begins with the "
            "repaired network.",
            table(["budget", "epochs", "dense, trained as long", "gohsp", "gohsp with ADMM"], rows),
        ]
    )


def latency_text(runs: Json) -> str | None:
    """What the latency budget came to."""
    run = runs.get("latency=-25% seed=0 images=1000")
    if run is None:
        return None
    speed, budget = run["speed"], run["budget"]
    return (
        f"`latency=-25%` (batch {speed['batch_size']}, {speed['dtype']}): {budget['achieved']:.1f} of "
        f"{budget['limit']:.1f} ms allowed, dense {speed['dense_ms']:.1f} ms, measured in turns at the end of the run."
    )


def calibration_sizes(runs: Json) -> dict[str, dict[int, float]]:
    """Top-1 by number of calibration images at one plan, with and without mirror images."""
    lines: dict[str, dict[int, float]] = {"with mirror images": {}, "without": {}}
    for key, run in runs.items():
        if key.startswith("plan ") and run["seed"] == 0:
            label = "without" if "--data.no-mirror" in run["flags"] else "with mirror images"
            lines[label][run["images"]] = run["top1"]
    return lines


def best_peers(runs: Json) -> dict[str, dict[str, Json]]:
    """For every criterion and scope of Torch-Pruning, its best variant at each budget."""
    best: dict[str, dict[str, Json]] = {}
    for key, run in runs.items():
        method, budget = key.split(" ")[:2]
        if method == "gohsp":
            continue
        of_name = best.setdefault(" ".join(method.split("/")[:2]), {})
        if budget not in of_name or run["top1"] > of_name[budget]["top1"]:
            of_name[budget] = run
    return best


def peers() -> str | None:
    """Torch-Pruning on the same images."""
    if (found := read("peers_deit_tiny")) is None:
        return None
    best = best_peers(found["runs"])
    budgets = sorted({b for of in best.values() for b in of}, key=lambda b: -float(b[len("params=") : -1]))
    ours = (read("oneshot_deit_tiny") or {"runs": {}})["runs"]
    rows = [
        [name, *(f"{of[b]['top1']:.1f} %" if b in of else "" for b in budgets)] for name, of in sorted(best.items())
    ]
    line = [ours.get(f"{b} seed=0 images=1000") for b in budgets]
    if any(line):
        rows.append(["**gohsp**", *(f"**{run['top1']:.1f} %**" if run else "" for run in line)])
    return "\n\n".join(
        [
            "## Beside Torch-Pruning, one-shot, DeiT-Tiny",
            f"    {found['command']} --params {' '.join(b.removeprefix('params=') for b in budgets)}",
            "Torch-Pruning 1.6.1 on the same 1,000 images, with their labels, nothing trained afterwards; each cell is "
            "the best of five choices of what may be cut (fewer where a budget was tried with the best ones only). "
            "`isomorphic-raw` ranks without dividing a layer's scores by their mean, which is not its default.",
            table(["", *(b.removeprefix("params=") for b in budgets)], rows),
            "![Top-1 against parameters](oneshot_accuracy.svg)",
        ]
    )


def imagewoof() -> str | None:
    """The training route on a user's own data."""
    found = [(name, read(name)) for name in ("imagewoof", "imagewoof_short")]
    if found[0][1] is None:
        return None
    names = {
        "gohsp": "gohsp with ADMM",
        "random": "gohsp with ADMM, heads ranked at random",
        "no-ADMM-random": "gohsp, heads ranked at random",
        "oneshot": "**gohsp**",
        "uniform": "gohsp with ADMM, uniform widths",
        "plain": "uniform widths, Euclidean ADMM, no repair",
        "magnitude": "uniform widths, weakest weight norms, no repair, no ADMM",
    }
    text = ["## imagewoof-160 at 112 px, DeiT-Tiny, two CPU cores, 2,000 validation images, standard error 0.8"]
    for _, result in found:
        if result is None:
            continue
        recipe = result["recipe"]
        epochs = f"{admm_epochs(recipe)} of ADMM and {recipe['finetune']['epochs']} of fine-tuning"
        rows = []
        for key, arms in result["runs"].items():
            for arm, run in arms.items():
                if retrained := run.get("dense_retrained"):
                    rows.append([key.split(" ")[0], "dense, trained as long", "", f"{retrained['top1']:.2f} %"])
                dense = share(run["pruned"]["params"], run["dense"]["params"])
                rows.append([key.split(" ")[0], names[arm], dense, f"{run['pruned']['top1']:.2f} %"])
        first = next(run for arms in result["runs"].values() for run in arms.values())
        text += [
            "\n".join(f"    {command}" for command in result["commands"]),
            "Seed 0, one stage of allocation (`allocation_stages = 1`, then the default); "
            f"epochs: {epochs}, or as many of fine-tuning alone; dense, before them: "
            f"{first['dense']['top1']:.2f} %.",
            table(["budget", "", "parameters", "top-1"], rows),
            *notes(result),
        ]
    return "\n\n".join(text)


def notes(found: Json) -> list[str]:
    """What a reader of a file's results must know beside them, such as which were measured before a change."""
    return [found["notes"]] if "notes" in found else []


def by_method(runs: Json) -> dict[str, dict[str, list[Json]]]:
    """A comparison's records by method and budget, one a seed; what has no budget is under an empty one."""
    found: dict[str, dict[str, list[Json]]] = {}
    for key, run in runs.items():
        method, *budget = key.split(" ")[:-1]
        found.setdefault(method, {}).setdefault("".join(budget), []).append(run)
    return found


def mean_top1(runs: Sequence[Json]) -> float:
    """Over seeds."""
    return sum(run["top1"] for run in runs) / len(runs)


def comparison_row(method: str, runs: dict[str, list[Json]], budgets: Sequence[str]) -> list[str]:
    """A method's name and its accuracy at every budget; a dense model's stands under all of them."""
    mark = "**" if method == "no-ADMM" else ""
    cells = {
        budget: f"{mean_top1(of):.2f} %" + (f" ({len(of)} seeds)" if len(of) > 1 else "") for budget, of in runs.items()
    }
    found = (cells.get(budget, cells.get("", "")) for budget in budgets)
    return [f"{mark}{cell}{mark}" if cell else "" for cell in (label_of(method), *found)]


def comparison(name: str) -> list[str]:
    """All methods with the same epochs on one data set."""
    if (found := read(name)) is None or "dense" not in (methods := by_method(found["runs"])):
        return []
    recipe = found["recipe"]
    dense = methods["dense"][""]
    epochs = f"{admm_epochs(recipe)} of ADMM and {recipe['finetune']['epochs']} of fine-tuning"
    from_scratch = (
        f"From scratch: {recipe['dense']['epochs']} epochs more, at the rate that the dense model had, with that "
        "model as teacher."
    )
    n = dense[0]["n"]
    return [
        f"## {COMPARISONS[name]}",
        f"    {found['command']}",
        f"Epochs behind the dense model ({dense[0]['params']:,} parameters): {epochs}, or without ADMM as many of "
        f"fine-tuning alone; top-1 on {n:,} images that nothing was chosen by (standard error "
        f"{standard_error(mean_top1(dense), n):.1f}); {where(found)}.",
        methods_table(methods),
        *([from_scratch] if "scratch" in methods else []),
        *notes(found),
        "What Torch-Pruning may cut besides hidden units is what keeps most held-out accuracy right after the cut. "
        "Where little is left that is near chance; rows that name their choice had it set.",
        f"![Top-1 against parameters and MACs]({name}.svg)",
    ]


def where(found: Json) -> str:
    """What a comparison ran on."""
    return "on two CPU cores" if found["machine"] == "cpu" else f"on one {found['machine']}"


def standard_error(top1: float, n: int) -> float:
    """Of an accuracy in percent on so many images."""
    return (top1 * (100 - top1) / n) ** 0.5


def methods_table(methods: dict[str, dict[str, list[Json]]]) -> str:
    """Top-1 of every method at every budget."""
    budgets = sorted({b for of in methods.values() for b in of if b}, key=lambda b: -float(b[len("params=") : -1]))
    order = [*METHODS, *methods]  # ours first
    rows = [comparison_row(method, methods[method], budgets) for method in dict.fromkeys(order) if method in methods]
    return table(["", *budgets], rows)


COMPARISONS = {
    "cifar10_vit_small": "CIFAR-10, ViT-Small",
    "cifar10_short": "CIFAR-10 at 112 px, DeiT-Tiny",
    "cifar10_short_64px": "CIFAR-10 at 64 px, DeiT-Tiny",
    "own_data": "imagewoof-160 at 112 px, DeiT-Tiny, nine tenths of the training images",
}
METHODS = {
    "start": "dense",
    "dense": "dense, trained as long",
    "dense-long": "dense, as many epochs as from scratch",
    "oneshot": "gohsp, nothing trained",
    "no-ADMM": "gohsp",
    "gohsp": "gohsp with ADMM",
    "gohsp-long": "gohsp with ADMM, as many epochs as from scratch",
    "random": "gohsp with ADMM, heads ranked at random",
    "no-ADMM-random": "gohsp, heads ranked at random",
    "scratch": "gohsp's shape trained from scratch",
    "peer": "Torch-Pruning, the best of those tried",
}
WIDTHS = {
    "all": "embedding, heads' dimensions",
    "deit": "embedding, heads and their dimensions",
    "blocks": "heads' dimensions",
    "heads": "whole heads",
    "ffn": "hidden units alone",
}


def label_of(method: str) -> str:
    """A method's name in tables and plots."""
    if method in METHODS:
        return METHODS[method]
    importance, scope, *width = method.split("/")
    return ", ".join(["Torch-Pruning", importance, scope, *(WIDTHS[w] for w in width)])


def cifar() -> str | None:
    """Every method side by side on CIFAR-10."""
    text = [part for name in COMPARISONS if name.startswith("cifar10") for part in comparison(name)]
    return "\n\n".join(text) or None


def own_data() -> str | None:
    """Every method side by side on a user's own images."""
    return "\n\n".join(comparison("own_data")) or None


def ablations() -> str | None:
    """One choice of the training route changed at a time."""
    text = []
    for name, title in COMPARISONS.items():
        if (found := read(f"ablation_{name}")) is None:
            continue
        arms: dict[str, dict[str, list[Json]]] = {}
        for run in found["runs"].values():
            arms.setdefault(run["arm"], {}).setdefault(run["budget"], []).append(run)
        budgets = sorted({budget for of in arms.values() for budget in of})
        rows = []
        for arm, of in arms.items():
            held_out = [
                f"{sum(r['held_out_top1'] for r in of[b]) / len(of[b]):.2f} %" if b in of else "" for b in budgets
            ]
            test = [f"{mean_top1(of[b]):.2f} %" if b in of else "" for b in budgets]
            rows.append([arm, *(cell for pair in zip(held_out, test, strict=True) for cell in pair)])
        header = ["", *(cell for b in budgets for cell in (f"{b}, held-out", "test"))]
        run = next(iter(found["runs"].values()))
        error = standard_error(run["top1"], run["n"])
        text += [
            f"## What each choice is worth: {title}",
            f"    {found['command']}",
            "One choice changed a line, the same dense model and epochs; *no compensation* is the Euclidean metric, in "
            "which damage curves, ADMM's start and the cut do without repairs. Held-out training images are what a "
            f"default may be chosen by; {run['n']:,} test images (standard error {error:.1f}) are for the record. A "
            "budget stands for `--budgets`, heads a block for `--fewer-heads`.",
            table(header, rows),
            *notes(found),
        ]
    return "\n\n".join(text) or None


def throughput() -> str | None:
    """Measured speed over what the ratio of MACs promises."""
    if (found := read("throughput")) is None:
        return None
    return "\n\n".join(["## Throughput", *throughput_tables(found)])


def throughput_tables(found: Json) -> list[str]:
    """A command, its machine and its tables, for every pair of models."""
    text = []
    for record in found.values():
        rows = [
            [
                f"{case['dtype']}, batch {case['batch']}{', compiled' if case['compiled'] else ''}",
                *(f"{rate:,.0f}" for rate in case["images_per_second"]),
                *(f"{memory:,.0f}" for memory in case["peak_memory_mib"]),
                f"{case['speedup']:.2f}",
                f"{100 * case['achieved']:.0f} %",
            ]
            for case in record["cases"]
        ]
        header = ["", "images/s dense", "pruned", "peak MiB dense", "pruned", "speed-up", "of the MAC ratio"]
        text += [
            f"    {record['command']}",
            f"{record['machine']}, {record['threads']} threads; pruned blocks: {'; '.join(record['shapes'])}.",
            table(header, rows),
            *profiles(record["cases"]),
        ]
    return text


def profiles(cases: Sequence[Json]) -> list[str]:
    """Where a pass of the largest batch spends its time, dense and pruned."""
    largest = max((case["batch"] for case in cases), default=0)
    rows = []
    for case in cases:
        if case["batch"] == largest and (seen := case.get("profile")):
            spent = (f"{seen[0][kind]:,.0f} -> {seen[1][kind]:,.0f} ms" for kind in ("products", "attention", "rest"))
            rows.append([f"{case['dtype']}, batch {case['batch']}", *spent])
    if not rows:
        return []
    header = ["profile, dense -> pruned", "matrix products", "attention", "norms, activations, sums, copies"]
    return [table(header, rows)]


def overhead() -> str | None:
    """What gohsp's parts cost by model size."""
    if (found := read("overhead")) is None:
        return None
    return "\n\n".join(["## What the parts cost", *overhead_tables(found)])


def overhead_tables(found: Json) -> list[str]:
    """Commands, machines and tables by device."""
    text = []
    for record in found.values():
        if not (sizes := record["models"]):
            continue
        commands = [part["command"] for of in sizes.values() for part in of.values() if isinstance(part, dict)]
        seen = [part["processor"] for of in sizes.values() for part in of.values() if isinstance(part, dict)]
        machines = " and ".join(dict.fromkeys(seen))
        rows, steps = [], []
        for model, of in sizes.items():
            cells = [
                f"{of[part]['seconds']:.1f} s ({of[part]['forward_passes']:.0f}; {of[part]['images']})"
                if part in of
                else ""
                for part in PARTS
            ]
            if (ranked := of.get("ranking", {})).get("float32_passes"):
                passes = f"{ranked['forward_passes']:.1f} or {ranked['float32_passes']:.1f}; {ranked['images']}"
                cells[0] = f"{ranked['seconds']:.1f} s ({passes})"
            rows.append([model, f"{of['params'] / 1e6:.1f} M", *cells])
            if admm := of.get("admm"):
                steps.append(
                    [
                        model,
                        str(admm["batch"]),
                        f"{1e3 * admm['seconds']['plain_step']:,.0f} ms",
                        f"{admm['in_images']:.2f}",
                        f"{100 * (admm['ratio'] - 1):.1f} %",
                        f"{100 * admm['in_images'] / 64:.1f} %",
                        f"{admm['state_mib']:,.0f} MiB ({admm['state_mib'] / admm['weights_mib']:.1f})",
                    ]
                )
        text += [
            "\n".join(f"    {command}" for command in dict.fromkeys(commands)),
            f"224 px, {machines}, {record['threads']} threads. Seconds, and in brackets forward passes over "
            "the same images in the same precision, for the ranking, where they were timed, or such passes in "
            "float32; and the images. With few of them the solves, which do not depend on their number, weigh most.",
            table(["model", "parameters", *PARTS], rows),
            *steps_of(steps),
        ]
        if growth := grown(sizes):
            text.append(growth)
        if any("solves" in of for of in sizes.values()):
            text += reconstruction(sizes)
    return text


def steps_of(steps: Sequence[Sequence[str]]) -> list[str]:
    """ADMM's steps, where they were timed."""
    if not steps:
        return []
    return [
        "An ADMM step over a plain one, at the default interval; *in images*: how many images a plain step trains "
        "on in the time that ADMM adds, whatever the batch. State: anchors, duals, moments, projections (over the "
        "weights).",
        table(["model", "batch", "plain step", "in images", "slower", "at batch 64", "state"], steps),
    ]


VIEWS = 2048
"""What a run reconstructs on by default: 1,024 images and their mirror images."""


def reconstruction(sizes: Json) -> list[str]:
    """What reconstruction costs at a run's size, from its cost at two small numbers of images."""
    known = {model: of["solves"] for model, of in sizes.items() if "solves" in of}
    whole = [of["seconds"] + VIEWS * of["an_image"] for of in known.values()]
    rows = [
        [model, str(of["images"]), f"{of['seconds']:.1f} s", f"{1e3 * of['an_image']:.0f} ms", f"{seconds:,.0f} s"]
        for (model, of), seconds in zip(known.items(), whole, strict=True)
    ]
    text = [
        "Reconstruction, timed with so many images and with four times as many, is solves, whatever their number, and "
        f"a cost an image. By these it takes, at a run's {VIEWS:,} views (extrapolated from one timing each, good to a "
        "quarter):",
        table(["model", "images", "solves", "an image", f"{VIEWS:,} views"], rows),
    ]
    if len(whole) > 1 and min(whole) > 0:
        params = [sizes[model]["params"] for model in known]
        power = math.log(whole[-1] / whole[0]) / math.log(params[-1] / params[0])
        text.append(f"Power of the number of parameters by which that grows: {power:.1f}.")
    return text


PARTS = ("ranking", "moments", "curves", "reconstruction")


def grown(sizes: Json) -> str | None:
    """By what power of the number of parameters costs grow from the first model to the last."""
    records = list(sizes.values())
    powers = []
    for part in PARTS:
        has = [r for r in records if part in r]
        has = [r for r in has if r[part]["images"] == has[0][part]["images"]]
        if len(has) > 1:
            power = math.log(has[-1][part]["seconds"] / has[0][part]["seconds"])
            powers.append(f"{part} {power / math.log(has[-1]['params'] / has[0]['params']):.2f}")
    has = [r for r in records if "admm" in r]
    if len(has) > 1:
        added = [r["admm"]["in_images"] * r["admm"]["seconds"]["plain_step"] / r["admm"]["batch"] for r in has]
        power = math.log(added[-1] / added[0]) / math.log(has[-1]["params"] / has[0]["params"])
        powers.append(f"what ADMM adds to a step {power:.2f}")
    if not powers:
        return None
    return f"Powers of the number of parameters by which seconds grow, first model to last: {', '.join(powers)}."


def gpu() -> str:
    """What ``benchmarks/gpu/run.sh`` left, and what of it is not there."""
    parts = {name: read(f"gpu/{name}") for name in GPU_PARTS}
    text = [
        "## On a GPU",
        "One call of `benchmarks/gpu/run.sh`, of at most ten minutes, measures what is below "
        "([how](../benchmarks/gpu/README.md)).",
    ]
    for name, found in parts.items():
        if found is not None:
            title, tables = GPU_PARTS[name]
            text += [f"### {title}", measured_on(found), *tables(found["results"])]
    if missing := [GPU_PARTS[name][0] for name, found in parts.items() if found is None]:
        text.append(f"Not measured yet: {'; '.join(missing)}.")
    return "\n\n".join(text)


# The second edition


def editions() -> str | None:
    """The first edition and this one, in turns on one machine."""
    if (found := read("editions")) is None:
        return None
    runs, rows = found["runs"], []
    for budget in dict.fromkeys(key.split(" ")[1] for key in runs):
        for edition in ("first", "this"):
            of = {key.split("seed=")[1]: run for key, run in runs.items() if key.startswith(f"{edition} {budget} ")}
            if not of:
                continue
            times = [run["processor_seconds"] for run in of.values() if "processor_seconds" in run]
            rows.append(
                [
                    f"`{budget}`",
                    edition,
                    ", ".join(f"{run['top1']['both']:.1f}" for run in of.values()),
                    f"{mean(run['top1']['both'] for run in of.values()):.1f} %",
                    f"{mean(run['top1']['imagenet-1k-mini'] for run in of.values()):.1f} %",
                    f"{mean(run['divergence'] for run in of.values()):.2f}",
                    f"{mean(times):.0f} s" if times else "",
                ]
            )
    header = ["budget", "edition", "top-1, seed by seed", "mean", "mean on mini", "divergence", "processor time"]
    return "\n\n".join(
        [
            "## This edition and the first, DeiT-Tiny",
            "    GOHSP_ASSETS=../shared python benchmarks/editions.py --first ../first",
            "One-shot, with curves of no other run. Top-1 is on the validation images of imagenet-1k-mini and "
            f"imagenet-1k-broad, 2,278 together. The dense model has {found['dense']['both']:.1f} %. The standard "
            "error of a difference of two runs is about 0.7. Divergence is on each run's 50 held-out images, in nats. "
            "Processor time is that of all threads; the first runs did not record it.",
            table(header, rows),
        ]
    )


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    given = list(values)
    return sum(given) / len(given)


def saliency() -> str | None:
    """A user's module with a backbone inside."""
    if (found := read("saliency")) is None:
        return None
    other = read("saliency_transformers")
    rows = [
        [f"`{key.split(' params=')[0]}`{layout}", f"params={key.split(' params=')[1]}", *saliency_cells(run)]
        for of, layout in ((found, ""), (other, ", transformers"))
        for key, run in (of["runs"] if of else {}).items()
    ]
    beside = other and (
        f" Rows of transformers have the backbone as its `Dinov2Model` (`{other['command']}`), whose maps are the same "
        f"before pruning, up to {other['dense_difference']:.0e}."
    )
    return "\n\n".join(
        [
            "## A module of somebody's own: saliency maps",
            f"    {found['command']}",
            f"A ViT-S/14 of DINOv2's layout with a decoder, {found['params']:,} parameters in all. How far the pruned "
            "module's maps are from the dense one's on other photographs: mean absolute difference, and overlap "
            "(intersection over union) of what is above a half. `tp`: Torch-Pruning by three criteria, on the backbone "
            "alone; `uniform`: the same share of every width, by weight norms, without repair. Nothing is trained."
            + (beside or ""),
            table(["method", "budget", "parameters", "difference", "overlap", "time"], rows),
        ]
    )


def saliency_cells(run: Json) -> list[str]:
    """Size and distance of a row, or why there is none."""
    if "failed" in run:
        return [run["failed"], "", "", ""]
    return [f"{run['params']:,}", f"{run['difference']:.4f}", f"{run['iou']:.3f}", f"{run['seconds']:.0f} s"]


def depth() -> str | None:
    """Budgets in time with and without absent sub-layers."""
    if (found := read("depth")) is None:
        return None
    rows = [
        [
            f"`{key.split(' ')[0]}`",
            key.partition(" ")[2],
            f"{run['top1']:.1f} %",
            f"{run['params']:,}",
            f"{100 * (run['predicted'] - 1):+.0f} %",
            f"{100 * (run['measured'] - 1):+.0f} %",
            str(len(run["absent"])),
            f"{run['fidelity']:.2f}",
        ]
        for key, run in found["runs"].items()
    ]
    header = ["budget", "", "top-1", "parameters", "time, predicted", "measured", "absent sub-layers", "divergence"]
    return "\n\n".join(
        [
            "## Whole sub-layers, DeiT-Tiny at batch 1",
            f"    {found['command']}",
            "With and without `widths.depth`, one-shot; top-1 on the 1,000 validation images of imagenet-1k-mini "
            "(standard error 1.5), times over the dense model's.",
            table(header, rows),
        ]
    )


def uniform() -> str | None:
    """Widths that differ, and one width of each kind."""
    if (found := read("uniform")) is None:
        return None
    rows = [
        [name, f"{run['top1']:.1f} %", f"{run['params']:,}", f"{run['macs'] / 1e9:.2f} G", f"{run['fidelity']:.2f}"]
        for name, run in found["runs"].items()
    ]
    return "\n\n".join(
        [
            "## All blocks alike, DeiT-Tiny",
            f"    {found['command']}",
            "With `uniform` timm makes and loads the model alone; its arguments can say `mlp_ratio`, and heads stay. "
            f"One-shot; top-1 on {next(iter(found['runs'].values()))['n']:,} validation images.",
            table(["widths", "top-1", "parameters", "MACs", "divergence"], rows),
        ]
    )


def layouts() -> str | None:
    """The same weights as several libraries hold them."""
    if (found := read("layouts")) is None:
        return None
    rows = [
        [
            name,
            f"{run['dense_difference']:.0e}",
            f"{run['params']:,}",
            f"{run['top1']['both']:.1f} %",
            f"{run['top1']['imagenet-1k-mini']:.1f} %",
            f"{run['divergence']:.3f}",
        ]
        for name, run in found["runs"].items()
    ]
    header = ["library", "dense models differ by", "parameters", "top-1 on both", "on mini", "divergence"]
    return "\n\n".join(
        [
            "## The same DeiT-Tiny in other libraries",
            "    GOHSP_ASSETS=../shared python benchmarks/layouts.py "
            f"--images {found['images']} --seed {found['seed']}",
            "The published weights renamed into each library's model, pruned one-shot to 4.0 M parameters on the same "
            f"{found['images']} images. Top-1 is on 2,278 validation images (standard error 0.9).",
            table(header, rows),
        ]
    )


def head_steps() -> str | None:
    """Heads taken out in the order of rankings made once and in steps."""
    if (of_imagenet := read("head_steps")) is None:
        return None
    text = [
        "## DeiT-Tiny without some of its heads",
        "    GOHSP_ASSETS=../shared python benchmarks/head_steps.py",
        f"Top-1 in percent on 2,278 validation images of ImageNet (the dense model: {of_imagenet['dense']:.1f}), with "
        "the weakest heads gone, and in brackets the distance from its predictions on 250 training images that neither "
        "rank nor repair, in nats. *Zeroed*: nothing is repaired. *Repaired*: the others are refitted on 475 images. "
        "Nothing is trained.",
        heads_table(of_imagenet["runs"]),
        *notes(of_imagenet),
    ]
    for name, pixels, dense in (
        ("head_steps_cifar10", 112, "cifar10_deit_tiny"),
        ("head_steps_cifar10_64px", 64, "cifar10_64px"),
    ):
        if found := read(name):
            text += [
                f"    python benchmarks/head_steps_cifar10.py --data hfds/cifar10 --dense runs/{dense}/dense "
                f"--out runs/{name} --results benchmarks/results/{name}.json",
                f"The same on CIFAR-10 at {pixels} px, on 2,000 held-out images (the dense model: "
                f"{found['dense']:.1f}); *trained*: repaired, then an epoch of 5,000 images with the dense model as "
                "teacher.",
                heads_table(found["runs"]),
                *notes(found),
            ]
    return "\n\n".join(text)


def heads_table(runs: Json) -> str:
    """Top-1 and distance by ranking, for every share of the heads."""
    shares = (name for run in runs.values() for name in run)
    columns = dict.fromkeys(name for name in shares if name not in ("processor_seconds", "machine"))
    order = sorted(columns, key=lambda name: ("zeroed", "repaired", "trained").index(name.split()[0]))
    cells = {
        name: [f"{run[c]['top1']:.1f} ({run[c]['distance']:.2f})" if c in run else "" for c in order]
        for name, run in runs.items()
    }
    header = [f"{column.split()[0]}, {100 * float(column.split()[1]):.0f} %" for column in order]
    return table(["ranking", *header], [[name, *row] for name, row in cells.items()])


def trajectory() -> str | None:
    """Ways to a deep cut, with long training."""
    if (found := read("cifar10_deep")) is None or len(found["runs"]) == 1:
        return None
    recipe, start, tuned = found["recipe"], found["runs"]["start"], found["held_out_top1_by_rate"]
    columns: dict[str, dict[str, Json]] = {}
    for key, run in found["runs"].items():
        if " params=" in key:
            way, _, column = key.partition(" params=")
            columns.setdefault(column.replace(" seed=", " %, seed ").replace("% %", " %"), {})[way] = run
    rates: list[str] = sorted({rate for of in tuned.values() for rate in of}, key=float)
    epochs = f"{admm_epochs(recipe)} of ADMM and {recipe['finetune']['epochs']} of fine-tuning"
    rows = [[way, *(f"{of[way]['top1']:.2f} %" if way in of else "" for of in columns.values())] for way in tuned]
    rate_rows = [[way, *(f"{of[rate]:.2f} %" if rate in of else "" for rate in rates)] for way, of in tuned.items()]
    script = "    python benchmarks/trajectory.py --data hfds/cifar10 --weights deit_tiny_patch16_224.safetensors"
    return "\n\n".join(
        [
            "## Ways to a deep cut, with long training",
            f"{script} --tune\n{script}",
            f"DeiT-Tiny at 64 px, trained on 2,000 images of CIFAR-10 to {start['top1']:.2f} % on the {start['n']:,} "
            f"test images (standard error {standard_error(start['top1'], start['n']):.1f}). Epochs behind it, with it "
            f"as teacher: {epochs}, or as many without ADMM; {where(found)}. The script says what the ways are.",
            table(["", *columns], rows),
            "By learning rate, -75 %, on 5,000 held-out images, which chose the rates above:",
            table(["", *rates], rate_rows),
        ]
    )


def describing() -> str | None:
    """What looking into a model costs."""
    if (found := read("describing")) is None:
        return None
    rows = [
        [name, f"{run['describe']:.1f}", f"{run['record']:.1f}", f"{run['alone']:.2f}"]
        for name, run in found["runs"].items()
    ]
    return "\n\n".join(
        [
            "## What it costs to look into a model",
            f"    {found['command']}",
            "In forward passes of the model: of one image for describing it and for recording how it calls its blocks, "
            "and of the same images for all blocks run alone.",
            table(["", "describe", "record", "blocks alone"], rows),
        ]
    )


def export() -> str | None:
    """Exported files beside their models, and dense and pruned ONNX files against what the ratio of MACs promises."""
    if (found := read("export")) is None:
        return None
    rows, profiles_ = [], []
    for name, run in found["runs"].items():
        for case in run["cases"]:
            label = f"{name}, batch {case['batch']}"
            low, high = case["quartiles"]
            rows.append(
                [
                    label,
                    *(f"{ms:.1f} ms" for ms in case["ms"]),
                    f"{case['speedup']:.2f} ({low:.2f} to {high:.2f})",
                    f"{run['ratio']:.2f}",
                    f"{100 * case['achieved']:.0f} %",
                ]
            )
            dense, pruned = case["profile"]
            profiles_.append([label, *(f"{dense[kind]:.1f} -> {pruned[kind]:.1f} ms" for kind in dense)])
    machine, versions = found["machine"], found["versions"]
    worst = max(difference for run in found["runs"].values() for difference in run["difference"])
    kinds = list(next(iter(found["runs"].values()))["cases"][0]["profile"][0])
    text = [
        "## ONNX files, DeiT-Tiny",
        f"    {found['command']}",
        f"ONNX Runtime {versions['onnxruntime']}, {machine['processor']}, {machine['threads']} threads, float32. "
        "Dense and pruned file take turns; speed-up is the median of the rounds, with quartiles. The files differ "
        f"from their models by at most {worst:.0e} of the output's scale.",
        table(["", "dense", "pruned", "speed-up", "ratio of MACs", "achieved"], rows),
        table(["profile, dense -> pruned", *kinds], profiles_),
    ]
    if compared := found.get("differences"):
        targets = list(next(iter(compared.values())))
        text += [
            "Files of all targets beside their models, which are pruned to widths that are cut alike, queries and keys "
            "further: the largest difference of outputs on one and on three random images, over the largest magnitude "
            "of the output.",
            table(["", *targets], [[name, *(f"{of[to]:.0e}" for to in targets)] for name, of in compared.items()]),
        ]
    return "\n\n".join(text)


def int8() -> str | None:
    """Dense, pruned, int8 and both: accuracy, bytes and time."""
    if (found := read("int8")) is None:
        return None
    rows = []
    for key, row in found["rows"].items():
        runtime, name = key.split(": ")
        told = [f"{row['top1']['both']:.1f} %", f"{row['bytes'] / 1e6:.1f} MB"]
        ways = [runtime, "torch.compile"] if runtime == "torch" else [runtime]
        timed = {way: found["times"].get(way, {}).get(name) for way in ways}
        rows += [[f"{way}: {name}", *told, time_in(timings)] for way, timings in timed.items() if timings]
    batches = [timing["batch_size"] for timing in next(iter(found["times"]["torch"].values()))]
    dense, pruned = found["models"]["dense"], found["models"]["pruned"]
    versions, machine = found["versions"], found["machine"]
    return "\n\n".join(
        [
            "## Int8, DeiT-Tiny",
            f"    {found['command']}",
            f"torch {versions['torch']}, torchao {versions['torchao']}, ONNX Runtime {versions['onnxruntime']}; "
            f"{machine['processor']}, {machine['threads']} threads. *Pruned*: "
            f"{share(pruned['params'], dense['params'])} of the parameters, {share(pruned['macs'], dense['macs'])} of "
            "the MACs, nothing trained. Top-1 is on the 2,278 validation images of both sets (standard error 0.9). "
            "Times are milliseconds a batch of "
            f"{' / '.join(map(str, batches))}, and in brackets how many times as fast that is as the dense model in "
            "float32, both in turns by the same runtime.",
            table(["", "top-1", "size", "time"], rows),
        ]
    )


def time_in(timings: Sequence[Json]) -> str:
    """Milliseconds and speed-ups by batch size."""
    ms = " / ".join(f"{timing['milliseconds']['median']:.1f}" for timing in timings)
    speedup = " / ".join(f"{timing['speedup']['median']:.2f}" for timing in timings)
    return f"{ms} ({speedup})"


def families() -> str | None:
    """How many models enter."""
    if (found := read("families")) is None:
        return None
    verdicts = ["accepted", "refused", "crashed", "not made"]
    rows = [[name, *(str(of.get(verdict, 0)) for verdict in verdicts)] for name, of in found["counts"].items()]
    return "\n\n".join(
        [
            "## Which models enter",
            "    python benchmarks/families.py",
            f"Every name of timm {found['versions']['timm']}"
            + (
                f", and the vision models of transformers {found['versions']['transformers']} by default"
                if "transformers" in found["versions"]
                else ""
            )
            + ", described on the meta device. What is refused says why; *not made*: by the library itself.",
            table(["", *verdicts], rows),
        ]
    )


def measured_on(found: Json) -> str:
    """Machine and versions of a part of the GPU run, and what kept it from its end, if anything did."""
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    text = f"{found['machine']}; {versions}; {found['seconds']:.0f} s."
    if found["dry_run"]:
        text = f"A dry run, whose figures mean nothing. {text}"
    if found["state"] != "done":
        text += f" Not complete ({found['state']}{': ' * bool(found['reason'])}{found['reason']})."
    if found["errors"]:
        text += f" Failed: {'; '.join(found['errors'])}."
    return text


def gpu_smoke(results: Json) -> list[str]:
    """What the GPU computes beside what the CPU does."""
    told = {
        "cut": lambda c: (
            f"what the two devices' cuts predict is {c['divergence_between']:.1e} nats apart, the cut itself "
            f"{c['divergence_of_cut']:.1e} from the dense model; {c['same_hidden_units_percent']:.1f} % of the hidden "
            "units are the same"
        ),
        "ADMM": lambda c: f"weights after the same steps differ by {c['weights_differ_by']:.1e} of their norm",
        "one-shot": lambda c: f"`{c['budget']['requested']}`, divergence {distance_of(c):.3f}",
        "latency": lambda c: (
            f"half the hidden units take {c['measured']:.2f} of the time, {c['predicted']:.2f} foretold"
        ),
    }
    rows = [
        [name, "yes" if check["agrees"] else "**no**", told[name](check), f"{check['seconds']:.1f} s"]
        for name, check in results.get("checks", {}).items()
    ]
    return [table(["", "as it should be", "", "time"], rows)] if rows else []


def gpu_cifar(results: Json) -> list[str]:
    """All methods with the same epochs, as many as the time held."""
    if not (runs := results.get("runs")):
        return []
    if (start := runs.get("start seed=0")) is None:
        return [methods_table(by_method(runs))]
    recipe, epochs = results["recipe"], results["epochs"]
    seconds = ", ".join(f"{value:.1f} s {way}" for way, value in results["epoch_seconds"].items())
    behind = (
        f"{epochs['behind']} behind it for every method, of which {admm_epochs(recipe)} are ADMM's where it has a stage"
        if "behind" in epochs
        else "none behind it"
    )
    text = [
        f"Epochs: {epochs['dense']} of the dense model ({start['params']:,} parameters, rounded to half precision), "
        f"{behind}. An epoch takes {seconds}. Top-1 on {start['n']:,} images that nothing was chosen by (standard "
        f"error {standard_error(start['top1'], start['n']):.1f}).",
        methods_table(by_method(runs)),
    ]
    for key, run in runs.items():
        if "variant" in run:
            tried = (f"{name} {top1:.2f} %" for name, top1 in run["tried"].items() if top1 is not None)
            text.append(
                f"Torch-Pruning, `{key.split(' ')[1]}`: {run['variant']}, by held-out images after one epoch "
                f"({', '.join(tried)})."
            )
    return text


def gpu_throughput(results: Json) -> list[str]:
    """Speed, and where the time goes that falls shortest of what the MACs promise."""
    seen = [(case, name) for name, record in results.items() for case in record["cases"] if case["profile"]]
    text = throughput_tables(results)
    if seen:
        worst, name = min(seen, key=lambda pair: pair[0]["achieved"])
        text.append(
            f"Furthest from its MAC ratio, of what is not compiled: {name.split(' ')[0]}, {worst['dtype']}, batch "
            f"{worst['batch']}."
        )
        if worst["batch"] < max(case["batch"] for case in results[name]["cases"]):  # the largest is profiled above
            text += profiles([worst])
    return text


def gpu_stages(results: Json) -> list[str]:
    """The one-shot route by stage."""
    stages = ("rank", "allocate", "cut")
    rows = [
        [
            name,
            f"{run['params'] / 1e6:.1f} M",
            *(f"{run['timings'][stage]:.1f} s" for stage in stages),
            f"{run['seconds']:.1f} s",
            f"{run['peak_memory_mib']:,} MiB",
        ]
        for name, run in results.get("runs", {}).items()
    ]
    if not rows:
        return []
    first = next(iter(results["runs"].values()))
    return [
        f"`{first['budget']}`, {first['images']:,} calibration images and their mirror images, weights as they are "
        "drawn. The whole time is all of a run, with reading images and writing the report.",
        table(["model", "parameters", *stages, "the whole", "peak memory"], rows),
    ]


GPU_PARTS: dict[str, tuple[str, Callable[[Json], list[str]]]] = {
    "smoke": ("What a GPU computes beside a CPU", gpu_smoke),
    "cifar": ("CIFAR-10, ViT-Small", gpu_cifar),
    "throughput": ("Throughput of DeiT-Small and DeiT-Base", gpu_throughput),
    "oneshot_stages": ("One-shot by stage", gpu_stages),
    "overhead": ("ADMM's overhead and ranking's passes", overhead_tables),
}


SECTIONS: tuple[Callable[[], str | None], ...] = (
    editions,
    cifar,
    saliency,
    depth,
    uniform,
    layouts,
    head_steps,
    trajectory,
    describing,
    export,
    int8,
    families,
)
FIRST_SECTIONS: tuple[Callable[[], str | None], ...] = (
    oneshot,
    polish,
    peers,
    own_data,
    deep,
    ablations,
    imagewoof,
    throughput,
    overhead,
    gpu,
)


def page() -> str:
    """The whole page."""
    intro = (
        "# Results\n\nMade from `benchmarks/results/*.json` by `python benchmarks/results_page.py`; every table names "
        "the command that measured it. What the figures mean stands in [one-shot](oneshot.md), "
        "[ADMM](admm.md), [ranking](ranking.md) and [what did not work](negative.md)."
    )
    parts = [intro, *written([behind_the_readme, *SECTIONS]), FIRST, *written(FIRST_SECTIONS)]
    return "\n\n".join(wrapped(paragraph) for paragraph in "\n\n".join(parts).split("\n\n")) + "\n"


HELD = "\0"
"""Stands for a space at which no line may break."""


def wrapped(paragraph: str) -> str:
    """Prose in lines of at most 120 characters; tables, commands, titles and pictures as they are."""
    if paragraph.startswith(("|", "    ", "#", "![")):
        return paragraph
    indent = "  " if paragraph.startswith("- ") else ""
    kept = re.sub(r" (?=(?:\d+[.)]|[-+*]) )", HELD, paragraph)  # at the start of a line these would be marks of a list
    lines = textwrap.fill(kept, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace(HELD, " ")


def written(sections: Sequence[Callable[[], str | None]]) -> list[str]:
    """Sections that have results."""
    return [text for section in sections if (text := section())]


FIRST = (
    "## Measured with the first edition\n\nAll that follows is of the code before sub-layers and curves by gradients.\n"
    "Run today, the same commands may give other figures, and flags that are gone are named as they were.\n\nWhere a "
    "table does not say otherwise, damage curves were measured on 256 images, which was the default before 128 "
    "(`--data.allocation-images 256`), and ranking compared attention rows of all images instead of every fourth: "
    "widths may differ by a few units today."
)
"""What goes before the sections of the first edition."""


def readme_table() -> str:
    """What the README shows of the result files: one table, and a line on speed."""
    header = ["model and images", "training", "cut", "dense", "gohsp", "Torch-Pruning, its best"]
    rows = [
        *readme_oneshot(),
        *readme_trained("own_data", "DeiT-Tiny, dog breeds: top-1", "3 epochs"),
        *readme_trained("cifar10_short", "DeiT-Tiny, CIFAR-10: top-1", "2 epochs"),
        *readme_maps(),
    ]
    return "\n\n".join([table(header, rows), *readme_speed()])


def readme_row(what: str, training: str, left: float, dense: float, ours: float, theirs: float) -> list[str]:
    """A row of the README's table; ``left`` is the share of parameters that stays."""
    cells = (f"{dense:.1f} %", f"**{ours:.1f} %**", f"{theirs:.1f} %")
    return [what, training, f"{100 * (left - 1):.0f} %", *cells]


def readme_oneshot() -> list[list[str]]:
    """Classification without labels."""
    runs = (read("oneshot_deit_tiny") or {"runs": {}})["runs"]
    theirs = best_by_budget(read("peers_deit_tiny"))
    rows = []
    for budget in ("params=4.0M", "params=3.06M"):
        if (run := runs.get(f"{budget} seed=0 images=1000")) and budget in theirs:
            left, best = run["params"] / DENSE_TINY[0], theirs[budget]["top1"]
            rows.append(readme_row("DeiT-Tiny, ImageNet: top-1", "none", left, DENSE_TINY[2], run["top1"], best))
    return rows


def readme_trained(name: str, what: str, epochs: str) -> list[list[str]]:
    """Classification with a few epochs for all."""
    found = read(name)
    methods, theirs = by_method((found or {"runs": {}})["runs"]), best_by_budget(found)
    if not {"dense", "no-ADMM"} <= methods.keys():
        return []
    dense = methods["dense"][""]
    return [
        readme_row(
            what,
            epochs,
            runs[0]["params"] / dense[0]["params"],
            mean_top1(dense),
            mean_top1(runs),
            theirs[budget]["top1"],
        )
        for budget, runs in methods["no-ADMM"].items()
        if budget in theirs
    ]


def readme_maps() -> list[list[str]]:
    """A module of a user's own, whose output is a map."""
    if (found := read("saliency")) is None:
        return []
    rows = []
    for budget in ("params=-30%", "params=-50%"):
        run = found["runs"][f"gohsp {budget}"]
        theirs = (of["iou"] for key, of in found["runs"].items() if key.startswith("tp ") and key.endswith(budget))
        left = run["params"] / found["params"]
        rows.append(
            readme_row("ViT-S/14, saliency: overlap of maps", "none", left, 100, 100 * run["iou"], 100 * max(theirs))
        )
    return rows


def readme_speed() -> list[str]:
    """Half the MACs in time, where it was measured."""
    if (found := read("throughput")) is None:
        return []
    record = next(iter(found.values()))
    cases = {case["batch"]: case["speedup"] for case in record["cases"] if case["dtype"] == "float32"}
    rates = " and ".join(f"{speedup:.2f} times as fast at batch {batch}" for batch, speedup in cases.items())
    return [wrapped(f"A DeiT-Small with half the MACs is {rates} (float32, {record['threads']} CPU cores).")]


def best_by_budget(found: Json | None) -> dict[str, Json]:
    """Torch-Pruning's best run at every budget, whatever its criterion and variant."""
    best: dict[str, Json] = {}
    for key, run in (found or {"runs": {}})["runs"].items():
        method, budget = key.split(" ")[:2]
        if "/" in method and run["top1"] > best.get(budget, {"top1": -1.0})["top1"]:
            best[budget] = run
    return best


def behind_the_readme() -> str | None:
    """Protocols, seeds and standard errors of the README's table."""
    if (oneshot := read("oneshot_deit_tiny")) is None or (trained := read("own_data")) is None:
        return None
    draws = drawn(oneshot["runs"], "params=4.0M")
    variants = sum("/" in method and "params=-60%" in of for method, of in by_method(trained["runs"]).items())
    return "\n\n".join(
        [
            "## What stands behind the README's table",
            "All of it is top-1 accuracy or overlap on images that nothing was chosen by. Rows of DeiT-Tiny are of the "
            "first edition's code, but for CIFAR-10; "
            "[this edition stands beside it](#this-edition-and-the-first-deit-tiny). "
            "Torch-Pruning is shown at the best of all variants tried, variant by variant below.",
            "- **ImageNet**: 1,000 training images without labels, nothing trained, 1,000 validation images, standard "
            f"error 1.5, seed 0. Other draws of images at -30 %: {draws} ([table](#one-shot-deit-tiny), "
            "[Torch-Pruning](#beside-torch-pruning-one-shot-deit-tiny)). Torch-Pruning reads the labels.",
            "- **Dog breeds**: imagewoof-160 at 112 px. Every method starts from one dense model, trains on nine "
            "tenths of the training images for three epochs, and is scored on 2,000 validation images; standard error "
            f"0.8, one seed. The other tenth was for choices, such as that among {variants} variants of Torch-Pruning "
            "at -60 % ([table](#imagewoof-160-at-112-px-deit-tiny-nine-tenths-of-the-training-images)).",
            "- **CIFAR-10**: likewise, two epochs of 15,000 training images, 10,000 test images, standard error 0.3, "
            "one seed where no more are named ([table](#cifar-10-at-112-px-deit-tiny)).",
            "- **Saliency**: nothing trained, 200 photographs, overlap with the dense model's maps on 200 others, one "
            "seed ([table](#a-module-of-somebodys-own-saliency-maps)).",
            "- **Speed**: [throughput](#throughput) of random weights, in turns.",
            "`make demo`, a small ViT on scikit-learn's digits, 360 test images, standard error 0.8, seed 0, two CPU "
            "cores, in float32 as in bf16: dense 98.1 %, dense trained as long 97.2 %, pruned 97.5 % at -50.1 % "
            "parameters and -50.9 % MACs, in 3 minutes. A slower processor without units for bf16 ended at 97.8, "
            "97.8 and 98.1 %, in 9 minutes beside other work. One image more or less is 0.3 points.",
        ]
    )


def readme() -> str:
    """The README with its table made anew."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{rest.split(END)[1]}"


def draw_accuracy(axes: Axes) -> None:
    """Top-1 against parameters, all competitors."""
    for name, of in sorted(best_peers((read("peers_deit_tiny") or {"runs": {}})["runs"]).items()):
        points = sorted((run["params"] / 1e6, run["top1"]) for run in of.values())
        axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1, alpha=0.75, label=name)
    runs = (read("oneshot_deit_tiny") or {"runs": {}})["runs"]
    for suffix, style, label in (
        ("", "o-", "gohsp"),
        (" --allocation-stages=1", "^:", "gohsp, one stage of allocation"),
    ):
        keys = [f"{b} seed=0 images=1000{suffix}" for b in BUDGETS if b.startswith("params")]
        points = sorted((runs[k]["params"] / 1e6, runs[k]["top1"]) for k in keys if k in runs)
        points += [(DENSE_TINY[0] / 1e6, DENSE_TINY[2])] if not suffix else []
        if points:
            axes.plot(*zip(*points, strict=True), style, color=OURS, lw=2, ms=5, label=label)
    axes.plot(DENSE_TINY[0] / 1e6, DENSE_TINY[2], "k*", ms=10, label="dense")
    axes.set(xlabel="parameters, millions", ylabel="top-1, %", ylim=(0, 75))


def draw_images(axes: Axes) -> None:
    """Top-1 against calibration images at fixed widths."""
    lines = calibration_sizes((read("oneshot_deit_tiny") or {"runs": {}})["runs"])
    for (label, line), color in zip(lines.items(), (OURS, "#9aa5b5"), strict=True):
        axes.plot(*zip(*sorted(line.items()), strict=True), "o-", color=color, label=label)
    axes.set(xlabel="calibration images", ylabel="top-1, % (standard error 1.5)", ylim=(64, 72))


def draw_readme() -> None:
    """Top-1 against parameters, with nothing and with three epochs trained, beside the best of Torch-Pruning."""
    runs = (read("oneshot_deit_tiny") or {"runs": {}})["runs"]
    alone = [runs[key] for b in BUDGETS if b.startswith("params") and (key := f"{b} seed=0 images=1000") in runs]
    trained = by_method((read("own_data") or {"runs": {}})["runs"])
    if not alone or "no-ADMM" not in trained:
        return
    dense = {"params": DENSE_TINY[0], "top1": DENSE_TINY[2]}
    ours = [run for of in trained["no-ADMM"].values() for run in of]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for axes, title, start, line, peer in zip(
        figure.subplots(1, 2),
        ("ImageNet: no labels, no training", "dog breeds: three epochs of training"),
        (dense, trained["dense"][""][0]),
        (alone, ours),
        ("peers_deit_tiny", "own_data"),
        strict=True,
    ):
        theirs = best_by_budget(read(peer)).values()
        for found, color, label in ((line, OURS, "gohsp"), (theirs, "#9aa5b5", "Torch-Pruning, its best variant")):
            points = sorted((run["params"] / 1e6, run["top1"]) for run in (*found, start))
            axes.plot(*zip(*points, strict=True), "o-", color=color, lw=2, ms=5, label=label)
        axes.plot(start["params"] / 1e6, start["top1"], "k*", ms=12, label="dense")
        axes.set(title=title, xlabel="parameters of DeiT-Tiny, millions", ylabel="top-1, %", ylim=(0, 95))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(DOCS / "accuracy.svg", metadata={"Date": None})


def draw_comparison(name: str) -> None:
    """Top-1 of all methods against parameters and against MACs."""
    if (found := read(name)) is None:
        return
    methods = by_method(found["runs"])
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost, label in zip(panels, ("params", "macs"), ("parameters", "MACs"), strict=True):
        axes.set_prop_cycle(color=colormaps["tab20"](range(20)))  # there are more methods than colours by default
        for method, of in methods.items():
            points = sorted((runs[0][cost] / 1e6, mean_top1(runs)) for runs in of.values())
            if method == "start":
                continue
            if method == "dense":
                axes.plot(*points[0], "k*", ms=10, label=label_of(method))
            elif method in ("gohsp", "no-ADMM"):
                axes.plot(
                    *zip(*points, strict=True),
                    "o-" if method == "no-ADMM" else "s--",
                    color=OURS,
                    lw=2,
                    ms=5,
                    label=label_of(method),
                )
            else:
                axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1, alpha=0.75, label=label_of(method))
        axes.set(xlabel=f"{label}, millions")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="top-1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def draw_widths() -> None:
    """What a cut to 60 % of the parameters leaves of every block, as a report shows it."""
    if (found := read("imagewoof")) is None:
        return
    dense = gohsp.describe(timm.create_model("deit_tiny_patch16_224", img_size=112)).widths
    pruned = plan_of(found["runs"]["params=-40% seed=0"]["oneshot"]["plan"])
    plan = Plan(dense=dense, pruned=pruned, kept={name: keep_all(of) for name, of in pruned.items()})
    figure = plots.kept_widths(cast(Report, SimpleNamespace(plan=plan)))  # of a report it reads the plan alone
    figure.savefig(DOCS / "kept_widths.svg", metadata={"Date": None})


def draw() -> None:
    """Draw all plots."""
    with rc_context({"svg.hashsalt": "gohsp"}):
        draw_widths()
    with rc_context(STYLE):
        draw_readme()
        for name in COMPARISONS:
            draw_comparison(name)
        for name, plot in (("oneshot_accuracy", draw_accuracy), ("oneshot_images", draw_images)):
            figure = Figure(figsize=(6.4, 3.8), layout="constrained")
            axes = figure.add_subplot()
            plot(axes)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
            figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Write everything, or check the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    texts = {DOCS / "results.md": page(), README: readme()}
    if options.check:
        stale = [str(path) for path, text in texts.items() if not path.exists() or path.read_text() != text]
        sys.exit(f"{', '.join(stale)}: run python benchmarks/results_page.py" if stale else 0)
    for path, text in texts.items():
        path.write_text(text)
    draw()


if __name__ == "__main__":
    main()
