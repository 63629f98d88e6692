"""Rows of the report's tables and pictures: a plan's sub-layers, gathered by the blocks that their names tell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gohsp.report.schema import Plan
from gohsp.structure import AttentionWidths


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block, or its further sub-layers where it has several of a type.

    Attributes:
        name: Its module's name.
        label: What tells it from the others, as short as can be: mostly its number.
        attention: Name of its attention, or None.
        ffn: Name of its feed-forward network, or None.
    """

    name: str
    label: str
    attention: str | None
    ffn: str | None


def blocks_of(plan: Plan) -> list[Block]:
    """A plan's blocks, in forward order."""
    rows: list[tuple[str, dict[str, str]]] = []
    for name, widths in plan.dense.items():
        block, kind = block_name(name), "attention" if isinstance(widths, AttentionWidths) else "ffn"
        if not rows or rows[-1][0] != block or kind in rows[-1][1]:
            rows.append((block, {}))
        rows[-1][1][kind] = name
    labels = short_labels(block for block, _ in rows)
    return [
        Block(name=block, label=labels[block], attention=of.get("attention"), ffn=of.get("ffn")) for block, of in rows
    ]


def block_name(sublayer: str) -> str:
    """The block of a sub-layer, such as ``blocks.0`` of ``blocks.0.attn``.

    It is the innermost numbered module around it, or else the module that holds it; one in no module is its own block.
    """
    numbered = re.match(r"(.*\d)\.", sublayer)
    return numbered[1] if numbered else sublayer.rpartition(".")[0] or sublayer


def short_labels(blocks: Iterable[str]) -> dict[str, str]:
    """Labels of blocks: their last numbers, all their numbers (``1.0``) or their names, the first that are distinct."""
    names = list(dict.fromkeys(blocks))
    numbers = {name: re.findall(r"\d+(?=\.|$)", name) for name in names}
    last = {name: found[-1] if found else name for name, found in numbers.items()}
    joined = {name: ".".join(found) or name for name, found in numbers.items()}
    return next(
        (labels for labels in (last, joined) if len(set(labels.values())) == len(names)),
        dict(zip(names, names, strict=True)),
    )
