"""How much to cut where: damage curves and a budget in, widths out (``docs/oneshot.md``).

A *damage curve* says, for one sub-layer and kind of unit, what cutting that piece alone to some width does to the
model. Where the numbers come from is the caller's business; :mod:`gohsp.core.curves` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise, product

from gohsp.errors import BudgetError, ConfigError
from gohsp.settings import SHARE, require_settings, whole
from gohsp.structure import (
    FIELDS,
    KINDS,
    Absent,
    AttentionWidths,
    Bound,
    Cost,
    Ffn,
    FfnWidths,
    Kind,
    Network,
    PresentSublayer,
    Sublayer,
    SublayerWidths,
    Widths,
    absent,
    amount,
    is_absent,
    narrowed,
    width,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthSettings:
    """Which widths are allowed, and how they are chosen.

    Attributes:
        stages: How often damage curves are measured on the way to the budget, each time on the network as cut and
            repaired so far; each costs about as much as the first and a cut. None takes one for every 27 % of the
            parameters that go: 1 for a cut by a third, 2 by a half, 3 by 60 %.
        depth: Whether whole sub-layers may go, too, where that does least damage.
        multiple: Query/key, value and FFN widths are multiples of this; the present width is always allowed.
        min_width: Smallest query/key and value width.
        min_heads: Fewest heads of an attention that stays.
        min_ffn: Smallest share of the hidden units of an FFN that stays.
    """

    stages: int | None = None
    depth: bool = False
    multiple: int = 8
    min_width: int = 8
    min_heads: int = 1
    min_ffn: float = 0.05

    def __post_init__(self) -> None:
        counts = {"multiple": whole(), "min_width": whole(), "min_heads": whole()}
        require_settings(self, "widths", stages=whole(1, 100), min_ffn=SHARE, **counts)


@dataclass(frozen=True, slots=True)
class DamageCurve:
    """Damage by width, for one sub-layer and kind.

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


Curves = Mapping[str, Mapping[Kind, DamageCurve]]
"""Curves by sub-layer and kind; a kind that is missing is not cut there."""


def allowed_widths(sub: PresentSublayer, kind: Kind, settings: WidthSettings) -> tuple[int, ...]:
    """Widths that an allocation may give ``kind`` in a sub-layer, ascending; the present one is last.

    The first is 0 where the whole sub-layer may go: it goes with its heads or its hidden units.
    """
    have = width(sub.widths, kind)
    removable = settings.depth and sub.removable and kind in ("head", "ffn")
    gone = (0,) if removable else ()
    if kind not in sub.prunable:
        return (*gone, have)
    if kind == "head":
        return (*gone, *range(min(settings.min_heads, have), have + 1))
    step = math.lcm(settings.multiple, getattr(sub, "step", 1))
    floor = settings.min_width if kind in ("qk", "vo") else max(settings.min_ffn * have, getattr(sub, "floor", 0))
    first = max(step, math.ceil(floor / step) * step)
    return (*gone, *range(first, have, step), have)


def smallest(network: Network, settings: WidthSettings, *, uniform: bool = False) -> dict[str, SublayerWidths]:
    """The smallest allowed widths of every sub-layer, absent where they may go; ``uniform`` as of :func:`allocate`."""
    if uniform:
        return {
            **network.widths,
            **{name: of for subs in _alike(network) for name, of in _shapes(subs, settings)[0].items()},
        }
    return {sub.name: smallest_of(sub, settings) for sub in network.sublayers}


def smallest_of(sub: Sublayer, settings: WidthSettings) -> SublayerWidths:
    """The smallest allowed widths of a sub-layer."""
    if isinstance(sub, Absent):
        return sub.widths
    least = {FIELDS[kind]: allowed_widths(sub, kind, settings)[0] for kind in sub.widths.kinds}
    return type(sub.widths)(**least) if all(least.values()) else absent(sub.widths)


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to shape a sub-layer."""

    widths: SublayerWidths
    cost: float
    damage: float


def allocate(
    network: Network, curves: Curves, bound: Bound, settings: WidthSettings, *, uniform: bool = False
) -> dict[str, SublayerWidths]:
    """Minimise the summed damage subject to a bound: a multiple-choice knapsack, by Lagrangian bisection.

    A bisection finds the smallest price per parameter (or MAC) at which the cheapest choices fit; what room is
    left is then filled by the upgrades that repair most.

    Args:
        network: The network.
        curves: Damage by sub-layer and kind. The head curve, made with the ranking's order, lets whole heads compete
            with narrower ones.
        bound: Upper bound on the whole network's cost.
        settings: Allowed widths.
        uniform: Whether all attentions get the same heads, of one width, and all FFNs the same hidden units (over the
            stream's width, where that differs between stages). A kind that may be cut nowhere stays as it is.

    Raises:
        BudgetError: Even the smallest allowed widths cost more than the bound.
    """
    if uniform:
        return _allocate_uniformly(network, curves, bound, settings)
    groups = [_options(sub, curves.get(sub.name, {}), bound.cost, settings) for sub in network.sublayers]
    fixed = bound.cost.fixed(network)
    _require_within(bound, fixed + sum(min(o.cost for o in group) for group in groups))

    def cheapest(price: float) -> list[_Option]:
        return [min(group, key=lambda o: (o.damage + price * o.cost, o.cost)) for group in groups]

    def fits(choice: Sequence[_Option]) -> bool:
        return fixed + sum(o.cost for o in choice) <= bound.limit

    low, high = 0.0, 1e-12
    while not fits(cheapest(high)):
        low, high = high, high * 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(cheapest(middle)) else (middle, high)
    choice = _fill(cheapest(high), groups, bound.limit - fixed)
    return {sub.name: option.widths for sub, option in zip(network.sublayers, choice, strict=True)}


def predicted_damage(network: Network, curves: Curves, widths: Widths) -> float:
    """The summed damage that the curves foresee for widths, each piece counted alone."""
    return sum(_damage(sub.widths, curves.get(sub.name, {}), widths[sub.name]) for sub in network.present)


def _damage(have: SublayerWidths, curves: Mapping[Kind, DamageCurve], want: SublayerWidths) -> float:
    def of(kind: Kind) -> float:
        return curves[kind](width(want, kind)) if kind in curves else 0.0

    if isinstance(have, FfnWidths) or is_absent(want):
        return of(have.kinds[0])
    assert isinstance(want, AttentionWidths)
    # A head that is gone cannot be damaged by narrower dimensions as well.
    return of("head") + (of("qk") + of("vo")) * want.heads / have.heads


def require_feasible(network: Network, bound: Bound, settings: WidthSettings, *, uniform: bool = False) -> None:
    """Check that the smallest allowed widths keep a bound, before anything is measured.

    Raises:
        BudgetError: They do not; the message says what the smallest possible model costs.
    """
    least = bound.of(network, smallest(network, settings, uniform=uniform))
    _require_within(bound, least, network if uniform else None)


def require_fitting(network: Network, settings: WidthSettings) -> None:
    """Check that the floors and the step of widths are not above what this network has; the defaults fit every one.

    Raises:
        ConfigError: One is, so that it would keep every sub-layer as wide as it is.
    """
    counted: dict[str, tuple[Kind, ...]] = {
        "multiple": ("qk", "vo", "ffn"),
        "min_width": ("qk", "vo"),
        "min_heads": ("head",),
    }
    for name, kinds in counted.items():
        present = [width(of, kind) for of in network.widths.values() for kind in of.kinds if kind in kinds]
        asked, most = getattr(settings, name), max(present, default=0)
        if asked > max(most, getattr(WidthSettings(), name)):
            raise ConfigError(
                f"widths.{name} is {asked}, but {most} is the most that a sub-layer of this model has "
                f"({', '.join(FIELDS[k] for k in kinds)}), so that nothing could be cut there; give at most {most}"
            )


def _require_within(bound: Bound, least: float, uniform: Network | None = None) -> None:
    """Check a bound against the least cost; ``uniform`` is the network, where all of its blocks are to be alike."""
    if least <= bound.limit:
        return
    kind, model, last = bound.cost.kind, "model", "let whole sub-layers go (widths.depth)"
    if uniform is not None:
        cut = [FIELDS[k] for k in KINDS if any(k in sub.prunable for sub in uniform.present)]
        model, last = f"uniform model ({', '.join(cut)} cut)", "let blocks differ (uniform = false)"
    raise BudgetError(
        f"no plan meets {amount(kind, bound.limit)}: the smallest possible {model} has {amount(kind, least)}; raise "
        "the budget, exclude less, lower the floors (widths.min_heads, min_width, min_ffn) or the step "
        f"(widths.multiple), or {last}"
    )


def _options(sub: Sublayer, curves: Mapping[Kind, DamageCurve], cost: Cost, settings: WidthSettings) -> list[_Option]:
    """Every allowed shape of a sub-layer; kinds without a curve stay as they are."""
    have = sub.widths
    if isinstance(sub, Absent):
        return [_Option(have, cost.sublayer(sub, have), 0.0)]
    allowed = [allowed_widths(sub, kind, settings) if kind in curves else (width(have, kind),) for kind in have.kinds]
    shapes = {
        type(have)(**dict(zip((FIELDS[kind] for kind in have.kinds), combination, strict=True)))
        if all(combination)
        else absent(have)
        for combination in product(*allowed)
    }
    ordered = sorted(shapes, key=lambda shape: [width(shape, kind) for kind in have.kinds])
    return [_Option(shape, cost.sublayer(sub, shape), _damage(have, curves, shape)) for shape in ordered]


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


# All blocks alike


def _allocate_uniformly(
    network: Network, curves: Curves, bound: Bound, settings: WidthSettings
) -> dict[str, SublayerWidths]:
    """The least summed damage of all uniform shapes within the bound, and of equal ones the one that costs most."""
    measured = replace(network, sublayers=tuple(_as_measured(sub, curves) for sub in network.sublayers))
    fixed = bound.cost.fixed(network) + sum(
        bound.cost.sublayer(sub, sub.widths) for sub in network.sublayers if isinstance(sub, Absent)
    )

    def option(subs: Sequence[PresentSublayer], shape: dict[str, SublayerWidths]) -> tuple[float, float, Widths]:
        damage = sum(_damage(sub.widths, curves.get(sub.name, {}), shape[sub.name]) for sub in subs)
        return damage, -sum(bound.cost.sublayer(sub, shape[sub.name]) for sub in subs), shape

    attentions, ffns = ([option(subs, shape) for shape in _shapes(subs, settings)] for subs in _alike(measured))
    pairs = [(a[0] + f[0], a[1] + f[1], i, j) for i, a in enumerate(attentions) for j, f in enumerate(ffns)]
    _require_within(bound, fixed + min(-saved for _, saved, *_ in pairs), measured)
    *_, i, j = min(pair for pair in pairs if fixed - pair[1] <= bound.limit)
    return {**network.widths, **attentions[i][2], **ffns[j][2]}


def _as_measured(sub: Sublayer, curves: Curves) -> Sublayer:
    """A sub-layer of which kinds without a curve stay as they are."""
    return sub if isinstance(sub, Absent) else replace(sub, prunable=sub.prunable & curves.get(sub.name, {}).keys())


def _alike(network: Network) -> tuple[Sequence[PresentSublayer], Sequence[PresentSublayer]]:
    """Sub-layers that are to be alike: attentions, and FFNs."""
    return network.attentions, [sub for sub in network.present if isinstance(sub, Ffn)]


def _shapes(subs: Sequence[PresentSublayer], settings: WidthSettings) -> list[dict[str, SublayerWidths]]:
    """Every shape that sub-layers of one type may have alike, the smallest first; one of none where there are none."""
    kinds = subs[0].widths.kinds if subs else ()
    tied = [of for of in TIED if of[0] in kinds]
    shapes = []
    for levels in product(*(_levels(subs, of, settings) for of in tied)):
        shape = {sub.name: sub.widths for sub in subs}
        for of, level in zip(tied, levels, strict=True):
            if level is not None:
                for sub, kind in product(subs, of):
                    shape[sub.name] = narrowed(shape[sub.name], kind, int(level * _unit(sub, kind)))
        shapes.append(shape)
    return shapes


TIED: tuple[tuple[Kind, ...], ...] = (("head",), ("qk", "vo"), ("ffn",))
"""Kinds of one width in uniform shapes."""


def _levels(
    subs: Sequence[PresentSublayer], kinds: Sequence[Kind], settings: WidthSettings
) -> list[Fraction] | list[None]:
    """Widths that all sub-layers may have, ascending; None for the present ones, where nothing may be cut alike."""
    if not any(kind in sub.prunable for sub in subs for kind in kinds):
        return [None]
    allowed = (
        {Fraction(count, _unit(sub, kind)) for count in allowed_widths(sub, kind, replace(settings, depth=False))}
        for sub, kind in product(subs, kinds)
    )
    return sorted(set.intersection(*allowed)) or [None]


def _unit(sub: PresentSublayer, kind: Kind) -> int:
    """What a uniform width is counted in: hidden units go by the width of their stream, which stages may differ in."""
    return sub.readout.size if kind == "ffn" else 1
