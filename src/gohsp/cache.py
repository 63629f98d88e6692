"""What is slow to measure and depends on nothing but its inputs, kept on disk under a hash of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gohsp import files

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Where cached measurements lie: ``$GOHSP_CACHE``, or ``gohsp`` in the user's cache folder.

    Raises:
        OSError: Neither is set, and the user has no home.
    """
    if given := os.environ.get("GOHSP_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gohsp"
    except RuntimeError as error:
        raise OSError("the user has no home folder") from error


def key_of(tensors: Iterable[Tensor], settings: Any) -> str:
    """A hash of tensors (values, shapes, types) and of plain JSON data."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        digest.update(flat.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(kind: str, key: str) -> Any | None:
    """What was stored, or None; what is damaged or cannot be read is logged and counts as none."""
    try:
        file = files.sealed(folder() / f"{kind}-{key}.json")
        found = None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        logger.warning("no cached %s can be read (%s); they are measured", kind, error)
        return None
    if found is not None:
        logger.info("%s taken from %s", kind, file)
    return found


def store(kind: str, key: str, value: Any) -> None:
    """Keep plain JSON data; where the folder cannot be written, that is logged and nothing else happens."""
    text = json.dumps(value)
    try:
        files.seal(folder() / f"{kind}-{key}.json", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        logger.warning("%s cannot be cached (%s); set GOHSP_CACHE to a folder that can be written", kind, error)
