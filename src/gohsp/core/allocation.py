"""How much to cut where: damage curves and a budget in, widths out (design, section 4).

A *damage curve* says, for one block and kind, what cutting that piece alone to some width does to the model.
Where the numbers come from is the caller's business; :mod:`gohsp.core.sensitivity` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from gohsp.errors import BudgetError, RecipeError
from gohsp.settings import SHARE, require_settings, whole
from gohsp.structure import (
    KINDS,
    BlockShape,
    BlockStructure,
    CostModel,
    Kind,
    ModelStructure,
    amount,
    block_cost,
    fixed_cost,
    kind_of,
    model_cost,
)

FIELDS: dict[Kind, str] = {"head": "heads", "qk": "qk", "vo": "vo", "ffn": "ffn"}
"""The field of a block shape that each kind of unit is counted by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthSettings:
    """Which widths are allowed.

    Attributes:
        multiple: Query/key, value and FFN widths are multiples of this; the present width is always allowed.
        min_width: Smallest query/key and value width.
        min_heads: Fewest heads of a block.
        min_ffn: Smallest share of a block's hidden units.
    """

    multiple: int = 8
    min_width: int = 8
    min_heads: int = 1
    min_ffn: float = 0.05

    def __post_init__(self) -> None:
        require_settings(self, "widths", multiple=whole(), min_width=whole(), min_heads=whole(), min_ffn=SHARE)


@dataclass(frozen=True, slots=True)
class DamageCurve:
    """Damage by width, for one block and kind.

    Attributes:
        widths: Ascending; the last is the present width.
        damage: At each width; the last is 0.
    """

    widths: tuple[int, ...]
    damage: tuple[float, ...]

    def __call__(self, width: int) -> float:
        """Damage at ``width``, never less than at a larger width.

        Between measured points damage is taken to grow geometrically, and up to the present width, where it
        is 0, quadratically: measured curves are convex, and straight lines would draw every choice to a
        measured point.
        """
        if width >= self.widths[-1]:
            return 0.0
        ceiling = 0.0
        points = list(zip(self.widths, self.damage, strict=True))
        for (w0, d0), (w1, d1) in reversed(list(pairwise(points))):
            upper = ceiling = max(ceiling, d1)
            lower = max(upper, d0)
            if width >= w0:
                share = (w1 - width) / (w1 - w0)
                return lower * share**2 if upper == 0 else lower**share * upper ** (1 - share)
            ceiling = lower
        raise BudgetError(f"no damage was measured at width {width}; the curve covers {self.widths}")


Curves = tuple[Mapping[Kind, DamageCurve], ...]
"""One mapping a block; a kind that is missing is not cut there."""


def curves_to_json(curves: Curves) -> list[dict[str, Any]]:
    """Plain data, a block each."""
    return [{k: {"widths": c.widths, "damage": c.damage} for k, c in of_block.items()} for of_block in curves]


def curves_from_json(blocks: Sequence[Mapping[Kind, Mapping[str, Any]]]) -> Curves:
    """Read what :func:`curves_to_json` wrote."""
    return tuple({k: DamageCurve(tuple(c["widths"]), tuple(c["damage"])) for k, c in b.items()} for b in blocks)


def allowed_widths(block: BlockStructure, kind: Kind, settings: WidthSettings) -> tuple[int, ...]:
    """Widths that a plan may give ``kind`` in this block, ascending; the present one is last."""
    have = getattr(block.shape, FIELDS[kind])
    if kind not in block.prunable:
        return (have,)
    if kind == "head":
        return tuple(range(min(settings.min_heads, have), have + 1))
    step = settings.multiple
    floor = settings.min_width if kind in ("qk", "vo") else max(settings.min_ffn * have, block.ffn_floor)
    first = max(step, math.ceil(floor / step) * step)
    return (*range(first, have, step), have)


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to shape a part of a block: the whole attention, or the FFN."""

    fields: Mapping[str, int]
    cost: float
    damage: float


def allocate(
    structure: ModelStructure, curves: Curves, cost: CostModel, limit: float, settings: WidthSettings
) -> tuple[BlockShape, ...]:
    """Minimise the summed damage subject to a budget: a multiple-choice knapsack, by Lagrangian bisection.

    A bisection finds the smallest price per parameter (or MAC) at which the cheapest choices fit; what room is
    left is then filled by the upgrades that repair most.

    Args:
        structure: The model.
        curves: Damage by block and kind. The head curve, made with the ranking's order, lets whole heads compete
            with narrower ones.
        cost: What the budget counts, or a table of measured times.
        limit: Upper bound on the whole model's cost.
        settings: Allowed widths.

    Raises:
        BudgetError: Even the smallest allowed widths cost more than ``limit``.
    """
    groups = [
        g for b, c in zip(structure.blocks, curves, strict=True) for g in _groups(structure, b, c, cost, settings)
    ]
    fixed = fixed_cost(structure, cost)
    _require_within(limit, fixed + sum(min(o.cost for o in group) for group in groups), cost)

    def cheapest(price: float) -> list[_Option]:
        return [min(group, key=lambda o: (o.damage + price * o.cost, o.cost)) for group in groups]

    def fits(choice: Sequence[_Option]) -> bool:
        return fixed + sum(o.cost for o in choice) <= limit

    low, high = 0.0, 1e-12
    while not fits(cheapest(high)):
        low, high = high, high * 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(cheapest(middle)) else (middle, high)
    choice = _fill(cheapest(high), groups, limit - fixed)
    merged = [dict(a.fields) | dict(f.fields) for a, f in zip(choice[::2], choice[1::2], strict=True)]
    return tuple(BlockShape(**fields) for fields in merged)


def predicted_damage(structure: ModelStructure, curves: Curves, shapes: Sequence[BlockShape]) -> float:
    """The summed damage that the curves foresee for a plan's widths, each piece counted alone."""
    return sum(
        _attention_damage(block, of_block, shape) + _damage(of_block, "ffn", shape)
        for block, of_block, shape in zip(structure.blocks, curves, shapes, strict=True)
    )


def _damage(curves: Mapping[Kind, DamageCurve], kind: Kind, shape: BlockShape) -> float:
    return curves[kind](getattr(shape, FIELDS[kind])) if kind in curves else 0.0


def _attention_damage(block: BlockStructure, curves: Mapping[Kind, DamageCurve], shape: BlockShape) -> float:
    # A head that is gone cannot be damaged by narrower dimensions as well.
    narrower = _damage(curves, "qk", shape) + _damage(curves, "vo", shape)
    return _damage(curves, "head", shape) + narrower * shape.heads / block.shape.heads


def require_feasible(structure: ModelStructure, cost: CostModel, limit: float, settings: WidthSettings) -> None:
    """Check that the smallest allowed widths fit under ``limit``, before anything is measured.

    Raises:
        BudgetError: They do not; the message says what the smallest possible model costs.
    """
    _require_within(limit, model_cost(structure, smallest(structure, settings), cost), cost)


def require_fitting(structure: ModelStructure, settings: WidthSettings) -> None:
    """Check that the floors and the step of widths are not above what this model has; the defaults fit every model.

    Raises:
        RecipeError: One is, so that it would keep every block as wide as it is.
    """
    counted: dict[str, tuple[Kind, ...]] = {
        "multiple": ("qk", "vo", "ffn"),
        "min_width": ("qk", "vo"),
        "min_heads": ("head",),
    }
    for name, kinds in counted.items():
        asked, most = getattr(settings, name), max(max(getattr(s, FIELDS[k]) for k in kinds) for s in structure.shapes)
        if asked > max(most, getattr(WidthSettings(), name)):
            raise RecipeError(
                f"widths.{name} is {asked}, but {most} is the most that a block of this model has "
                f"({', '.join(FIELDS[k] for k in kinds)}), so that nothing could be cut there; give at most {most}"
            )


def smallest(structure: ModelStructure, settings: WidthSettings) -> tuple[BlockShape, ...]:
    """The smallest allowed widths of every block."""
    return tuple(smallest_block(block, settings) for block in structure.blocks)


def smallest_block(block: BlockStructure, settings: WidthSettings) -> BlockShape:
    """The smallest allowed widths of a block."""
    return BlockShape(**{FIELDS[kind]: allowed_widths(block, kind, settings)[0] for kind in KINDS})


def _require_within(limit: float, smallest: float, cost: CostModel) -> None:
    if smallest > limit:
        kind = kind_of(cost)
        raise BudgetError(
            f"no plan meets {amount(kind, limit)}: the smallest possible model has {amount(kind, smallest)}; "
            "raise the budget, or lower the floors (widths.min_heads, min_width, min_ffn) or the step (widths.multiple)"
        )


def _groups(
    structure: ModelStructure,
    block: BlockStructure,
    curves: Mapping[Kind, DamageCurve],
    cost: CostModel,
    settings: WidthSettings,
) -> Iterator[list[_Option]]:
    """The block's attention options and its FFN options."""
    have = block.shape

    def widths(of: Kind) -> tuple[int, ...]:
        return allowed_widths(block, of, settings) if of in curves else (getattr(have, FIELDS[of]),)

    def option(damage: float, shape: BlockShape, fields: Sequence[str]) -> _Option:
        return _Option({f: getattr(shape, f) for f in fields}, block_cost(structure, block, shape, cost), damage)

    attention = [
        BlockShape(heads=heads, qk=qk, vo=vo, ffn=0)
        for heads, qk, vo in product(widths("head"), widths("qk"), widths("vo"))
    ]
    yield [option(_attention_damage(block, curves, shape), shape, ("heads", "qk", "vo")) for shape in attention]
    hidden = [BlockShape(heads=0, qk=0, vo=0, ffn=n) for n in widths("ffn")]
    yield [option(_damage(curves, "ffn", shape), shape, ("ffn",)) for shape in hidden]


def _fill(choice: list[_Option], groups: Sequence[Sequence[_Option]], limit: float) -> list[_Option]:
    """Spend the room under ``limit`` on upgrades, best repair per cost first, then on whatever is widest."""
    choice = list(choice)
    room = limit - sum(o.cost for o in choice)
    while True:
        upgrades = [
            (max(present.damage - option.damage, 0.0) / (option.cost - present.cost), option.cost, i, option)
            for i, (present, group) in enumerate(zip(choice, groups, strict=True))
            for option in group
            if present.cost < option.cost <= present.cost + room and option.damage <= present.damage
        ]
        if not upgrades:
            return choice
        _, cost, i, option = max(upgrades, key=lambda u: u[:3])
        room -= cost - choice[i].cost
        choice[i] = option


def uniform(
    structure: ModelStructure, cost: CostModel, limit: float, settings: WidthSettings
) -> tuple[BlockShape, ...]:
    """The same share of every width in every block, all heads kept: the plain way, for comparison.

    Room that rounding leaves is given to FFNs, last block first.

    Raises:
        BudgetError: Even the smallest allowed widths, or all heads at their smallest, cost more than ``limit``.
    """

    def at(share: float) -> tuple[BlockShape, ...]:
        return tuple(_shrunk(b, lambda have: share * have, settings) for b in structure.blocks)

    require_feasible(structure, cost, limit, settings)
    if (smallest := model_cost(structure, at(0.0), cost)) > limit:
        raise BudgetError(
            f"uniform widths with all heads kept cost at least {amount(kind_of(cost), smallest)}, the budget allows "
            f"{amount(kind_of(cost), limit)}; "
            'use allocation = "measured"'
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if model_cost(structure, at(middle), cost) <= limit else (low, middle)
    shapes = list(at(low))
    for i in reversed(range(len(shapes))):
        for ffn in allowed_widths(structure.blocks[i], "ffn", settings):
            shape = shapes[i]
            wider = BlockShape(heads=shape.heads, qk=shape.qk, vo=shape.vo, ffn=max(ffn, shape.ffn))
            trial = [*shapes[:i], wider, *shapes[i + 1 :]]
            if model_cost(structure, trial, cost) <= limit:
                shapes = trial
        if model_cost(structure, shapes, cost) > 0.995 * limit:
            break
    return tuple(shapes)


def _shrunk(block: BlockStructure, target: Callable[[int], float], settings: WidthSettings) -> BlockShape:
    """Every width at the largest allowed value not above ``target`` of the present one; heads stay."""

    def width(kind: Kind, have: int) -> int:
        allowed = allowed_widths(block, kind, settings)
        return max((w for w in allowed if w <= target(have)), default=allowed[0])

    shape = block.shape
    return BlockShape(
        heads=shape.heads, qk=width("qk", shape.qk), vo=width("vo", shape.vo), ffn=width("ffn", shape.ffn)
    )
