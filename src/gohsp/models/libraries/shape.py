"""The shape that all blocks of a model have, in the words of what libraries make models by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import inf, nextafter
from typing import TypeVar

from gohsp.structure import Ffn, Network, Widths, width

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What all blocks have in common; None where they differ, or have none.

    Attributes:
        dim: Width of the stream, or of the narrowest where stages differ.
        heads: Heads of every attention.
        head_dim: Width of every head's queries, keys and values.
        ratio: Hidden units of every FFN, over the width of its stream.
    """

    dim: int
    heads: int | None
    head_dim: int | None
    ratio: Fraction | None

    @property
    def units(self) -> int | None:
        """Hidden units beside the narrowest stream."""
        return None if self.ratio is None else int(self.ratio * self.dim)

    def mlp_ratio(self, factor: Fraction) -> float | None:
        """A number of which ``int(dim * number)`` is ``factor`` times the hidden units; whole ones lose the comma."""
        if self.ratio is None:
            return None
        exact = self.ratio * factor
        if exact.denominator == 1:
            return int(exact)
        ratio = float(exact)
        return ratio if int(self.dim * ratio) == int(self.dim * exact) else nextafter(ratio, inf)


def shape_of(network: Network, widths: Widths) -> Shape:
    """The shape of a network cut down to ``widths``."""
    attentions, ffns = network.attentions, [sub for sub in network.present if isinstance(sub, Ffn)]
    return Shape(
        dim=min(sub.readout.size for sub in network.sublayers),
        heads=_only(width(widths[sub.name], "head") for sub in attentions),
        head_dim=_only(width(widths[sub.name], kind) for sub in attentions for kind in ("qk", "vo")),
        ratio=_only(Fraction(width(widths[sub.name], "ffn"), sub.readout.size) for sub in ffns),
    )


def _only(values: Iterable[T]) -> T | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None
