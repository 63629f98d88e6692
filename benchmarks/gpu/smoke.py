"""The paths that a GPU takes, and whether it computes on them what the CPU does."""

from __future__ import annotations

import copy
import dataclasses
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
from gohsp import data, models
from gohsp import latency as clock
from gohsp.core import sensitivity
from gohsp.recipe import DataSettings
from gpu.part import Part, Rows, cpu_figures

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
    latency: clock.LatencySettings


FULL = Size(
    model="deit_tiny_patch16_224",
    arguments={},
    weights="deit_tiny_patch16_224.safetensors",
    images=96,
    calibration=64,
    side=224,
    steps=8,
    batch=16,
    latency=clock.LatencySettings(batch_size=256, dtype="bfloat16"),  # fewer images wait for launches, not for widths
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
    latency=clock.LatencySettings(batch_size=2, rounds=3),
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


def halved(model: nn.Module) -> list[gohsp.BlockShape]:
    """Half of the hidden units and three quarters of the dimensions of every block."""
    shapes = gohsp.describe(model).shapes
    return [dataclasses.replace(s, qk=s.qk * 3 // 4, vo=s.vo * 3 // 4, ffn=s.ffn // 2) for s in shapes]


def recipe(part: Part, device: str, precision: Any) -> gohsp.Recipe:
    """A one-shot run on few images."""
    size = size_of(part)
    return gohsp.Recipe(
        route="oneshot",
        device="cpu" if device == "cpu" else "auto",
        training=gohsp.TrainingSettings(precision=precision),
        data=DataSettings(
            calibration_images=size.calibration,
            ranking_images=size.calibration,
            allocation_images=size.calibration,
            holdout_images=size.images - size.calibration,
        ),
        latency=clock.LatencySettings(rounds=3),
    )


def sides(part: Part) -> tuple[str, str]:
    """The devices to compare."""
    return "cpu", part.device.type


def cut(part: Part, dense: nn.Module, folder: Path) -> dict[str, Any]:
    """The same widths cut and repaired on both, in float32."""
    shapes = halved(dense)
    budget = f"params={gohsp.model_cost(gohsp.describe(dense), shapes, 'params')}"
    runs = [
        gohsp.prune(
            dense,
            str(folder),
            budget,
            part.work / f"cut-{i}",
            recipe=recipe(part, device, "no"),
            shapes=shapes,
            quiet=True,
        )
        for i, device in enumerate(sides(part))
    ]
    images = pixels(part, dense, folder)
    logits = [predictions(model, images) for model in (dense, *(run.model for run in runs))]
    own, apart = (max(sensitivity.divergence([a], [b]), 0.0) for a, b in (logits[:2], logits[1:]))
    kept = [[set(block["ffn"]) for block in run.report["plan"]["kept"]] for run in runs]
    same = sum(len(a & b) for a, b in zip(*kept, strict=True)) / sum(map(len, kept[0]))
    scores = [torch.tensor(run.report["ranking"]["scores"]) for run in runs]
    return {
        "divergence_of_cut": own,
        "divergence_between": apart,
        "agrees": apart <= AGREEMENT * own,
        "same_hidden_units_percent": round(100 * same, 2),
        "head_scores_differ_by": float((scores[0] - scores[1]).abs().max()),
        "compaction_differs_by": [run.report["equality"]["max_relative_difference"] for run in runs],
        "timings": runs[1].report["timings"],
    }


def pixels(part: Part, dense: nn.Module, folder: Path) -> Tensor:
    """The images as the model takes them, ``[N, C, H, W]``."""
    batches = data.calibration_images(
        gohsp.DataSource(source=str(folder)),
        "train",
        size_of(part).images,
        transform=data.eval_transform(data.Preprocessing.from_model(dense)),
        seed=0,
        strict=True,
    )
    return torch.cat(list(batches))


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
    structure, settings = gohsp.describe(model), gohsp.AdmmSettings(interval=2)
    moments = gohsp.collect_moments(model, structure, [images])
    state = gohsp.admm.start(model, structure, halved(model), moments, None, settings)
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
    settings = recipe(part, part.device.type, "auto")
    report = gohsp.prune(dense, str(folder), "params=-30%", part.work / "oneshot", recipe=settings, quiet=True).report
    kept = {key: report[key] for key in ("budget", "fidelity", "speed", "timings")}
    return kept | {"agrees": report["budget"]["achieved"] <= report["budget"]["limit"]}


def latency(part: Part, dense: nn.Module, folder: Path) -> dict[str, Any]:
    """What a latency table foretells of a cut, beside what is measured, both over the dense model's."""
    settings = size_of(part).latency
    model, images = copy.deepcopy(dense).to(part.device), pixels(part, dense, folder)
    structure, shapes = gohsp.describe(model), halved(model)
    table = clock.measure_table(model, structure, images, gohsp.WidthSettings(), settings)
    predicted = gohsp.model_cost(structure, shapes, table) / gohsp.model_cost(structure, structure.shapes, table)
    before, after = clock.compare([model, models.resized(model, shapes)], images, settings)
    return {
        "predicted": round(predicted, 3),
        "measured": round(after / before, 3),
        "dense_ms": before,
        "agrees": abs(predicted - after / before) <= FORESIGHT,
    }
