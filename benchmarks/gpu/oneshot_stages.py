"""What the steps of method oneshot take by model size, and the most memory that it holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

import gohsp
from gohsp.config import CalibrationSettings, Config
from gpu.part import Part, Rows, cpu_figures
from throughput import peak_resident

BUDGET = "params=-30%"


@dataclass(frozen=True)
class Size:
    """What the run and the dry run differ in."""

    models: tuple[str, ...]
    arguments: Mapping[str, Any]
    calibration: CalibrationSettings
    side: int

    @property
    def images(self) -> int:
        """Calibration and held-out images."""
        return self.calibration.images + self.calibration.holdout


ANALYSED, CURVES_ON = 256, 128
"""Images that a run ranks heads on, and measures damage curves on."""

FULL = Size(("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"), {}, CalibrationSettings(), 32)
DRY = Size(("test_vit",), {"depth": 2}, CalibrationSettings(images=16, holdout=8), 160)


def size_of(part: Part) -> Size:
    """The run's or the dry run's."""
    return DRY if part.dry else FULL


def expected(part: Part) -> dict[str, float]:
    """Seconds of each model."""
    size = size_of(part)
    if part.dry:
        return {"start": 1} | dict.fromkeys(size.models, 5.0)
    return {"start": 5} | {name: scaled(part, name, size.calibration) for name in size.models}


def scaled(part: Part, name: str, settings: CalibrationSettings) -> float:
    """Seconds, from the CPU's: passes over more images, and as many solves."""
    figures = cpu_figures(name)
    views = 2 * settings.images  # with mirror images
    ranking, curves = figures["ranking"], figures.get("curves") or larger_curves(figures["params"])
    passes = (
        ANALYSED * ranking["seconds"] / ranking["images"]
        + CURVES_ON * curves["seconds"] / curves["images"]
        + views * figures["solves"]["an_image"]
    )
    return passes / part.pace.passes + figures["solves"]["seconds"] / part.pace.solves


def larger_curves(params: int) -> dict[str, float]:
    """Damage curves of a model that the CPU did not measure, by the power that they grow with (``docs/results.md``)."""
    small = cpu_figures("deit_small_patch16_224")
    growth = (params / small["params"]) ** 1.13
    return {"seconds": small["curves"]["seconds"] * growth, "images": small["curves"]["images"]}


def measure(part: Part) -> None:
    """Run every model that has not been run."""
    size = size_of(part)
    # Photographs at 32 px, enlarged: what they show does not matter to the clock.
    folder = part.images("few", {"train": Rows("cifar10/train", 0, size.images)}, size.side)
    runs = part.results.setdefault("runs", {})
    for name in size.models:
        if name in runs:
            continue
        part.begin(name)
        with part.attempt(name):
            runs[name] = timed(part, name, folder)


def timed(part: Part, name: str, folder: Path) -> dict[str, Any]:
    """One run of a model with drawn weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, **size_of(part).arguments)
    config = Config(device="cpu" if part.dry else "auto", calibration=size_of(part).calibration)
    if not part.dry:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run = gohsp.run(model, str(folder), BUDGET, part.work / name, config=config)
    seconds = time.perf_counter() - began
    peak = peak_resident() / 2**10 if part.dry else torch.cuda.max_memory_allocated() / 2**20
    return {
        "params": run.report.dense.params,
        "budget": BUDGET,
        "images": size_of(part).calibration.images,
        "seconds": round(seconds, 1),
        "timings": run.report.timings,
        "peak_memory_mib": round(peak),
    }
