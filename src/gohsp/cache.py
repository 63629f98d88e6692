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

from gohsp.checkpoint import write_atomic

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Where cached measurements lie: ``$GOHSP_CACHE``, or ``gohsp`` in the user's cache folder."""
    if given := os.environ.get("GOHSP_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gohsp"


def key_of(tensors: Iterable[Tensor], settings: Any) -> str:
    """A hash of tensors (values, shapes, types) and of plain JSON data."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20)
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        digest.update(flat.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(kind: str, key: str) -> Any | None:
    """What was stored, or None; a file that cannot be read counts as none."""
    file = folder() / f"{kind}-{key}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("cached %s cannot be read (%s); they are measured anew", kind, error)
        return None
    logger.info("%s taken from %s", kind, file)
    return found


def store(kind: str, key: str, value: Any) -> None:
    """Keep plain JSON data; where the folder cannot be written, that is logged and nothing else happens."""
    try:
        write_atomic(folder() / f"{kind}-{key}.json", json.dumps(value))
    except OSError as error:
        logger.warning("%s cannot be cached (%s); set GOHSP_CACHE to a folder that can be written", kind, error)
