"""Throughput of dense and pruned models, as ``benchmarks/throughput.py`` measures it: what is fast to measure first."""

from __future__ import annotations

import argparse

import throughput
from gpu.part import Part

COMPILE = 14.0
"""Seconds that one graph is assumed to take to compile; a pair is two."""

FULL = (("deit_small_patch16_224", "deit_base_patch16_224"), throughput.CASES["cuda"], 11)
DRY = (("test_vit",), [("float32", 1, False), ("float32", 2, False)], 2)
"""Models, cases, rounds."""

EAGER = 3.0
"""Seconds of a pair that is not compiled: making it, warming up, taking turns, a profile."""

Pair = tuple[argparse.Namespace, throughput.Case]


def pairs(part: Part) -> list[Pair]:
    """Models and cases, uncompiled ones first, then the largest batches."""
    names, cases, rounds = DRY if part.dry else FULL
    flags = ["--device", part.device.type, "--rounds", str(rounds)]
    found = [(throughput.parser_of().parse_args([name, *flags]), case) for case in cases for name in names]
    return sorted(found, key=lambda pair: (pair[1][2], -pair[1][1]))


def expected(part: Part) -> dict[str, float]:
    """Seconds of each step."""
    eager = 0.3 if part.dry else EAGER
    steps = {"start": 2 * eager}
    for options, case in pairs(part):
        steps[named(options, case)] = 2 * COMPILE if case[2] else eager
    return steps


def named(options: argparse.Namespace, case: throughput.Case) -> str:
    """A pair's step."""
    return f"{options.model}, {case[0]}, batch {case[1]}{', compiled' if case[2] else ''}"


def measure(part: Part) -> None:
    """Measure every pair that has not been measured."""
    for options, case in pairs(part):
        key, step = f"{throughput.named(options)} {options.device}", named(options, case)
        if case in [(c["dtype"], c["batch"], c["compiled"]) for c in part.results.get(key, {"cases": []})["cases"]]:
            continue
        part.begin(step)
        with part.attempt(step):
            found = throughput.measured(options, case, fresh=False)
            part.results.setdefault(key, throughput.header(options))["cases"].append(found)
