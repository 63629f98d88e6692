"""Processes forked from one that has imported everything, so that hundreds of them cost minutes and not hours."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from gohsp import cli

PRELOAD = [
    "gohsp.cli",
    "gohsp.report.html",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "sklearn.datasets",
    "sklearn.model_selection",
    "timm.data",
    "timm.optim",
    "timm.scheduler",
    "tomli_w",
]
"""What a run imports, late some of it: timm alone takes a process of its own six seconds."""
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
TIME_LIMIT = 120.0


@functools.cache
def context() -> ForkServerContext:
    """Starts the server, which only imports: a process in which torch has computed could not be forked safely."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return made


def start(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """A process that calls a function of this package."""
    process = context().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@dataclass(frozen=True)
class Home:
    """Where a run may write to: its folder and one for temporary files; marks and output lie beside."""

    path: Path

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path / "run"

    @property
    def temporary(self) -> Path:
        """``TMPDIR`` of the run."""
        return self.path / "temporary"

    def mark(self, name: str) -> Path:
        """A file by which a process tells how far it is."""
        return self.path / f"{name}.mark"


@dataclass(frozen=True)
class Stop:
    """The change of its folder (a file renamed, a folder made, ...) before which a run sends itself a signal."""

    at: int
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, negative for a signal, and all that it printed."""

    status: int
    output: str

    @property
    def crashed(self) -> bool:
        """Whether a traceback shows."""
        return "Traceback" in self.output

    @property
    def tail(self) -> str:
        """The end of what it printed: with a traceback, enough to see where it came from."""
        return self.output[-6000 if self.crashed else -400 :]

    @property
    def refused(self) -> bool:
        """Whether it ended in one clear error."""
        return self.status == 1 and "error: " in self.output and not self.crashed


@dataclass(frozen=True)
class Command:
    """A ``gohsp`` command that runs in a process of its own."""

    process: BaseProcess
    home: Home
    output: Path

    def wait(self) -> Ended:
        """Wait for its end, which is enforced after a while."""
        self.process.join(TIME_LIMIT)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, self.output.read_text(encoding="utf-8", errors="replace"))

    def wait_for(self, mark: str) -> None:
        """Wait until it has left a mark, or has ended."""
        until = time.monotonic() + TIME_LIMIT
        while not self.home.mark(mark).exists() and self.process.is_alive() and time.monotonic() < until:
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send a signal to it, unless it has ended."""
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)


def gohsp(arguments: Sequence[str], home: Home, *, stop: Stop | None = None, output: str = "output") -> Command:
    """Begin a ``gohsp`` command."""
    home.temporary.mkdir(parents=True, exist_ok=True)
    for name in ("begun", "stopped"):
        home.mark(name).unlink(missing_ok=True)
    path = home.path / output
    return Command(start(_main, list(arguments), home, stop, path), home, path)


def _main(arguments: list[str], home: Home, stop: Stop | None, output: Path) -> None:
    os.environ["TMPDIR"] = str(home.temporary)
    tempfile.tempdir = None  # something that was imported may have asked for it
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    changes: list[str] = []

    def count(event: str, details: tuple[Any, ...]) -> None:
        if event not in CHANGES or not lasting(path := _path(details), home.run):
            return
        if os.path.lexists(path) != (event == "os.mkdir"):  # else it changes nothing
            changes.append(f"{event} {path.relative_to(home.run)}")
            if stop and len(changes) == stop.at:
                home.mark("stopped").touch()
                os.kill(os.getpid(), stop.signal)

    sys.addaudithook(count)
    home.mark("begun").touch()
    status = cli.main(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over: no signal may show a traceback of this harness
    home.mark("changes").write_text("\n".join(changes))
    sys.exit(status)


def lasting(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder, and not in a hidden folder there, in which images are spooled."""
    return path.is_relative_to(folder) and not any(
        part.startswith(".") for part in path.relative_to(folder).parent.parts
    )


def _path(details: tuple[Any, ...]) -> Path:
    """The path that an event of the audit is about; a tree is removed by names within open folders."""
    path, folder = os.fsdecode(details[0]), details[-1]
    open_folder = Path(f"/proc/self/fd/{folder}")
    return open_folder.resolve() / path if folder != -1 and open_folder.exists() else Path(path)
