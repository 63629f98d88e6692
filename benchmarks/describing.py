"""What it costs to describe a model, to record how it calls its blocks, and to run them alone: three families.

    pip install 'gohsp[transformers]'
    python benchmarks/describing.py

Random weights and images at 224 px, float32; a pruning describes and records a few times, and runs blocks alone all the
time. Everything takes turns with the model's own forward pass, and is given in units of it, by medians: describing and
recording in passes of one image, the blocks alone, one after the other on the stream that each sends to the next, in
passes of the same images. Recording is a part that no user calls, and so is imported from inside.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import gohsp
from gohsp.core.capture import Trunk, open_trunk
from shared import RESULTS, machine, parser, say, versions, write_results


def of_transformers() -> nn.Module:
    """DINOv2 of the small size, as transformers has it."""
    library: Any = importlib.import_module("transformers")
    return library.Dinov2Model(
        library.Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm deit_tiny_patch16_224": lambda: timm.create_model("deit_tiny_patch16_224"),
    "timm swin_tiny_patch4_window7_224": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "transformers Dinov2Model, small": of_transformers,
}


def blocks_alone(trunk: Trunk, images: Tensor) -> Tensor:
    """All blocks, one after the other, outside of the model's forward."""
    stream = trunk.enter(images)
    for index in range(len(trunk.blocks)):
        stream = trunk.run(index, trunk.onto(index, stream))
    return stream


def medians(rounds: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Seconds that calls take when they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if round_ > 0:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(of) for name, of in times.items()}


@torch.no_grad()
def row(model: nn.Module, images: Tensor, rounds: int) -> dict[str, float]:
    """Costs over those of forward passes."""
    one = images[:1]
    network = gohsp.describe(model, one)
    trunk = open_trunk(model, network, one)
    of_one = medians(
        rounds,
        forward=lambda: model(one),
        describe=lambda: gohsp.describe(model, one),
        record=lambda: open_trunk(model, network, one),
    )
    of_all = medians(rounds, forward=lambda: model(images), alone=lambda: blocks_alone(trunk, images))
    return {
        "describe": round(of_one["describe"] / of_one["forward"], 2),
        "record": round(of_one["record"] / of_one["forward"], 2),
        "alone": round(of_all["alone"] / of_all["forward"], 3),
    }


def main() -> None:
    """Measure all models."""
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--results", type=Path, default=RESULTS / "describing.json")
    options = arguments.parse_args()
    torch.manual_seed(0)
    images = torch.randn(options.images, 3, 224, 224)
    results: dict[str, Any] = {
        "command": f"python benchmarks/describing.py --images {options.images} --rounds {options.rounds}",
        "machine": machine(),
        "versions": versions("transformers"),
        "runs": {},
    }
    for name, make in MODELS.items():
        results["runs"][name] = row(make().eval(), images, options.rounds)
        say(f"{name}: {results['runs'][name]}")
    write_results(options.results, results)


if __name__ == "__main__":
    main()
