"""Pictures of the one-shot results for the documentation: accuracy against parameters, and against calibration images.

    python benchmarks/plot_oneshot.py

Reads what ``oneshot.py`` and ``peers.py`` measured; writes ``docs/oneshot_accuracy.svg`` and ``oneshot_images.svg``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path("benchmarks/results")
DENSE = (5_717_416, 71.7)
"""DeiT-Tiny: parameters, and top-1 on the 1,000 validation images."""

STYLE = {"font.size": 9, "svg.hashsalt": "gohsp", "axes.spines.top": False, "axes.spines.right": False}
OURS = "#2563eb"


def read(name: str) -> dict[str, Any]:
    """The runs of a result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())["runs"]


def budgets(runs: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Parameters and top-1 of the parameter budgets, default settings, seed 0."""
    points = {
        r["params"]: r["top1"]
        for key, r in runs.items()
        if key.startswith("params=") and r["seed"] == 0 and r["images"] == 1000 and not r["flags"]
    }
    return sorted([*points.items(), DENSE])


def peers(runs: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """For every criterion and scope of Torch-Pruning, its best variant at each budget."""
    best: dict[str, dict[str, tuple[int, float]]] = {}
    for key, run in runs.items():
        method, budget = key.split(" ")[:2]
        if method == "gohsp":
            continue
        name = " ".join(method.split("/")[:2])
        of_name = best.setdefault(name, {})
        if budget not in of_name or run["top1"] > of_name[budget][1]:
            of_name[budget] = (run["params"], run["top1"])
    return {name: sorted(points.values()) for name, points in best.items()}


def accuracy(axes: Axes) -> None:
    """Top-1 against parameters, all competitors."""
    for name, points in sorted(peers(read("peers_deit_tiny")).items()):
        axes.plot(*zip(*[(p / 1e6, t) for p, t in points], strict=True), "o-", ms=4, lw=1, alpha=0.75, label=name)
    ours = [(p / 1e6, t) for p, t in budgets(read("oneshot_deit_tiny"))]
    axes.plot(*zip(*ours, strict=True), "o-", color=OURS, lw=2, label="gohsp")
    axes.plot(DENSE[0] / 1e6, DENSE[1], "k*", ms=9, label="dense")
    axes.set(xlabel="parameters, millions", ylabel="top-1, %", ylim=(0, 75))


def images(axes: Axes) -> None:
    """Top-1 against calibration images at fixed widths, with and without mirror images."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, run in read("oneshot_deit_tiny").items():
        if key.startswith("plan ") and run["seed"] == 0:
            label = "without mirror images" if "--data.no-mirror" in run["flags"] else "with mirror images"
            lines.setdefault(label, []).append((run["images"], run["top1"]))
    for label, points in sorted(lines.items()):
        axes.plot(
            *zip(*sorted(points), strict=True), "o-", color=OURS if "out" not in label else "#9aa5b5", label=label
        )
    axes.set(xlabel="images", ylabel="top-1, %")


def main() -> None:
    """Draw both."""
    with rc_context(STYLE):
        for name, draw in (("oneshot_accuracy", accuracy), ("oneshot_images", images)):
            figure = Figure(figsize=(6.4, 3.8), layout="constrained")
            axes = figure.add_subplot()
            draw(axes)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
            figure.savefig(f"docs/{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
