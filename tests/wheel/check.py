"""Build the wheel, install it without any extra in a bare environment, and prune, save and load there.

make wheel runs it, and CI does. It prints the wheel's size, the packages that it brings, and seconds.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("three_lines.py")
EXTRAS = {"timm", "torchvision", "transformers", "accelerate", "huggingface_hub", "matplotlib", "tyro"}
"""What a bare installation must do without."""


def uv(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "uv", "--quiet", *map(str, arguments)], check=True)


def main() -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        uv("build", "--wheel", "--out-dir", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KiB")
        environment, began = folder / "venv", time.perf_counter()
        uv("venv", "--python", sys.executable, environment)
        # The versions that this environment has: they lie in uv's cache.
        versions = {found.name: found.version for found in importlib.metadata.distributions()}
        (folder / "versions.txt").write_text("".join(f"{n}=={v}\n" for n, v in versions.items() if n != "gohsp"))
        python = environment / "bin" / "python"
        uv("pip", "install", "--python", python, "--constraints", folder / "versions.txt", wheel)
        print(f"installed in {time.perf_counter() - began:.0f} s")
        show_packages(environment)
        pruned, loaded = (told(python, verb, folder) for verb in ("prune", "load"))
        assert pruned["output"] == loaded["output"], "what is loaded computes something else"
        for what, done in (("first pruned model", pruned), ("loaded by another process", loaded)):
            print(f"{what}: {done['seconds']:.1f} s, {done['cpu_seconds']:.1f} s of CPU")
        refused = subprocess.run([environment / "bin" / "gohsp"], capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stdout) == (1, ""), refused
        assert "pip install 'gohsp[cli]'" in refused.stderr, refused.stderr


def show_packages(environment: Path) -> None:
    """Print what was installed, by size."""
    (site,) = environment.glob("lib/python*/site-packages")
    found = list(importlib.metadata.distributions(path=[str(site)]))
    names = {distribution.name.lower().replace("-", "_") for distribution in found}
    assert not EXTRAS & names, f"a bare installation brings {EXTRAS & names}"
    sizes = {d.name: sum(file.size or 0 for file in d.files or ()) / 2**20 for d in found}
    print(f"{len(sizes)} packages, {sum(sizes.values()):,.0f} MiB:")
    print(", ".join(f"{name} {size:,.1f}" for name, size in sorted(sizes.items(), key=lambda of: -of[1])))


def told(python: Path, verb: str, folder: Path) -> dict[str, Any]:
    """What a fresh process says, elsewhere than in the repository."""
    command = [python, "-I", SCRIPT, verb, folder / "small"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout)


if __name__ == "__main__":
    main()
