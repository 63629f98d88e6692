"""What ADMM adds to a training step, and what ranking takes, as ``benchmarks/overhead.py`` measures it."""

from __future__ import annotations

import argparse

import overhead
from gpu.part import Part, cpu_figures

FULL = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
DRY = ("test_vit",)
PARTS = ("admm", "ranking")


def options_of(part: Part, name: str, which: str) -> argparse.Namespace:
    """What ``benchmarks/overhead.py`` is asked for."""
    sizes = ("--images", "4", "--batch", "2", "--rounds", "1") if part.dry else ("--images", "256", "--batch", "64")
    return overhead.parser_of().parse_args(
        ["--models", name, "--parts", which, *sizes, "--device", part.device.type, "--seed", "0"]
    )


def steps(part: Part) -> list[tuple[str, str]]:
    """Models and what is measured of them."""
    return [(name, which) for name in (DRY if part.dry else FULL) for which in PARTS]


def expected(part: Part) -> dict[str, float]:
    """Seconds of each step."""
    if part.dry:
        return {f"{name}, {which}": 2.0 for name, which in steps(part)}
    return {f"{name}, {which}": scaled(part, name, which) for name, which in steps(part)}


def scaled(part: Part, name: str, which: str) -> float:
    """Seconds, from the CPU's: passes and solves, in turns."""
    figures, options = cpu_figures(name), options_of(part, name, which)
    turns = options.rounds + 1
    if which == "ranking":
        once = figures["ranking"]["seconds"] * options.images / figures["ranking"]["images"]
        return 2 + 3 * turns * once / part.pace.passes
    admm, moments = figures["admm"], figures["moments"]
    passes = moments["seconds"] * options.images / moments["images"]
    passes += turns * admm["seconds"]["plain_step"] * options.batch / admm["batch"]
    solves = (turns + 1) * (admm["seconds"]["z_step"] + admm["seconds"]["selecting_z_step"])
    return 2 + passes / part.pace.passes + solves / part.pace.solves


def measure(part: Part) -> None:
    """Measure what has not been measured, smallest models first."""
    record = part.results.setdefault(part.device.type, {"models": {}})
    record |= overhead.header()
    for name, which in steps(part):
        if which in record["models"].get(name, {}):
            continue
        step = f"{name}, {which}"
        part.begin(step)
        with part.attempt(step):
            found = overhead.measured(options_of(part, name, which), name)
            record["models"].setdefault(name, {}).update(found)
