"""The folder of a run: what was asked, what is finished, and where the next attempt goes on.

A run writes the files of :data:`RESULTS`, and what resuming needs under ``state/``; it replaces and removes nothing
else. ``report.json`` is the last file of a run: where it stands, the run is finished.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import nn

from gohsp import data, files
from gohsp.errors import RunError

logger = logging.getLogger(__name__)

REQUEST, STATE, LOG, LAST = "request.json", "state", "run.log", "report.json"
MODEL = ("config.json", "model.safetensors", "preprocessor_config.json")
RESULTS = (LAST, "report.html", *MODEL, "plan.json", "ranking.json", "settings.toml", LOG)
DENSE = tuple(f"dense/{name}" for name in MODEL)
"""What a run writes besides, where it trains the dense model."""
PLAIN = ("plain/config.json", "plain/model.safetensors")
"""What a run writes besides, where it is a uniform one of a library's model."""

_LOCK, _SPOOL, _TIMINGS = "lock", ".spool", "timings"
_PATIENCE = 6.0
"""Seconds to wait for a folder: processes that read images outlive a killed run by up to five, with its lock."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder. Finished steps lie under ``state/`` until the run is complete.

    Attributes:
        path: The folder.
        taken: Steps that this attempt has finished or taken up so far.
    """

    path: Path
    taken: set[str] = field(default_factory=set)

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return (self.path / LAST).exists()

    def done(self, step: str, model: nn.Module | None = None) -> bytes | None:
        """The record of a finished step; None if it has to be done. To be called in the order of the steps.

        Where what a step left is damaged, it is done again, and so are those that followed from it: the new result may
        differ from the old one, if only in the last bits.

        Args:
            step: The step.
            model: Gets the weights that the step left.
        """
        record = self._read(step)
        if record is not None and model is not None:
            weights = files.sealed(self._file(f"{step}.safetensors"))
            if weights is None:
                record = None
            else:
                model.load_state_dict(load_file(weights))
        if record is not None:
            self.taken.add(step)
            return record
        epochs = {f"{name}.epochs" for name in (*self.taken, step)}
        led_to = self.forget({*self.taken, *epochs, _TIMINGS}) - {step}
        if led_to:
            logger.warning("step '%s' is done anew, and with it what it led to: %s", step, ", ".join(sorted(led_to)))
        return None

    def record(self, step: str, record: bytes, model: nn.Module | None = None) -> None:
        """Mark a step as finished; the record is written last, so that it vouches for the weights."""
        if model is not None:
            state = model.state_dict()
            files.seal(self._file(f"{step}.safetensors"), lambda path: files.write_tensors(path, state))
        self._write(step, record)
        self.taken.add(step)

    def epochs_file(self, step: str) -> Path:
        """Where a step keeps its state between epochs; it is sealed."""
        return self._file(f"{step}.epochs.pt")

    def timings(self) -> dict[str, float]:
        """Seconds by step, of earlier attempts too."""
        return json.loads(self._read(_TIMINGS) or b"{}")

    def record_timings(self, timings: Mapping[str, float]) -> None:
        """Keep the seconds by step."""
        self._write(_TIMINGS, json.dumps(timings).encode())

    def spool(self) -> data.Spool:
        """A list of tensors on the run's disk; the next attempt removes what a killed one left."""
        (self.path / STATE / _SPOOL).mkdir(parents=True, exist_ok=True)
        return data.Spool(self.path / STATE / _SPOOL)

    def clear_state(self) -> None:
        """Remove what only resuming needs."""
        self.forget()
        self.sweep()

    def forget(self, all_but: Set[str] = frozenset()) -> set[str]:
        """Remove the state of all but some steps; returns the steps that had any."""
        names = set()
        for suffix in (".json", ".safetensors", ".pt"):  # records first, since they vouch for the rest
            for file in (self.path / STATE).glob(f"*.{files.SEAL}{suffix}"):
                name = file.name.rsplit(".", 2)[0]
                if name not in all_but:
                    file.unlink(missing_ok=True)
                    names.add(name)
        return names

    def sweep(self) -> None:
        """Remove what is of no use to any later attempt: images, and files that were never completed."""
        shutil.rmtree(self.path / STATE / _SPOOL, ignore_errors=True)
        for name in map(Path, (f"{STATE}/*", REQUEST, *RESULTS, *DENSE)):
            for file in self.path.glob(str(name.with_name(f".{name.name}.*.tmp"))):
                file.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.path / STATE / name

    def _read(self, name: str) -> bytes | None:
        file = files.sealed(self._file(f"{name}.json"))
        return None if file is None else file.read_bytes()

    def _write(self, name: str, content: bytes) -> None:
        files.seal(self._file(f"{name}.json"), lambda path: path.write_bytes(content))


def check(
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Mapping[str, str | Path | None] | None = None,
) -> Path:
    """Refuse a folder that cannot be used as asked, before anything is read or written.

    Args:
        out: The folder.
        resume: Go on with the run that the folder holds.
        overwrite: Replace the run that the folder holds.
        inputs: What the run is to read, by what it is called; names that are no path here are passed over.

    Returns:
        The folder.

    Raises:
        RunError: The folder holds something and neither is set, or both are; it holds something that is no run, or is
            no folder; an input lies in a folder that is to be overwritten.
    """
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other; give one")
    if not str(out):
        raise RunError("the run's folder is an empty name; name a folder, or '.' for this one")
    path = Path(out)
    with _usable(path):
        str(path).encode()  # safetensors takes only names that are text
        if os.path.lexists(path) and not path.is_dir():
            raise RunError(f"'{path}' is a file or a broken link; name a folder for the run")
        if _request_in(path) is None:
            if path.is_dir() and not _is_free(path):
                raise RunError(f"'{path}' holds files that are no gohsp run; name another folder")
        elif not (resume or overwrite):
            raise RunError(
                f"'{path}' already holds a run; go on with --resume, replace it with --overwrite, or name another"
            )
        if overwrite:
            _refuse_inside(path, inputs or {})
    return path


@contextmanager
def begin(path: Path, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Open a run's folder for this process alone, and log to it; a run that it holds is taken up or removed.

    Args:
        path: The folder, as :func:`check` returned it.
        request: What the run was asked for; plain data.
        resume: Go on with the run that the folder holds; it must have been asked for the same.
        overwrite: Remove what that run wrote.

    Raises:
        RunError: What :func:`check` refuses; another process works in the folder; the run that it holds was asked for
            something else; a file that no run wrote is in the way.
        StorageError: The folder cannot be written.
    """
    check(path, resume=resume, overwrite=overwrite)
    with _locked(path):
        check(path, resume=resume, overwrite=overwrite)  # again: another process may have been faster
        folder, before = RunFolder(path), _request_in(path)
        with _usable(path):
            if before is not None and resume:
                _require_same(path, before, request)
            old = set() if before is None else set(_written(before))
            for name in _written(request):
                if name not in old and (path / name).exists():
                    raise RunError(
                        f"'{path / name}' is in the way and no run wrote it; move it, or name another folder"
                    )
            folder.sweep()
            with files.replacing(path / REQUEST) as new:
                new.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
                # There is room for a new run. Until it has a request, the old one can be overwritten again.
                if before is not None and overwrite:
                    _remove(folder, before)
        try:
            with _log_to(path / LOG):
                yield folder
        finally:
            with suppress(OSError):  # the next attempt tries again
                folder.sweep()


def unfinished(path: Path) -> bool:
    """Whether a folder holds a run that ``--resume`` goes on with."""
    return os.path.exists(path / REQUEST) and not RunFolder(path).finished  # Path.exists fails on odd names


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """What the system has against a folder, in one clear error."""
    try:
        yield
    except files.StorageError:
        raise
    except (OSError, ValueError) as error:  # a ValueError where the name is no text or holds a NUL
        raise RunError(
            f"'{path}' cannot be used as a run's folder ({files.reason(error)}); name one that can be written"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out; the lock ends with this one, however it ends."""
    file = path / STATE / _LOCK
    lock = FileLock(file)
    with _usable(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise RunError(
                f"another process works in '{path}'; wait for its end, or name another folder for this run"
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows lets nobody remove an open file
            file.unlink()
        lock.release()
        with suppress(OSError):  # of an unfinished run it holds more
            file.parent.rmdir()


def _request_in(path: Path) -> dict[str, Any] | None:
    """What the run in a folder was asked for, or None if there is no run."""
    file = path / REQUEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"'{file}' is damaged ({error}), so that nothing tells what was asked for and which files the run wrote; "
            "name another folder, or remove this one yourself"
        ) from error
    return found if isinstance(found, dict) and isinstance(found.get("config"), dict) and "budget" in found else None


def _is_free(path: Path) -> bool:
    """Whether a folder is empty, but for what a run that was killed as it began leaves."""
    found = [entry for entry in path.iterdir() if not fnmatch(entry.name, f".{REQUEST}.*.tmp")]
    return not found or (found == [path / STATE] and all(entry.name == _LOCK for entry in found[0].iterdir()))


def _refuse_inside(path: Path, inputs: Mapping[str, str | Path | None]) -> None:
    for what, given in inputs.items():
        if given is None or not os.path.exists(given):
            continue
        if Path(os.path.realpath(given)).is_relative_to(os.path.realpath(path)):
            raise RunError(
                f"{what} '{given}' lies in '{path}', whose run would be overwritten; copy it elsewhere first, or name "
                "another folder for this run"
            )


def _written(request: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the files that a run writes into its folder, its state and its request aside; the last one first."""
    stage, uniform = (request["config"].get(key) for key in ("dense", "uniform"))
    trains_dense = isinstance(stage, dict) and bool(stage.get("epochs"))
    return RESULTS + DENSE * trains_dense + PLAIN * bool(uniform)


def _remove(folder: RunFolder, request: Mapping[str, Any]) -> None:
    for name in _written(request):
        (folder.path / name).unlink(missing_ok=True)
    folder.forget()
    for name in (DENSE[0], PLAIN[0]):
        with suppress(OSError):  # something of the user's lies there, too
            (folder.path / name).parent.rmdir()


def _require_same(path: Path, before: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    then, now = _flat(before), _flat(json.loads(json.dumps(request)))
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            raise RunError(
                f"'{path}' was begun with {key} = {then.get(key)!r}, now it is {now.get(key)!r}; "
                "resume with the same settings and images, or start anew with --overwrite"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}


class _LogFile(logging.FileHandler):
    """A log that keeps quiet where it cannot be written: what is written for good says so."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Pass over it."""


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Append gohsp's log messages to a file while the context is open."""
    whole = logging.getLogger("gohsp")
    with files.storing(path):
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = whole.level
    whole.addHandler(handler)
    whole.setLevel(logging.INFO)
    try:
        yield
    finally:
        whole.removeHandler(handler)
        whole.setLevel(level)
        with suppress(OSError):
            handler.close()
