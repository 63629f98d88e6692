"""What gohsp refuses, as data: the tests run each case, and ``docs/errors.md`` is made of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gohsp.errors import GohspError


@dataclass(frozen=True)
class Refusal:
    """One bad input and the error that it ends in.

    Attributes:
        given: What the user did, in a few words; unique.
        act: Does it through the public API, in the empty folder that it is given.
        error: The kind of error.
        says: A part of the message that names what was given, is allowed or is to be done.
    """

    given: str
    act: Callable[[Path], object]
    error: type[GohspError]
    says: str


def all_refusals() -> dict[str, tuple[Refusal, ...]]:
    """The ``CASES`` of every module of this package by its ``TITLE``, in the order of the modules' names."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "page")
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.TITLE: tuple(module.CASES) for module in modules}


def message_of(refusal: Refusal, folder: Path) -> str:
    """Run a case and return what its error says, without the folder's own path.

    Raises:
        AssertionError: Nothing was refused.
    """
    try:
        refusal.act(folder)
    except refusal.error as error:
        return " ".join(str(error).replace(str(folder), "...").split())
    raise AssertionError(f"{refusal.given}: not refused")
