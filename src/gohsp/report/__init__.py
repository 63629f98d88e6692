"""The report of a run: ``report.json`` for programs, ``report.html`` for people.

It is a validated model that knows nothing of tensors. What renders it, :mod:`gohsp.report.html` and
:mod:`gohsp.report.plots`, is imported where a page or picture is made, for it takes matplotlib and jinja2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gohsp import files
from gohsp.errors import RunError, require_packages
from gohsp.report.schema import (
    SCHEMA_VERSION,
    Admm,
    Budget,
    Curves,
    Data,
    Epoch,
    Equality,
    Fidelity,
    Heal,
    HealStep,
    Machine,
    Metrics,
    Model,
    Plan,
    Ranking,
    Report,
    Speed,
    TraceStep,
    parse,
)
from gohsp.report.summary import HEADERS, SummaryRow, quantity, relative, signed, summary_table

__all__ = [
    "FILE",
    "HEADERS",
    "SCHEMA_VERSION",
    "Admm",
    "Budget",
    "Curves",
    "Data",
    "Epoch",
    "Equality",
    "Fidelity",
    "Heal",
    "HealStep",
    "Machine",
    "Metrics",
    "Model",
    "Plan",
    "Ranking",
    "Report",
    "Speed",
    "SummaryRow",
    "TraceStep",
    "parse",
    "quantity",
    "read",
    "relative",
    "signed",
    "summary_table",
    "write",
]


FILE = "report.json"


def write(report: Report, folder: Path) -> None:
    """Write ``report.html`` and then ``report.json``, each whole or not at all.

    Args:
        report: The report.
        folder: Where to write; made if it is not there.

    Raises:
        StorageError: The folder cannot be written.
        MissingPackageError: jinja2 or matplotlib is not installed.
    """
    require_packages("a report's page", "report", "jinja2", "matplotlib")
    from gohsp.report.html import render_html  # matplotlib and jinja2, which reading does without

    files.write_atomic(folder / "report.html", render_html(report))
    content = report.model_dump(mode="json")
    content["digest"] = _digest(content)
    files.write_atomic(folder / FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read(folder: Path) -> Report:
    """Read ``report.json`` back.

    Args:
        folder: A run's folder.

    Returns:
        The report, checked against its digest and the schema.

    Raises:
        RunError: There is no report, it cannot be read, is damaged, of another version, or does not follow the schema.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"'{path}' does not exist: give the folder of a finished run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"'{path}' cannot be read as JSON ({error}): restore it or run again") from error
    digest = content.pop("digest", None) if isinstance(content, dict) else None
    try:
        report = parse(content)
    except RunError as error:
        raise RunError(f"'{path}': {error}") from error
    if digest != _digest(content):
        raise RunError(f"'{path}' is not as it was written, its digest differs: restore it or run again")
    return report


def _digest(content: Mapping[str, Any]) -> str:
    """A hash of the content, however it is laid out."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
