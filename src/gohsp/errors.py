"""The one tree of exceptions that gohsp raises on purpose.

Every message names what was given, what is allowed and what to do about it.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence

MOST = 300
"""Characters that are shown of another library's error."""


class GohspError(Exception):
    """Base of every error that gohsp raises for bad input or a failed check."""


class UnsupportedModelError(GohspError):
    """A model, or a module in it, that no adapter knows."""


class BudgetError(GohspError):
    """A budget that cannot be read, or that no plan can meet."""


class PlanError(GohspError):
    """A plan that does not fit the model's structure."""


class NonFiniteError(GohspError):
    """NaN or infinite weights, activations or losses."""


class DataError(GohspError):
    """A data source that is missing, empty, unreadable or wrongly labelled."""


class ConfigError(GohspError):
    """Settings with unknown keys or values out of range."""


class CheckpointError(GohspError):
    """A model folder or weights file that is damaged, foreign or does not fit."""


class RunError(GohspError):
    """A run folder that cannot be used as asked."""


class StorageError(GohspError, OSError):
    """A file or folder that cannot be written."""


class EqualityError(GohspError):
    """The compacted model does not compute what the masked dense model computes."""


class ExportError(GohspError):
    """A model that a target cannot hold, or an exported file that computes something else."""


class MissingPackageError(GohspError, ImportError):
    """A package of one of gohsp's extras, which is needed and not installed."""


def require_packages(what: str, extra: str, *packages: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        what: What needs them, for the message.
        extra: The extra of gohsp's that brings them.
        packages: Names that they are imported by.

    Raises:
        MissingPackageError: One is not there.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"{what} needs {', '.join(missing)}: pip install 'gohsp[{extra}]'")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint naming the valid entry closest to ``name``, or all of them when none is close.

    Args:
        name: The entry that was given.
        valid: The entries that are allowed.

    Returns:
        ``"did you mean 'x'?"`` or ``"valid: 'a', 'b'"``.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "valid: " + ", ".join(f"'{n}'" for n in names)


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names in quotes, at most ``most`` of them: ``"'a', 'b' and 8 more"``."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def one_line(error: Exception) -> str:
    """What another library's error says, for a message of ours: one line, of which compilers would take pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= MOST else f"{text[:MOST]}..."
