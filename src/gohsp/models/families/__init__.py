"""Families of block classes, each a file of data: where a class keeps what can be cut.

A block is told by the name of its class, so that no library is imported in order to recognise one. Classes of one's own
are made known by :func:`register`.
"""

from __future__ import annotations

from torch import nn

from gohsp.models.attention import Attended, AttentionLayout, AttentionMaps
from gohsp.models.families import facebook, layout, lucidrains, timm, torch, torchvision, transformers
from gohsp.models.families.layout import (
    SUPPORTED,
    Branch,
    Family,
    FfnLayout,
    Known,
    Layout,
    Reading,
    class_name,
    describe,
    opened,
    resize,
)

__all__ = [
    "SUPPORTED",
    "Attended",
    "AttentionLayout",
    "AttentionMaps",
    "Branch",
    "Family",
    "FfnLayout",
    "Known",
    "Layout",
    "Reading",
    "class_name",
    "describe",
    "family_of",
    "opened",
    "register",
    "resize",
]

_known = timm.KNOWN | transformers.KNOWN | torch.KNOWN | torchvision.KNOWN | facebook.KNOWN | lucidrains.KNOWN


def register(known: Known) -> None:
    """Make classes known, for as long as the process runs; those of a name that was known are known anew.

    Args:
        known: Layouts of classes, by their full names.
    """
    global _known
    _known |= known


def family_of(name: str, block: nn.Module) -> Family | None:
    """How a block is made; None of a class that is not known.

    Raises:
        UnsupportedModelError: The class is known, but a module in this block is of a class that is not.
    """
    return layout.family_in(_known, name, block)
