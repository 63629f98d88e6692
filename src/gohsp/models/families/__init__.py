"""Families of block classes: how each is described, and rebuilt at other widths.

A family is a module with the functions of :class:`Family`. A block is told by the name of its class, so that no library
is imported in order to recognise one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import nn

from gohsp.structure import Sublayer, Widths


class Family(Protocol):
    """What a family's module offers."""

    NAME: str
    SUPPORTED: str

    def describe(self, name: str, block: nn.Module, tokens: int) -> tuple[Sublayer, ...]: ...  # noqa: D102
    def resize(self, name: str, block: nn.Module, widths: Widths) -> None: ...  # noqa: D102
    def set_fused_attention(self, block: nn.Module, fused: bool) -> bool: ...  # noqa: D102


FAMILIES: Mapping[str, str] = {"timm.models.vision_transformer.Block": "timm_vit"}
"""The module here that knows a block, by the full name of the block's class."""


def family_of(module: nn.Module) -> Family | None:
    """The family of a block; None of any other module."""
    cls: Any = type(module)
    name = FAMILIES.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if name is None else cast(Family, importlib.import_module(f"{__name__}.{name}"))


def supported() -> str:
    """What can be pruned, in words."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in dict.fromkeys(FAMILIES.values()))
    return "; ".join(module.SUPPORTED for module in modules)
