"""How wide sub-layers are, as counts, and which of their units stay, as indices.

Widths are what people read and edit (``plan.json``); kept indices are what a cut carries out. Both are plain mappings
from the names of sub-layers. A sub-layer of width 0 is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from gohsp.errors import PlanError, nearest

Kind = Literal["head", "qk", "vo", "ffn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UnitKind = Literal["qk", "vo", "ffn"]
"""Kinds of units that parameters hold; a head goes by all of its query/key and value units going."""

FIELDS: dict[Kind, str] = {"head": "heads", "qk": "qk", "vo": "vo", "ffn": "units"}
"""The field of a sub-layer's widths that each kind of unit is counted by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWidths:
    """Widths of an attention; all are 0 where it is absent.

    Attributes:
        heads: Attention heads.
        qk: Query/key dimensions of each head.
        vo: Value dimensions of each head.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("head", "qk", "vo")
    unit_kinds: ClassVar[tuple[UnitKind, ...]] = ("qk", "vo")
    heads: int
    qk: int
    vo: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FfnWidths:
    """Width of a feed-forward network; 0 where it is absent.

    Attributes:
        units: Hidden units.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("ffn",)
    unit_kinds: ClassVar[tuple[UnitKind, ...]] = ("ffn",)
    units: int


SublayerWidths = AttentionWidths | FfnWidths
Widths = Mapping[str, SublayerWidths]
"""Widths of sub-layers by their names."""


def width(widths: SublayerWidths, kind: Kind) -> int:
    """Heads, query/key or value dimensions of a head, or hidden units."""
    return getattr(widths, FIELDS[kind])


def unit_count(widths: SublayerWidths, kind: UnitKind) -> int:
    """Units of a kind in the whole sub-layer: of all heads together, or hidden units."""
    return widths.heads * width(widths, kind) if isinstance(widths, AttentionWidths) else widths.units


def is_absent(widths: SublayerWidths) -> bool:
    """Whether nothing is left of a sub-layer."""
    return not all(asdict(widths).values())


def narrowed(widths: SublayerWidths, kind: Kind, to: int) -> SublayerWidths:
    """``widths`` with one kind at another width; at 0 the sub-layer is absent."""
    return replace(widths, **{FIELDS[kind]: to}) if to else absent(widths)


def absent(like: SublayerWidths) -> SublayerWidths:
    """The widths of an absent sub-layer of the same type."""
    return type(like)(**dict.fromkeys(asdict(like), 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKept:
    """What stays of an attention, as ascending indices into its present units.

    Attributes:
        heads: Kept heads.
        qk: For each kept head, its kept query/key dimensions; equally many for every head.
        vo: For each kept head, its kept value dimensions; equally many for every head.
    """

    heads: tuple[int, ...]
    qk: tuple[tuple[int, ...], ...]
    vo: tuple[tuple[int, ...], ...]

    @property
    def widths(self) -> AttentionWidths:
        """Widths after the cut."""
        qk, vo = (len(dims[0]) if dims else 0 for dims in (self.qk, self.vo))
        return AttentionWidths(heads=len(self.heads), qk=qk, vo=vo)

    def flat(self, kind: UnitKind, present: SublayerWidths) -> list[int]:
        """Flat indices of the kept units of ``kind`` in an attention that now has the widths ``present``."""
        kept, of_head = (self.qk if kind == "qk" else self.vo), width(present, kind)
        return [h * of_head + j for h, dims in zip(self.heads, kept, strict=True) for j in dims]


@dataclass(frozen=True, kw_only=True, slots=True)
class FfnKept:
    """What stays of a feed-forward network.

    Attributes:
        units: Kept hidden units, ascending.
    """

    units: tuple[int, ...]

    @property
    def widths(self) -> FfnWidths:
        """Width after the cut."""
        return FfnWidths(units=len(self.units))

    def flat(self, _kind: UnitKind, _present: SublayerWidths) -> list[int]:
        """Indices of the kept units."""
        return list(self.units)


SublayerKept = AttentionKept | FfnKept
Kept = Mapping[str, SublayerKept]
"""What stays of sub-layers by their names."""


def kept_widths(kept: Kept) -> dict[str, SublayerWidths]:
    """Widths after a cut."""
    return {name: of.widths for name, of in kept.items()}


def keep_all(widths: SublayerWidths) -> SublayerKept:
    """Everything of a sub-layer."""
    if isinstance(widths, FfnWidths):
        return FfnKept(units=tuple(range(widths.units)))
    return AttentionKept(
        heads=tuple(range(widths.heads)),
        qk=(tuple(range(widths.qk)),) * widths.heads,
        vo=(tuple(range(widths.vo)),) * widths.heads,
    )


def keep_none(like: SublayerWidths) -> SublayerKept:
    """Nothing of a sub-layer."""
    return keep_all(absent(like))


def widths_to_json(widths: Widths) -> dict[str, dict[str, int]]:
    """Widths as plain data: what ``plan.json`` holds and a user may edit."""
    return {name: asdict(of) for name, of in widths.items()}


def widths_from_json(tables: Any) -> dict[str, SublayerWidths]:
    """Read widths back.

    Raises:
        PlanError: No table of tables; one lacks a key or has an unknown one; a width is no whole number of at least 0,
            or an attention has some widths of 0 and others not.
    """
    read: dict[str, SublayerWidths] = {}
    for name, table in _tables(tables, "widths"):
        of = AttentionWidths if _is_attention(table) else FfnWidths
        _require_keys(name, table, of)
        for key, value in table.items():
            if not is_whole(value) or value < 0:
                raise PlanError(f"'{name}' of the plan: '{key}' must be a whole number of at least 0, got {value!r}")
        read[name] = of(**table)
        if is_absent(read[name]) and any(table.values()):
            raise PlanError(f"'{name}' of the plan: give no width of 0, or all of them, got {dict(table)}")
    return read


def kept_to_json(kept: Kept) -> dict[str, dict[str, Any]]:
    """Kept indices as plain data."""
    return {name: _as_lists(asdict(of)) for name, of in kept.items()}


def kept_from_json(tables: Any) -> dict[str, SublayerKept]:
    """Read what :func:`kept_to_json` wrote.

    Raises:
        PlanError: A table lacks a key, has an unknown one, or holds something else than indices.
    """
    read: dict[str, SublayerKept] = {}
    for name, table in _tables(tables, "kept units"):
        of = AttentionKept if _is_attention(table) else FfnKept
        _require_keys(name, table, of)
        read[name] = of(**{key: _indices(name, value, nested=key in ("qk", "vo")) for key, value in table.items()})
    return read


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, which a truth value is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _tables(tables: Any, what: str) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
        raise PlanError(
            f"the plan's {what} must be a table with a table for each sub-layer, such as "
            '{"blocks.0.attn": {"heads": 3, "qk": 16, "vo": 32}, "blocks.0.mlp": {"units": 512}}; '
            f"got {tables!r:.80}"
        )
    return [(str(name), table) for name, table in tables.items()]


def _is_attention(table: Mapping[str, Any]) -> bool:
    return any(key in table for key in ("heads", "qk", "vo"))


def _require_keys(name: str, table: Mapping[str, Any], of: type) -> None:
    known = [field.name for field in fields(of)]
    for key in table:
        if key not in known:
            raise PlanError(f"'{name}' of the plan: unknown key '{key}'; {nearest(str(key), known)}")
    if missing := [key for key in known if key not in table]:
        raise PlanError(f"'{name}' of the plan lacks {missing}; give heads, qk and vo of an attention, units of an FFN")


def _indices(name: str, value: Any, *, nested: bool) -> tuple[Any, ...]:
    if isinstance(value, list | tuple):
        if nested:
            return tuple(_indices(name, inner, nested=False) for inner in value)
        if all(is_whole(v) for v in value):
            return tuple(value)
    raise PlanError(f"'{name}' of the plan: kept units must be lists of indices, got {value!r:.80}")


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(inner) for key, inner in value.items()}
    return [_as_lists(inner) for inner in value] if isinstance(value, tuple) else value
