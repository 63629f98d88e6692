"""Run the parts, each in a process and a time of its own.

    python -m gpu [--dry-run] [--seconds 570] [--continue FOLDER] [PART ...]

``run.sh`` beside this sets the paths up and calls it; see ``README.md``.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu.part import OutOfTimeError, Part, machine, read, say, write

PARTS = {"smoke": 60, "cifar": 240, "throughput": 90, "oneshot_stages": 90, "overhead": 60}
"""Seconds that a part may take, most precious first; the last one asked for may take all that are left."""

GRACE = 3
"""Seconds after its time that a part is given to end by itself."""

MEMORY_DISK, ROOM = Path("/dev/shm"), 16 * 2**30
"""A disk in memory, which is worked on where it has so many bytes free."""

FORK = multiprocessing.get_context("fork")
"""Every part inherits the imported packages, which take a process of its own ten seconds."""


@dataclass(frozen=True)
class Call:
    """What this call was asked for.

    Attributes:
        out: Where files are left.
        earlier: What an earlier call left, to go on with.
        assets: Where ``models/`` and ``data/`` lie.
        work: A folder for everything else.
        dry: Whether this is the dry run.
    """

    out: Path
    earlier: Path | None
    assets: Path
    work: Path
    dry: bool


def main() -> int:
    """Run what was asked for; returns 0 where all of it is done."""
    began = time.monotonic()
    options = asked()
    out = Path(os.environ.get("OUT", "runs/gpu"))
    with tempfile.TemporaryDirectory(prefix="gohsp-gpu-", dir=roomy()) as work:
        os.environ |= {"TMPDIR": work, "GOHSP_CACHE": f"{work}/cache"}
        tempfile.tempdir = None  # else the folder found before stays in use
        assets = Path(os.environ.get("GOHSP_ASSETS", "scratch/gpu"))
        call = Call(out, options.earlier, assets, Path(work), options.dry_run)
        states = {}
        for name in options.parts:
            left = options.seconds - (time.monotonic() - began)
            whole = options.dry_run or name == options.parts[-1]
            states[name] = run(call, name, left if whole else min(PARTS[name], left))
    say(", ".join(f"{name}: {state}" for name, state in states.items()))
    return 0 if set(states.values()) == {"done"} else 1


def asked() -> argparse.Namespace:
    """The arguments, checked before any work; what the parts need is imported by then, and there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all, unless given")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and images of noise, on the CPU")
    parser.add_argument("--seconds", type=float, default=570, help="for everything")
    parser.add_argument("--continue", dest="earlier", type=Path, help="folder that an earlier call left in $OUT")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - PARTS.keys()):
        parser.error(f"unknown part '{unknown[0]}'; parts are {', '.join(PARTS)}")
    options.parts = [name for name in PARTS if name in options.parts] or list(PARTS)
    if options.earlier and not options.earlier.is_dir():
        parser.error(f"--continue: '{options.earlier}' is no folder; give the one that an earlier call left in $OUT")
    other = "a real" if options.dry_run else "a dry"
    for folder in filter(None, (options.earlier, Path(os.environ.get("OUT", "runs/gpu")))):
        found = [read(folder / f"{name}.json") for name in options.parts]
        if any(part and part["dry_run"] != options.dry_run for part in found):
            parser.error(f"'{folder}' holds files of {other} run; name another folder")
    preload(options.parts)
    if not options.dry_run and not gpu_found():
        parser.error("no GPU is to be seen; --dry-run runs everything at tiny size on the CPU")
    return options


def preload(wanted: list[str]) -> None:
    """Import what the parts need; one that cannot be imported tells so when it is run."""
    for name in wanted:
        with suppress(Exception):
            importlib.import_module(f"gpu.{name}")


def gpu_found() -> bool:
    """Whether there is a GPU; asked in a process of its own, since none can be forked from one that has asked."""
    with FORK.Pool(1) as pool:
        return pool.apply(torch.cuda.is_available)


def roomy() -> Path | None:
    """Where to work: the disk in memory if it is large, else the system's folder."""
    large = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free >= ROOM
    return MEMORY_DISK if large and os.access(MEMORY_DISK, os.W_OK) else None


def run(call: Call, name: str, seconds: float) -> str:
    """Run a part in a process of its own and end it when its time is up; returns its state."""
    call.out.mkdir(parents=True, exist_ok=True)
    file = call.out / f"{name}.json"
    if call.earlier and not file.exists():
        for left in call.earlier.glob(f"{name}*"):
            shutil.copy(left, call.out)
    if read(file).get("state") == "done":
        say(f"== {name}: done before")
        return "done"
    part = Part(name, call.out, call.assets, call.work, call.dry, time.monotonic() + seconds)
    part.results = read(file).get("results", {})
    part.save("begun")
    process = FORK.Process(target=measure, args=(part,))
    process.start()
    assert process.pid is not None
    try:
        with suppress(ProcessLookupError):
            os.setpgid(process.pid, process.pid)  # so that its own processes end with it
        process.join(max(seconds, 0) + GRACE)
        late = process.is_alive()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    found = read(file)
    if found["state"] == "begun":
        reason = f"cut off after {seconds:.0f} s" if late else f"died with exit status {process.exitcode}"
        found |= {"state": "failed", "reason": reason}
        write(file, found)
    say(f"== {name}: {found['state']} {found['reason']}")
    return found["state"]


def measure(part: Part) -> None:
    """The part itself."""
    try:
        part.machine = machine(part.device)
        module = importlib.import_module(f"gpu.{part.name}")
        part.expected = module.expected(part)
        steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in part.expected.items())
        total = sum(part.expected.values())
        say(f"== {part.name}: expected to take {total:.0f} s ({steps}), may take {part.left:.0f} s")
        part.save("begun")
        module.measure(part)
    except OutOfTimeError as error:
        part.save("out of time", str(error))
    except Exception:  # whatever it is, it is recorded, and the next part has its turn
        part.errors[part.name] = traceback.format_exc()
        say(part.errors[part.name])
        part.save("failed")
    else:
        part.save("failed" if part.errors else "done")
    os._exit(0)  # processes that still work for it are not waited for


if __name__ == "__main__":
    sys.exit(main())
