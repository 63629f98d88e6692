"""What the benchmarks have in common: models and images, scores, the command line timed, machines, result files.

A script asks one question and imports what users import. Assets (``models/``, ``data/``) lie where ``GOHSP_ASSETS``
points to, by default beside the checkout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gohsp
from gohsp import data, structure
from gohsp.core.allocation import WidthSettings, allowed_widths
from gohsp.core.capture import device_of
from gohsp.evaluation import Metrics, evaluate
from gohsp.runtime import resolve_precision
from gohsp.structure import AttentionWidths, FfnWidths, SublayerWidths, Widths

RESULTS = Path("benchmarks/results")
_MAIN = "import sys; from gohsp.cli import main; sys.exit(main())"
_BATCH = 64

SETS = {"imagenet-1k-mini": None, "imagenet-1k-broad": 224 / 227}
"""Validation images of ImageNet, and the share of their side that is kept where it is not the model's own."""


# Arguments and assets


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def asset(name: str) -> Path:
    """A file or folder of the assets; without it the script ends with status 0, since it is skipped, not broken."""
    root = Path(os.environ.get("GOHSP_ASSETS", "../shared"))
    if not (root / name).exists():
        say(f"skipped: {root} holds no {name}; set GOHSP_ASSETS to the folder that does")
        sys.exit(0)
    return root / name


def data_name(source: str) -> str:
    """A data source without the folders of one machine."""
    return f"hfds/{Path(source).name}"


# The command line


def gohsp_command(*arguments: str) -> tuple[str, float, float]:
    """Run gohsp; returns its output, its wall time in seconds and its peak memory in MiB."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _MAIN, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"gohsp {' '.join(arguments)} failed with status {os.waitstatus_to_exitcode(status)}")
    return output, time.perf_counter() - began, usage.ru_maxrss / 1024


# Models and images


def transform_of(model: nn.Module) -> data.Transform:
    """What evaluation makes of an image for a model of timm's."""
    return data.eval_transform(data.Preprocessing.from_model(model))


def drawn(
    source: str,
    count: int,
    transform: data.Transform,
    *,
    split: str = "train",
    seed: int = 0,
    skip: int = 0,
    batch_size: int = _BATCH,
) -> list[Tensor]:
    """A fixed random draw of images without labels, in batches ``[B, C, H, W]``."""
    images = data.calibration_images(
        data.DataSource(source=source),
        split,
        count,
        transform=transform,
        seed=seed,
        skip=skip,
        batch_size=batch_size,
    )
    return list(images)


def classes_of(model: nn.Module) -> int:
    """Classes that a model of timm's tells apart."""
    found: Any = model.num_classes
    return int(found)


def scored(model: nn.Module, source: str, split: str = "validation", count: int | None = None) -> Metrics:
    """What a model of timm's scores on a split, or on its first ``count`` images."""
    batches: Iterable[Any] = data.loader(
        data.open_split(data.DataSource(source=source), split),
        transform=transform_of(model),
        batch_size=_BATCH if count is None else min(count, _BATCH),
        shuffle=False,
        num_classes=classes_of(model),
    )
    if count is not None:
        batches = (batch for batch, _ in zip(batches, range(-(-count // min(count, _BATCH))), strict=False))
    return evaluate(model, batches)


def sets_of_both(like: nn.Module) -> dict[str, Iterable[Any]]:
    """Batches of images and labels: the validation images of imagenet-1k-mini and of imagenet-1k-broad.

    Args:
        like: The model of timm's by whose configuration images are prepared.
    """
    preprocessing = data.Preprocessing.from_model(like)
    return {
        name: data.loader(
            data.open_split(data.DataSource(source=f"hfds/{asset(f'data/{name}')}"), "validation"),
            transform=data.eval_transform(preprocessing if kept is None else replace(preprocessing, crop_pct=kept)),
            batch_size=_BATCH,
            shuffle=False,
            num_classes=classes_of(like),
        )
        for name, kept in SETS.items()
    }


def scores_on_both(model: nn.Module, sets: Mapping[str, Iterable[Any]]) -> dict[str, float]:
    """Top-1 in percent on each of two sets of images, and on both together; in bf16 where that is faster.

    Args:
        model: Returns logits of ImageNet's classes.
        sets: As of :func:`sets_of_both`; in memory where several models are scored.
    """
    right: dict[str, tuple[int, int]] = {}
    precision = resolve_precision("auto", device_of(model))
    for name, batches in sets.items():
        metrics = evaluate(model, batches, precision=precision)
        right[name] = round(metrics.top1 * metrics.n / 100), metrics.n
    right["both"] = sum(count for count, _ in right.values()), sum(n for _, n in right.values())
    return {name: round(100 * count / n, 2) for name, (count, n) in right.items()}


def example_of(model: nn.Module) -> Tensor:
    """Noise ``[1, C, H, W]`` of the size that a model of timm's takes."""
    config: Any = model.pretrained_cfg
    embed: Any = model.patch_embed
    side = embed.img_size or config["input_size"][1:]
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, config["input_size"][0], *side), generator=generator)


def changed(widths: Widths, change: Callable[[str, int], int]) -> dict[str, SublayerWidths]:
    """Widths with every count passed through ``change``, which is told its field (heads, qk, vo, units)."""
    return {
        name: type(of)(**{field: change(field, count) for field, count in table.items()})
        for (name, of), table in zip(widths.items(), structure.widths_to_json(widths).values(), strict=True)
    }


def even_widths(
    network: structure.Network, budget: str, settings: WidthSettings | None = None
) -> dict[str, SublayerWidths]:
    """The plain way to compare with: the same share of every width, all heads kept, nothing measured.

    Room that rounding leaves is given to FFNs, last one first.

    Args:
        network: The network.
        budget: Of parameters or MACs; a script that asks for less than all heads allow ends.
        settings: Allowed widths; None for the defaults.
    """
    settings = settings or WidthSettings()
    bound = structure.bound_for(network, structure.parse_budget(budget))

    def allowed(sub: structure.PresentSublayer, kind: structure.Kind) -> tuple[int, ...]:
        have = structure.width(sub.widths, kind)
        return (have,) if kind == "head" else allowed_widths(sub, kind, settings)

    def at(share: float) -> dict[str, SublayerWidths]:
        widths = network.widths
        for sub in network.present:
            for kind in sub.widths.kinds:
                counts, most = allowed(sub, kind), share * structure.width(sub.widths, kind)
                fits = max((count for count in counts if count <= most), default=counts[0])
                widths[sub.name] = structure.narrowed(widths[sub.name], kind, fits)
        return widths

    if not bound.met(network, at(0.0)):
        sys.exit(f"no even widths with all heads meet {budget}")
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if bound.met(network, at(middle)) else (low, middle)
    widths = at(low)
    for sub in reversed([sub for sub in network.present if isinstance(sub, structure.Ffn)]):
        for units in allowed(sub, "ffn"):
            trial = widths | {sub.name: FfnWidths(units=max(units, structure.width(widths[sub.name], "ffn")))}
            widths = trial if bound.met(network, trial) else widths
        if bound.of(network, widths) > 0.995 * bound.limit:
            break
    return widths


def resized(model: nn.Module, widths: Widths, images: Tensor) -> nn.Module:
    """A model of other widths, with the first units of the present one: for clocks, and for training anew."""
    kept = {name: structure.keep_all(of) for name, of in widths.items()}
    return gohsp.compact(model, kept, images).model


def params_of(model: nn.Module, widths: Widths) -> int:
    """Parameters of a model cut down to ``widths``."""
    return int(structure.cost_of(gohsp.describe(model), widths, structure.PARAMS))


def parameters(model: nn.Module) -> int:
    """The number of parameters of any module."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image, of any module; attention by plain products, so that they are counted."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example)
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]
    return counter.get_total_flops() // 2


# Results


def read_results(file: Path, empty: Mapping[str, Any]) -> dict[str, Any]:
    """What a results file holds so far, or an empty one."""
    return json.loads(file.read_text()) if file.exists() else dict(empty)


def write_results(file: Path, results: Mapping[str, Any]) -> None:
    """Write a results file whole or not at all: a stopped run loses the row that it was at."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, file)


def plan_of(plan: Any) -> dict[str, SublayerWidths]:
    """Widths of a results file: by sub-layer or, where gohsp 0.1 wrote it, a list of timm's blocks."""
    if isinstance(plan, Mapping):
        return structure.widths_from_json(plan)
    widths: dict[str, SublayerWidths] = {}
    for index, block in enumerate(plan):
        attention = {field: block[field] for field in ("heads", "qk", "vo")}
        widths[f"blocks.{index}.attn"] = AttentionWidths(**attention)
        widths[f"blocks.{index}.mlp"] = FfnWidths(units=block["ffn"])
    return widths


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What the clock depends on."""
    units = {"AMX": "_is_amx_tile_supported", "AVX-512 bf16": "_is_avx512_bf16_supported"}
    found = (name for name, query in units.items() if getattr(torch.cpu, query, lambda: False)())
    return {
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "processor": f"{platform.processor() or platform.machine()} with {next(found, 'no bf16 units')}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of gohsp, torch, timm and further packages."""
    return {name: importlib.metadata.version(name) for name in ("gohsp", "torch", "timm", *packages)}


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
