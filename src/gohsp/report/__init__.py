"""The report of a run: ``report.json`` for programs, ``report.html`` for people.

It works on the report as plain JSON data and knows nothing of models or tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gohsp import files
from gohsp.errors import RunError
from gohsp.report.html import HEADERS, SummaryRow, render_html, summary_table
from gohsp.report.schema import SCHEMA_VERSION, validate

__all__ = [
    "HEADERS",
    "SCHEMA_VERSION",
    "SummaryRow",
    "read",
    "render_html",
    "summary_table",
    "validate",
    "write",
]


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.html`` and then ``report.json``, each whole or not at all.

    Args:
        report: Plain JSON data that follows the schema.
        folder: Where to write; made if it is not there.

    Raises:
        RunError: The report does not follow the schema; nothing is written.
        StorageError: The folder cannot be written.
    """
    validate(report)
    files.write_atomic(folder / "report.html", render_html(report))
    content = {**report, "digest": _digest(report)}
    files.write_atomic(folder / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """Read ``report.json`` back.

    Args:
        folder: A run's folder.

    Returns:
        The report, checked against its digest and the schema.

    Raises:
        RunError: There is no report, it cannot be read, is damaged, or does not follow the schema.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"'{path}' does not exist: give the folder of a finished run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"'{path}' cannot be read as JSON ({error}): restore it or run again") from error
    digest = report.pop("digest", None) if isinstance(report, dict) else None
    try:
        validate(report)
    except RunError as error:
        raise RunError(f"'{path}': {error}") from error
    if report["schema_version"] >= 3 and digest != _digest(report):
        raise RunError(f"'{path}' is not as it was written, its digest differs: restore it or run again")
    return report


def _digest(report: Mapping[str, Any]) -> str:
    """A hash of the content, however it is laid out."""
    return hashlib.blake2b(json.dumps(report, sort_keys=True).encode(), digest_size=16).hexdigest()
