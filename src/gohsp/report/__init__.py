"""The report of a run: ``report.json`` for programs, ``report.html`` for people.

It works on the report as plain JSON data and knows nothing of models or tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """Write ``report.json`` and ``report.html``, each whole or not at all.

    Args:
        report: Plain JSON data that follows the schema.
        folder: Where to write; made if it is not there.

    Raises:
        RunError: The report does not follow the schema; nothing is written.
    """
    validate(report)
    page = render_html(report)
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomic(folder / "report.json", json.dumps(dict(report), indent=2, allow_nan=False) + "\n")
    _write_atomic(folder / "report.html", page)


def read(folder: Path) -> dict[str, Any]:
    """Read ``report.json`` back.

    Args:
        folder: A run's folder.

    Returns:
        The report, checked against the schema.

    Raises:
        RunError: There is no report, it is not JSON, or it does not follow the schema.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"'{path}' does not exist: give the folder of a finished run") from error
    except ValueError as error:
        raise RunError(f"'{path}' is not JSON ({error}): restore it or run again") from error
    try:
        validate(report)
    except RunError as error:
        raise RunError(f"'{path}': {error}") from error
    return report


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
