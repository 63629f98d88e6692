"""The folder of a run: what was asked, what is finished, and where the next attempt goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from gohsp.checkpoint import save_tensors, write_atomic
from gohsp.errors import RunError

REQUEST = "request.json"
STATE = "state"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder. Finished stages lie under ``state/`` until the run is complete."""

    path: Path

    def done(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None."""
        file = self.path / STATE / f"{stage}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def record(self, stage: str, record: Mapping[str, Any], model: nn.Module | None = None) -> None:
        """Mark a stage as finished; the record is written last, so that it vouches for the weights."""
        if model is not None:
            save_tensors(self.path / STATE / f"{stage}.safetensors", model.state_dict())
        write_atomic(self.path / STATE / f"{stage}.json", json.dumps(record))

    def restore(self, stage: str, model: nn.Module) -> None:
        """Load the weights that a finished stage left."""
        model.load_state_dict(load_file(self.path / STATE / f"{stage}.safetensors"))

    def epochs_file(self, stage: str) -> Path:
        """Where a stage keeps its state between epochs."""
        return self.path / STATE / f"{stage}.epochs.pt"

    def clear_state(self) -> None:
        """Remove what only resuming needs."""
        shutil.rmtree(self.path / STATE, ignore_errors=True)


def begin(path: Path, request: Mapping[str, Any], *, resume: bool, overwrite: bool) -> RunFolder:
    """Open a run's folder, and refuse before any work is lost.

    Args:
        path: The folder.
        request: What the run was asked for; plain data.
        resume: Go on with the run that the folder holds; it must have been asked for the same.
        overwrite: Remove the run that the folder holds.

    Raises:
        RunError: The folder holds something and neither is set, or both are; it holds something that is no run;
            it holds a run that is finished or was asked for something else, to resume.
    """
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other; give one")
    if path.exists() and not path.is_dir():
        raise RunError(f"'{path}' is a file; name a folder for the run")
    holds_run = (path / REQUEST).exists()
    if path.is_dir() and any(path.iterdir()) and not holds_run:
        raise RunError(f"'{path}' holds files that are no gohsp run; name another folder")
    if holds_run and not (resume or overwrite):
        raise RunError(
            f"'{path}' already holds a run; go on with --resume, replace it with --overwrite, or name another"
        )
    if holds_run and resume:
        if (path / "report.json").exists():
            raise RunError(f"the run in '{path}' is finished, there is nothing to resume; replace it with --overwrite")
        _require_same(path, request)
    elif holds_run:
        shutil.rmtree(path)
    write_atomic(path / REQUEST, json.dumps(request, indent=2) + "\n")
    return RunFolder(path)


def _require_same(path: Path, request: Mapping[str, Any]) -> None:
    before = _flat(json.loads((path / REQUEST).read_text(encoding="utf-8")))
    now = _flat(json.loads(json.dumps(request)))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise RunError(
                f"'{path}' was begun with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                "resume with the same settings and images, or start anew with --overwrite"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append gohsp's log messages to a file while the context is open."""
    logger = logging.getLogger("gohsp")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
