"""Pack what ``run.sh`` needs on a machine without a network: wheels, weights, images.

    GOHSP_ASSETS=../shared python benchmarks/gpu/collect.py            # into scratch/gpu, which git ignores

It needs gohsp installed with its ``bench`` extra, pip and a package index. The machine is taken to be x86-64 Linux with
Python 3.12 and the packages in ``THERE``; every other package that gohsp and the benchmarks import goes along as a
wheel, in the version that is installed here. Everything and the checkout together must not exceed 64 MiB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pyarrow.parquet
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

LIMIT = 64 * 2**20
"""Bytes that may travel."""

THERE = (
    "pyarrow",
    "rich",
    "safetensors",
    "scikit-learn",
    "timm",
    "torch",
    "torchvision",
)
"""What the machine has, with all that these depend on."""

WANTED = ("gohsp", "torch-pruning")
"""What is imported there."""

PYTHON = "3.12"
PLATFORMS = ("manylinux2014", *(f"manylinux_2_{minor}" for minor in (17, 24, 26, 27, 28, 31, 34)))

WEIGHTS = "models/deit_tiny_patch16_224.safetensors"
CIFAR = "data/cifar10"
IMAGENET = "data/imagenet-1k-mini"
IMAGES = 96
"""ImageNet training images that are cut out of their file: what the smoke run takes."""


def main() -> None:
    """Pack, and refuse what is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/gpu"), help="a folder of this checkout; made anew")
    out = parser.parse_args().out
    assets = Path(os.environ.get("GOHSP_ASSETS", "../shared"))
    if not (assets / WEIGHTS).is_file():
        sys.exit(f"{assets} holds no {WEIGHTS}; set GOHSP_ASSETS to the folder with models/ and data/ in it")
    if out.exists() and not (out / "wheels").is_dir():
        sys.exit(f"{out} was not made by this script; name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    collect_wheels(out / "wheels")
    collect_assets(assets, out)
    sizes = {str(path): folder_size(path) for path in sorted(out.iterdir())} | {"the checkout": checkout_size()}
    for name, size in sizes.items():
        sys.stdout.write(f"{size / 2**20:6.1f} MiB  {name}\n")
    total = sum(sizes.values())
    if total > LIMIT:
        sys.exit(f"{total / 2**20:.1f} MiB in all, {LIMIT / 2**20:.0f} may travel; leave some of it out")
    sys.stdout.write(f"{total / 2**20:6.1f} MiB in all, of {LIMIT / 2**20:.0f}\n")


def collect_wheels(folder: Path) -> None:
    """Download the wheels of what is missing there, and build gohsp's own."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    platforms = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    missing = sorted(closure(WANTED) - closure(THERE) - {"gohsp"})
    pinned = [f"{name}=={metadata.version(name)}" for name in missing]
    where = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:", *platforms]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", *where, "--dest", str(folder), *pinned], check=True)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "."], check=True)


def closure(names: tuple[str, ...]) -> set[str]:
    """These packages and all that they depend on there, by normalised names."""
    found: set[str] = set()
    open_ = [normalised(name) for name in names]
    while open_:
        name = open_.pop()
        if name in found:
            continue
        found.add(name)
        open_ += needed(name)
    return found


def needed(name: str) -> list[str]:
    """What a package depends on there, of gohsp with its command line; nothing of one that is not installed here."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": "cli" if name == "gohsp" else ""}
    requirements = [Requirement(line) for line in lines]
    return [normalised(r.name) for r in requirements if r.marker is None or r.marker.evaluate(there)]


def normalised(name: str) -> str:
    """As indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def collect_assets(assets: Path, out: Path) -> None:
    """Copy the weights in half precision and CIFAR-10, and cut a few images out of ImageNet's."""
    for folder in ("models", CIFAR, IMAGENET):
        (out / folder).mkdir(parents=True)
    save_file({name: tensor.half() for name, tensor in load_file(assets / WEIGHTS).items()}, out / WEIGHTS)
    for file in (assets / CIFAR).glob("*.parquet"):
        shutil.copyfile(file, out / CIFAR / file.name)
    (file,) = (assets / IMAGENET).glob("train-*.parquet")
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, IMAGES), out / IMAGENET / file.name)


def folder_size(path: Path) -> int:
    """Bytes of all files in it."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def checkout_size() -> int:
    """Bytes of the files that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True, capture_output=True
    )
    files = [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file())


if __name__ == "__main__":
    main()
