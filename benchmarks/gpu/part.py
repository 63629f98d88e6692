"""What all parts of the GPU run work with: time, device, images, and the JSON file that each leaves behind."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

CPU_FIGURES = Path("benchmarks/results/overhead.json")
"""What ``benchmarks/overhead.py`` measured on two CPU cores."""


@dataclass(frozen=True)
class Pace:
    """What a device is assumed to do, for estimates; what it really does is what the run measures.

    Attributes:
        macs: Multiply-accumulates a second in a ViT.
        passes: Speed of passes over images, over that of the two cores in ``CPU_FIGURES``.
        solves: Speed of linear algebra in float64, over theirs.
    """

    macs: float
    passes: float
    solves: float


GPU = Pace(macs=60e12, passes=100, solves=10)
CPU = Pace(macs=15e9, passes=0.2, solves=0.5)


@dataclass(frozen=True)
class Rows:
    """Rows of a parquet file.

    Attributes:
        file: The file's path under ``data/``, up to its shard number, such as ``cifar10/train``.
        first: The first row.
        count: How many.
    """

    file: str
    first: int
    count: int


class OutOfTimeError(Exception):
    """What is left of a part's time does not hold its next step."""


@dataclass
class Part:
    """One part of the run; what it has found is written after every step.

    Attributes:
        name: The part's name, which its file bears.
        out: Where files are left.
        assets: Where ``models/`` and ``data/`` lie.
        work: A folder for everything else.
        dry: Whether this is the dry run: tiny sizes, images of noise, on the CPU.
        ends: When its time is up, by ``time.monotonic``.
        results: What it has found; at first, what an earlier call had.
        errors: What failed, by step.
        expected: Seconds that its steps are expected to take.
        machine: What it runs on, once that is known: a GPU is asked in the part's own process alone.
        began: When, by ``time.monotonic``.
    """

    name: str
    out: Path
    assets: Path
    work: Path
    dry: bool
    ends: float
    results: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    machine: str = "unknown"
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU in a dry run."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def pace(self) -> Pace:
        """What estimates assume."""
        return CPU if self.dry else GPU

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def need(self, seconds: float, step: str) -> None:
        """Stop the part where less time is left than a step is expected to take.

        Raises:
            OutOfTimeError: It is.
        """
        if self.left < seconds:
            raise OutOfTimeError(f"{step} needs about {seconds:.0f} s, {max(self.left, 0):.0f} s are left")

    def begin(self, step: str) -> None:
        """Stop the part where not even half of what a step is expected to take is left: it may well be faster.

        Raises:
            OutOfTimeError: It is not.
        """
        self.need(self.expected[step] / 2, step)

    @contextmanager
    def attempt(self, step: str) -> Iterator[None]:
        """A step whose failure is recorded and does not stop those after it."""
        began = time.monotonic()
        try:
            yield
        except OutOfTimeError:
            raise
        except Exception:  # whatever it is: the next step may well work, and device time is rare
            self.errors[step] = traceback.format_exc()
            say(f"{self.name}: {step} FAILED\n{self.errors[step]}")
        else:
            say(f"{self.name}: {step}, {time.monotonic() - began:.1f} s")
        self.save("begun")

    def save(self, state: str, reason: str = "") -> None:
        """Write all that is known.

        Args:
            state: ``begun``, ``done``, ``failed`` or ``out of time``; what is still ``begun`` afterwards was cut off.
            reason: Why, where there is more to say.
        """
        content = {
            "part": self.name,
            "state": state,
            "reason": reason,
            "dry_run": self.dry,
            "machine": self.machine,
            "versions": versions(),
            "expected_seconds": {step: round(seconds, 1) for step, seconds in self.expected.items()},
            "seconds": round(time.monotonic() - self.began, 1),
            "errors": self.errors,
            "results": self.results,
        }
        write(self.out / f"{self.name}.json", content)

    def images(self, name: str, splits: Mapping[str, Rows], side: int) -> Path:
        """A folder of class folders, one a split, made of the assets or, in a dry run, of noise.

        Args:
            name: The folder's name.
            splits: What to make each split of.
            side: Of images of noise, in pixels.
        """
        folder = self.work / name
        for split, rows in splits.items():
            unpack(noise(rows, side) if self.dry else stored(self.assets, rows), folder / split)
        return folder


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON under another name and rename it, so that a cut-off leaves the file before it."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, file)


def read(file: Path) -> dict[str, Any]:
    """What :func:`write` left, or nothing."""
    return json.loads(file.read_text()) if file.exists() else {}


def machine(device: torch.device) -> str:
    """What was measured on."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}"


def versions() -> dict[str, str]:
    """Of what figures depend on, where it is installed."""
    found = {}
    for package in ("gohsp", "torch", "timm", "torch-pruning"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def stored(assets: Path, rows: Rows) -> Iterator[tuple[int, bytes]]:
    """Labels and encoded images of a parquet file."""
    folder, stem = (assets / "data" / rows.file).parent, Path(rows.file).name
    files = sorted(folder.glob(f"{stem}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no {stem}-*.parquet; set GOHSP_ASSETS to the folder with data/ in it")
    table = pyarrow.parquet.read_table(files[0]).slice(rows.first, rows.count)
    image, label = table.column_names
    for picture, number in zip(table[image].to_pylist(), table[label].to_pylist(), strict=True):
        yield number, picture["bytes"]


def noise(rows: Rows, side: int) -> Iterator[tuple[int, bytes]]:
    """Labels of ten classes and encoded images: coarse noise."""
    generator = np.random.default_rng(rows.first)
    for index in range(rows.count):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((side, side)).save(file, "JPEG")
        yield index % 10, file.getvalue()


def unpack(encoded: Iterator[tuple[int, bytes]], folder: Path) -> None:
    """Write images as they are into class folders, a source that needs no further package."""
    made = set()
    for index, (label, content) in enumerate(encoded):
        if label not in made:
            (folder / str(label)).mkdir(parents=True)
            made.add(label)
        (folder / str(label) / f"{index:06}.jpg").write_bytes(content)


def cpu_figures(model: str) -> dict[str, Any]:
    """What the parts of gohsp took two CPU cores on a model, as ``benchmarks/overhead.py`` writes it."""
    return read(CPU_FIGURES)["cpu"]["models"][model]
