"""One small run of ``gohsp prune``: what it is asked, and what must come out however often it was interrupted."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from robustness.child import Command, Ended, Home, Stop, gohsp

SETTINGS = """
method = "gohsp"
precision = "no"
compare_dense = false
[calibration]
images = 48
[widths]
multiple = 2
min_width = 2
[admm]
epochs = 1
[finetune]
epochs = 2
[training]
batch_size = 16
"""
VOLATILE = ("timings", "created", "command", "versions", "machine", "speed", "seconds", "digest")
"""What may differ in the reports of two equal runs; the digest covers the rest of it."""


@dataclass(frozen=True)
class Job:
    """What a run is asked for: the folder of its model, that of its images, and its settings."""

    model: Path
    images: Path
    settings: Path

    def begin(self, home: Home, *options: str, stop: Stop | None = None, output: str = "output") -> Command:
        """Begin the run, or go on with it."""
        asked = [str(self.model), "--data", str(self.images), "--budget", "params=-30%", "--config", str(self.settings)]
        return gohsp(["prune", *asked, "--out", str(home.run), *options], home, stop=stop, output=output)


def write_images(folder: Path) -> None:
    """Write a hundred images of ten classes: a few steps of training."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / ("train" if number < 80 else "validation") / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@dataclass(frozen=True)
class Result:
    """What matters of a finished run."""

    files: tuple[str, ...]
    weights: bytes
    report: dict[str, Any]
    plan: Any
    ranking: Any

    def difference(self, other: Result) -> str:
        """The first thing in which another result differs; empty if none does."""
        if self.files != other.files:
            return f"other files: {sorted(set(self.files) ^ set(other.files))}"
        if self.weights != other.weights:
            return "other weights"
        parts = ((k, self.report.get(k), other.report.get(k)) for k in {**self.report, **other.report})
        parts = (*parts, ("plan.json", self.plan, other.plan), ("ranking.json", self.ranking, other.ranking))
        return next((f"another {name}: {a!s:.200} for {b!s:.200}" for name, a, b in parts if a != b), "")


def result_of(folder: Path) -> Result:
    """Read a finished run."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("report", "plan", "ranking")}
    files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))
    weights = (folder / "model.safetensors").read_bytes()
    return Result(files, weights, _lasting(read["report"]), read["plan"], read["ranking"])


def _lasting(value: Any) -> Any:
    if isinstance(value, list):
        return [_lasting(inner) for inner in value]
    return {k: _lasting(v) for k, v in value.items() if k not in VOLATILE} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Whole:
    """A run without interruption.

    Attributes:
        home: Where it was.
        result: What it left.
        changes: How it changed which files its folder holds, in order.
        seconds: How long it took.
    """

    home: Home
    result: Result
    changes: tuple[str, ...]
    seconds: float


def carry_out(job: Job, home: Home) -> Whole:
    """Carry a run out without interruption."""
    command = job.begin(home)
    command.wait_for("begun")
    began = time.monotonic()
    ended = command.wait()
    assert ended.status == 0, ended.output
    changes = tuple(home.mark("changes").read_text().splitlines())
    return Whole(home, result_of(home.run), changes, time.monotonic() - began)


IDENTICAL, REFUSED = "identical", "refused"


def outcome(whole: Whole, home: Home, ended: Ended) -> tuple[str, str]:
    """How a run that was gone on with ended, next to one without interruption; and more about it."""
    if ended.crashed:
        return "traceback", ended.tail
    try:
        difference = whole.result.difference(result_of(home.run))
    except (OSError, ValueError) as error:
        difference = str(error)
    if not difference and ended.status in (0, 1):  # 1: it was finished before
        return IDENTICAL, ""
    if ended.status:
        return REFUSED if ended.refused else f"exit status {ended.status}", ended.tail
    return "different", difference


def fresh(home: Home) -> Home:
    """The same place, emptied."""
    shutil.rmtree(home.path, ignore_errors=True)
    home.path.mkdir(parents=True)
    return home
