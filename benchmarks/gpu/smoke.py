"""The paths that a GPU takes, and whether it computes on them what the CPU does."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gohsp
from gohsp import latency as clock
from gohsp import structure
from gohsp.config import CalibrationSettings, Config, LatencySettings
from gohsp.structure import FfnKept, SublayerWidths
from gpu.part import Part, Rows, cpu_figures
from shared import changed, drawn, params_of, resized, transform_of

AGREEMENT = 0.05
"""Largest divergence between what the CPU and the GPU make of a cut, as a share of the cut's own; float32 sums differ
in their last bits, and a near tie between two units may go either way."""

STEPS_APART = 1e-3
"""Largest relative difference between weights after the same steps of ADMM."""

FORESIGHT = 0.1
"""Largest difference between a cut's foretold and measured time, as a share of the dense model's."""


@dataclass(frozen=True)
class Size:
    """What the run and the dry run differ in."""

    model: str
    arguments: Mapping[str, Any]
    weights: str | None
    images: int
    calibration: int
    side: int
    steps: int
    batch: int
    latency: LatencySettings


FULL = Size(
    model="deit_tiny_patch16_224",
    arguments={},
    weights="deit_tiny_patch16_224.safetensors",
    images=96,
    calibration=64,
    side=224,
    steps=8,
    batch=16,
    latency=LatencySettings(batch_size=256, dtype="bfloat16"),  # fewer images wait for launches, not for widths
)
DRY = Size(
    model="test_vit",
    arguments={"depth": 2},
    weights=None,
    images=24,
    calibration=16,
    side=160,
    steps=2,
    batch=4,
    latency=LatencySettings(batch_size=2, rounds=3),
)


def size_of(part: Part) -> Size:
    """The run's or the dry run's."""
    return DRY if part.dry else FULL


def expected(part: Part) -> dict[str, float]:
    """Seconds of each step."""
    size = size_of(part)
    figures = cpu_figures(FULL.model)
    views = 2 * size.calibration  # with mirror images
    cpu = figures["solves"]["seconds"] + views * figures["solves"]["an_image"]
    step = figures["admm"]["seconds"]["plain_step"] * size.batch / figures["admm"]["batch"]
    moments = figures["moments"]["seconds"] * size.images / figures["moments"]["images"]
    curves = figures["curves"]["seconds"] * size.calibration / figures["curves"]["images"]
    # On the CPU in float32, which takes two of its cores twice as long as bf16; there are more of them beside a GPU.
    both = cpu / 2 + cpu / part.pace.passes
    return {
        "start": 5,
        "cut": 0.1 * both if part.dry else both,
        "ADMM": 1 if part.dry else size.steps * step + moments / 2,
        "one-shot": 1 if part.dry else (curves + cpu) / part.pace.passes + figures["solves"]["seconds"],
        "latency": 1 if part.dry else 10 + (curves + cpu) / part.pace.passes,
    }


def measure(part: Part) -> None:
    """Run every check that has not been run."""
    size = size_of(part)
    folder = part.images("imagenet", {"train": Rows("imagenet-1k-mini/train", 0, size.images)}, size.side)
    dense = opened(part, size)
    checks = part.results.setdefault("checks", {})
    for name, check in {"cut": cut, "ADMM": admm, "one-shot": oneshot, "latency": latency}.items():
        if name in checks:
            continue
        part.begin(name)
        with part.attempt(name):
            began = time.perf_counter()
            checks[name] = check(part, dense, folder) | {"seconds": round(time.perf_counter() - began, 1)}


def opened(part: Part, size: Size) -> nn.Module:
    """The dense model, on the CPU."""
    torch.manual_seed(0)
    if size.weights is None:
        return timm.create_model(size.model, **size.arguments).eval()
    return gohsp.open_model(size.model, weights=part.assets / "models" / size.weights)


def halved(model: nn.Module) -> dict[str, SublayerWidths]:
    """Half of the hidden units and three quarters of the dimensions of every block."""
    shares = {"heads": (1, 1), "qk": (3, 4), "vo": (3, 4), "units": (1, 2)}
    return changed(gohsp.describe(model).widths, lambda field, now: now * shares[field][0] // shares[field][1])


def settings_of(part: Part, device: str, precision: Any) -> Config:
    """A one-shot run on few images."""
    size = size_of(part)
    return Config(
        device="cpu" if device == "cpu" else "auto",
        precision=precision,
        calibration=CalibrationSettings(images=size.calibration, holdout=size.images - size.calibration),
        latency=LatencySettings(rounds=3),
    )


def sides(part: Part) -> tuple[str, str]:
    """The devices to compare."""
    return "cpu", part.device.type


def cut(part: Part, dense: nn.Module, folder: Path) -> dict[str, Any]:
    """The same widths cut and repaired on both, in float32."""
    widths = halved(dense)
    budget = f"params={params_of(dense, widths)}"
    runs = [
        gohsp.run(
            dense,
            str(folder),
            budget,
            part.work / f"cut-{i}",
            config=settings_of(part, device, "no"),
            widths=widths,
        )
        for i, device in enumerate(sides(part))
    ]
    images = pixels(part, dense, folder)
    logits = [predictions(model, images) for model in (dense, *(run.model for run in runs))]
    divergence = gohsp.classification().distance
    own, apart = (max(float(divergence(a, b).mean()), 0.0) for a, b in (logits[:2], logits[1:]))
    kept = [[set(of.units) for of in run.report.plan.kept.values() if isinstance(of, FfnKept)] for run in runs]
    same = sum(len(a & b) for a, b in zip(*kept, strict=True)) / sum(map(len, kept[0]))
    scores = [torch.tensor(list(run.report.ranking.scores.values())) for run in runs]
    return {
        "divergence_of_cut": own,
        "divergence_between": apart,
        "agrees": apart <= AGREEMENT * own,
        "same_hidden_units_percent": round(100 * same, 2),
        "head_scores_differ_by": float((scores[0] - scores[1]).abs().max()),
        "compaction_differs_by": [run.report.equality.max_relative_difference for run in runs],
        "timings": runs[1].report.timings,
    }


def pixels(part: Part, dense: nn.Module, folder: Path) -> Tensor:
    """The images as the model takes them, ``[N, C, H, W]``."""
    return torch.cat(drawn(str(folder), size_of(part).images, transform_of(dense)))


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities ``[N, classes]``, on the CPU."""
    return model.cpu().eval()(images).log_softmax(-1)


def admm(part: Part, dense: nn.Module, folder: Path) -> dict[str, Any]:
    """The same steps of training with ADMM's pull on both, in float32, then the projection and the compaction."""
    images = pixels(part, dense, folder)
    ends = [stepped(part, dense, images.to(device)) for device in sides(part)]
    apart = difference(ends[0][0], ends[1][0])
    return {
        "weights_differ_by": apart,
        "agrees": apart <= STEPS_APART,
        "compaction_differs_by": [end[1] for end in ends],
        "primal_residuals": [end[2] for end in ends],
    }


def stepped(part: Part, dense: nn.Module, images: Tensor) -> tuple[Tensor, float, list[float]]:
    """All weights after the steps, how far compaction moves the logits, and ADMM's primal residuals."""
    size, device = size_of(part), images.device
    model = copy.deepcopy(dense).to(device).train()
    network, settings = gohsp.describe(model), gohsp.AdmmSettings(interval=2)
    moments = gohsp.collect_moments(model, network, [images])
    state = gohsp.admm.start(model, network, halved(model), moments, None, settings)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    labels = torch.arange(size.batch, device=device)
    for step in range(size.steps):
        F.cross_entropy(model(images[: size.batch]), labels).backward()
        gohsp.admm.add_penalty_gradients(state)
        optimizer.step()
        optimizer.zero_grad()
        state = gohsp.admm.after_step(state, (step + 1) / size.steps)
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    plan = gohsp.admm.finish(state)
    compaction = gohsp.compact(model.eval(), plan, images[:8])
    return weights, compaction.max_relative_difference, [record.primal for record in state.trace]


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, by norms."""
    return float((a - b).norm() / a.norm())


def oneshot(part: Part, dense: nn.Module, folder: Path) -> dict[str, Any]:
    """A run as a user makes it, in mixed precision."""
    settings = settings_of(part, part.device.type, "auto")
    found = gohsp.run(dense, str(folder), "params=-30%", part.work / "oneshot", config=settings).report
    report = found.model_dump(mode="json")
    kept = {key: report[key] for key in ("budget", "fidelity", "speed", "timings")}
    return kept | {"agrees": found.budget.achieved <= found.budget.limit}


def latency(part: Part, dense: nn.Module, folder: Path) -> dict[str, Any]:
    """What measured sub-layers foretell of a cut, beside what is measured, both over the dense model's."""
    settings = size_of(part).latency
    model, images = copy.deepcopy(dense).to(part.device), pixels(part, dense, folder)
    network, widths = gohsp.describe(model), halved(model)
    times = clock.measure_times(model, network, images, Config().widths, settings)
    predicted = structure.cost_of(network, widths, times) / structure.cost_of(network, network.widths, times)
    before, after = clock.compare([model, resized(model, widths, images[:2])], images, settings)
    return {
        "predicted": round(predicted, 3),
        "measured": round(after / before, 3),
        "dense_ms": before,
        "agrees": abs(predicted - after / before) <= FORESIGHT,
    }
