"""Cost of the ADMM stage: step time and memory with and without it, side by side in one process.

    python benchmarks/admm_overhead.py --out benchmarks/results/admm_overhead.json

Steps with ADMM (pull after every step, Z- and U-steps at the default interval, selections included) and plain
steps take turns in short rounds, so that a drifting machine hits both alike; the ratio of medians over rounds is
what counts. Random images; the weights do not matter to the clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

import gohsp
from gohsp import models, training
from gohsp.core import admm


class Side:
    """One model with its optimiser, with or without ADMM."""

    def __init__(self, model: torch.nn.Module, options: argparse.Namespace, *, pruned: bool) -> None:
        self.model, self.options = model, options
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.05, fused=True)
        self.state = None
        if pruned:
            structure = gohsp.describe(model)
            images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
            moments = gohsp.rotate(model, structure, gohsp.collect_moments(model, structure, [images]))
            shapes = [
                gohsp.BlockShape(heads=s.heads, qk=s.qk // 2, vo=s.vo // 2, ffn=s.ffn // 2) for s in structure.shapes
            ]
            settings = gohsp.AdmmSettings(penalty=options.penalty)
            self.state = admm.start(model, structure, shapes, moments, None, settings)

    def step(self, images: torch.Tensor, labels: torch.Tensor, progress: float) -> None:
        """One training step."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.options.bf16):
            logits = self.model(images)
        F.cross_entropy(logits.float(), labels).backward()
        if self.state is not None:
            admm.add_penalty_gradients(self.state)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.state is not None:
            self.state = admm.after_step(self.state, progress)

    def extra_bytes(self) -> int:
        """Memory that ADMM's state holds: anchors, duals and moments."""
        if self.state is None:
            return 0
        tensors = [t for side in (self.state.anchors, self.state.duals) for values in side for t in values.values()]
        tensors += [t for m in self.state.moments for t in (m.attention_input, m.head_outputs, m.hidden)]
        return sum(t.numel() * t.element_size() for t in tensors)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both sides in turns over one whole ADMM schedule."""
    torch.manual_seed(options.seed)
    dense = timm.create_model(options.model, img_size=options.size, num_classes=10).to(options.device)
    models.set_fused_attention(dense, options.device != "cpu")
    sides = {"plain": Side(dense, options, pruned=False), "admm": Side(copy.deepcopy(dense), options, pruned=True)}
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    labels = torch.randint(0, 10, (options.batch,), device=options.device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    rounds = options.steps // options.round
    for number in range(-1, rounds):  # round -1 warms up
        for name, side in sides.items():
            began = time.perf_counter()
            for i in range(options.round):
                side.step(images, labels, max(0.0, (number * options.round + i + 1) / options.steps))
            if options.device != "cpu":
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append((time.perf_counter() - began) / options.round)
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    total = {name: sum(t) for name, t in times.items()}
    return {
        "step_seconds_median": {name: statistics.median(t) for name, t in times.items()},
        "ratio_of_medians": statistics.median(times["admm"]) / statistics.median(times["plain"]),
        "ratio_of_sums": total["admm"] / total["plain"],
        "ratio_median_of_rounds": statistics.median(a / p for a, p in zip(times["admm"], times["plain"], strict=True)),
        "rounds": rounds,
        "weights_bytes": weights,
        "admm_state_bytes": sides["admm"].extra_bytes(),
    }


def main() -> None:
    """Measure both penalties and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--round", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.bf16 = training.resolve_precision("auto", cpu=options.device == "cpu") == "bf16"
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "bf16": options.bf16}
    result["machine"] = {
        "processor": platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for options.penalty in ("decoupled", "coupled"):
        result[options.penalty] = measure(options)
        sys.stdout.write(f"{options.penalty}: {json.dumps(result[options.penalty], indent=1)}\n")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
