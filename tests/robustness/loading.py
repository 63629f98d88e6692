"""A process that loads spoilt model folders and watches what each one leads to."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gohsp
from gohsp.data import Preprocessing
from robustness import child
from robustness.mutations import OTHER, REFUSED, SAME, SECRET, Case, make_case, plant_canaries

ALLOWED_SECONDS = 2.0
"""Of processor time: a second is the aim, on a machine that does nothing else."""
ALLOWED_MEGABYTES = 100.0
ALLOWED_MESSAGE = 2_000
DATA_LIMIT = 8 * 2**30
HANGS = 15.0
"""Seconds after which a process waits for something that will not come."""
AT_A_TIME = 250
"""Cases that one process loads."""

SLOW, MEMORY, OUTSIDE = "too slow", "too much memory", "reached outside"
FOREIGN, UNCLEAR = "foreign exception", "unclear message"
CHANGED, NOT_REFUSED = "loaded another model", "not refused"

PATHS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.symlink")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
CODE = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")


@dataclass(frozen=True)
class Loaded:
    """What loading a case came to, in which time, and with how much more memory than was ever used before."""

    case: Case
    outcome: str
    detail: str
    seconds: float
    megabytes: float = 0.0


class Unreachable(BaseException):
    """Ends an attempt to use the network; no exception that is caught and tried again."""


class Watch:
    """Notes every path outside the folder, every connection and every start of foreign code. Lasts to the end."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._folder: Path | None = None
        libraries = [*(path for path in sys.path if path), sys.prefix, sys.base_prefix]
        self._libraries = (*(os.path.realpath(path) for path in libraries), os.devnull)
        sys.addaudithook(self._hear)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Watch while a folder is loaded."""
        self.seen.clear()
        self._folder = folder
        try:
            yield
        finally:
            self._folder = None

    def _hear(self, event: str, details: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event in NETWORK:
            self.seen.append(f"{event} {details[1:]}")
            raise Unreachable(event)
        if event in CODE:
            self.seen.append(f"{event} {details}")
        elif event in PATHS and isinstance(details[0], str | bytes):
            path = os.path.abspath(os.fsdecode(details[0]))
            if not Path(path).is_relative_to(self._folder) and not path.startswith(self._libraries):
                self.seen.append(f"{event} {path}")


def _images(model: nn.Module) -> Tensor:
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 8, 8, generator=generator).to(weight.dtype)


def _outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(_images(model)).float()


def _peak() -> float:
    """Largest resident size so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _tried(folder: Path, expected: Tensor) -> tuple[str, str]:
    """What loading comes to by itself, and more about it."""
    try:
        model = gohsp.load(folder)
        Preprocessing.from_model(model)
    except gohsp.GohspError as error:
        clear = 0 < len(str(error)) <= ALLOWED_MESSAGE and SECRET not in str(error)
        return REFUSED if clear else UNCLEAR, str(error)
    except MemoryError as error:
        return MEMORY, repr(error)
    except BaseException as error:
        return FOREIGN, f"{type(error).__name__}: {error}"
    try:
        same = torch.allclose(_outputs(model), expected, rtol=1e-5, atol=1e-5)
    except RuntimeError as error:
        return OTHER, f"it takes no such images: {error}"
    return SAME if same else OTHER, ""


def _judged(case: Case, folder: Path, expected: Tensor, watch: Watch, mark: Path, base: float) -> Loaded:
    before, began = _peak(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, ALLOWED_SECONDS)  # its signal ends the process
    with watch.over(folder):
        outcome, detail = _tried(folder, expected)
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, after = time.process_time() - began, _peak()
    if outcome in (SAME, OTHER) and outcome not in case.allows:
        outcome = CHANGED if outcome == OTHER else NOT_REFUSED
    if after > before and after - base > ALLOWED_MEGABYTES:
        outcome = MEMORY
    if watch.seen or mark.exists():
        outcome, detail = OUTSIDE, f"{watch.seen[:3]} {detail}"
    return Loaded(case, outcome, detail[:400], seconds, after - base)


def _work(results: Any, numbers: Sequence[int], bases: Path, scratch: Path) -> None:
    """Load one case after the other; each is announced before it is loaded."""
    os.environ |= {"HOME": str(scratch), "HF_HOME": str(scratch)}
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    canaries = scratch / "canaries"
    mark = plant_canaries(canaries)
    expected = {base.name: _outputs(gohsp.load(base)) for base in bases.iterdir()}
    os.chdir(canaries)
    watch, base = Watch(), _peak()
    for number in numbers:
        folder = scratch / str(number) / "model"
        case = make_case(number, bases, canaries, folder)
        results.send(case)
        results.send(_judged(case, folder, expected[case.base], watch, mark, base))
        shutil.rmtree(folder.parent)
        shutil.rmtree(mark, ignore_errors=True)


def load_all(numbers: Sequence[int], bases: Path, scratch: Path) -> Iterator[Loaded]:
    """Load these cases of the folders in ``bases``; where a process ends or must be ended, another one goes on."""
    left = list(numbers)
    while left:
        before = len(left)
        receive, send = child.context().Pipe(duplex=False)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            process = child.start(_work, send, left[:AT_A_TIME], bases, Path(folder))
            send.close()
            for loaded in _received(receive, process):
                left.pop(0)
                yield loaded
            process.join()
        assert len(left) < before, f"the process for case {left[0]} ended before it loaded anything"


def _received(results: Any, process: BaseProcess) -> Iterator[Loaded]:
    """What a process sends until it ends; it is ended when it hangs or has used so much memory that more would hide."""
    while process.is_alive() or results.poll():
        try:
            case = results.recv()
        except EOFError:
            return
        if not results.poll(HANGS):
            process.kill()
            yield Loaded(case, SLOW, "it waits for something", HANGS)
            return
        try:
            loaded = results.recv()
        except EOFError:
            process.join()
            slow = process.exitcode == -signal.SIGPROF
            yield Loaded(case, SLOW if slow else f"ended the process by {process.exitcode}", "", ALLOWED_SECONDS)
            return
        if loaded.outcome == MEMORY:
            process.kill()
        yield loaded
