"""Plain data that everything speaks of: a model's structure, block shapes, plans and budgets (design, section 2).

A *unit* is the smallest thing that can be removed. Query/key units and value units lie on a grid
``[heads, width]``; flat unit ``u = head * width + dimension``. A head goes by all of its units going.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, overload

from gohsp.errors import BudgetError, PlanError, nearest

Kind = Literal["head", "qk", "vo", "ffn"]
KINDS: tuple[Kind, ...] = ("head", "qk", "vo", "ffn")
BudgetKind = Literal["params", "macs", "latency"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """Widths of one block.

    Attributes:
        heads: Attention heads.
        qk: Query/key dimensions of each head.
        vo: Value dimensions of each head.
        ffn: Hidden units of the FFN.
    """

    heads: int
    qk: int
    vo: int
    ffn: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitSlice:
    """Where the units of one kind sit in one parameter: unit ``u`` is entry ``start + u`` along ``axis``.

    Attributes:
        parameter: Name in the model's state dict.
        axis: The axis that the units lie along.
        start: Entry of unit 0.
        size: Numbers per unit: the residual width for a weight, 1 for a bias.
    """

    parameter: str
    axis: int
    start: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Readout:
    """The linear map that takes units back to the residual stream; unit ``u`` is column ``u`` of its weight.

    Attributes:
        module: Name of the linear module; its input holds the units' activations.
        weight: Name of its weight, ``[residual width, units]``.
        bias: Name of its bias, or None.
        gain: Name of the LayerScale vector that follows it, or None.
        size: Residual width.
    """

    module: str
    weight: str
    bias: str | None
    gain: str | None
    size: int

    @property
    def columns(self) -> UnitSlice:
        """The units' columns of the weight."""
        return UnitSlice(parameter=self.weight, axis=1, start=0, size=self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStructure:
    """One pre-norm transformer block, as the algorithm sees it.

    Attributes:
        name: Module name of the block; its input and output are the residual stream.
        shape: Present widths.
        prunable: Kinds that may be cut here.
        rotatable: Of ``qk`` and ``vo``, those whose units may be mixed by an invertible matrix.
        scale: Factor on ``q k^T`` before the softmax.
        attention: Module name of the attention; its input is what queries, keys and values are read from.
        query: Rows (weight, then bias if any) that make queries.
        key: Rows that make keys.
        value: Rows that make values.
        query_norm: Module name of the norm on queries, or None.
        key_norm: Module name of the norm on keys, or None.
        attention_readout: The output projection.
        ffn_in: Rows that make hidden units; weight and bias, for both halves of a gated FFN.
        ffn_readout: The FFN's second linear map.
        ffn_floor: Fewest hidden units that an allocation may leave, whatever share its settings allow.
    """

    name: str
    shape: BlockShape
    prunable: frozenset[Kind]
    rotatable: frozenset[Kind]
    scale: float
    attention: str
    query: tuple[UnitSlice, ...]
    key: tuple[UnitSlice, ...]
    value: tuple[UnitSlice, ...]
    query_norm: str | None
    key_norm: str | None
    attention_readout: Readout
    ffn_in: tuple[UnitSlice, ...]
    ffn_readout: Readout
    ffn_floor: int = 0

    def slices(self, kind: Kind) -> tuple[UnitSlice, ...]:
        """Every parameter slice that a unit of ``kind`` couples (design, section 2); a head couples qk and vo."""
        qk = self.query + self.key
        vo = (*self.value, self.attention_readout.columns)
        return {"qk": qk, "vo": vo, "head": qk + vo, "ffn": (*self.ffn_in, self.ffn_readout.columns)}[kind]

    def unit_params(self, kind: Literal["qk", "vo", "ffn"]) -> int:
        """Parameters that one unit holds."""
        return sum(s.size for s in self.slices(kind))

    def unit_macs(self, kind: Literal["qk", "vo", "ffn"]) -> int:
        """Multiply-accumulates per token of one unit's linear maps (biases are free)."""
        return sum(s.size for s in self.slices(kind) if s.size > 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStructure:
    """A whole model.

    Attributes:
        blocks: Its transformer blocks, first to last.
        embed_dim: Width of the residual stream.
        tokens: Tokens per image, prefix tokens counted in.
        fixed_params: Parameters that no plan can remove.
        fixed_macs: Multiply-accumulates per image outside the blocks.
    """

    blocks: tuple[BlockStructure, ...]
    embed_dim: int
    tokens: int
    fixed_params: int
    fixed_macs: int

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        """Present widths of every block."""
        return tuple(b.shape for b in self.blocks)


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """Measured times of one block's two halves, in milliseconds; never less for a wider one.

    Attributes:
        heads: Measured numbers of heads, ascending.
        qk: Measured query/key widths, ascending.
        vo: Measured value widths, ascending.
        attention: Times ``[heads][qk][vo]`` of attention whose two widths differ.
        saving: What a library's own attention saves where they are equal.
        ffn: Measured numbers of hidden units, ascending.
        hidden: Times ``[ffn]``.
    """

    heads: tuple[int, ...]
    qk: tuple[int, ...]
    vo: tuple[int, ...]
    attention: tuple[tuple[tuple[float, ...], ...], ...]
    saving: float
    ffn: tuple[int, ...]
    hidden: tuple[float, ...]

    def __call__(self, shape: BlockShape) -> float:
        """Time of a block of ``shape``, linear between measured widths; a half of width 0 takes none."""
        attention = 0.0
        if shape.heads:
            corners = product(
                _between(self.heads, shape.heads), _between(self.qk, shape.qk), _between(self.vo, shape.vo)
            )
            attention = sum(a * b * c * self.attention[i][j][k] for (i, a), (j, b), (k, c) in corners)
        attention -= self.saved(shape)
        return attention + (sum(a * self.hidden[i] for i, a in _between(self.ffn, shape.ffn)) if shape.ffn else 0.0)

    def saved(self, shape: BlockShape) -> float:
        """What ``shape`` saves by equal widths."""
        return self.saving if shape.heads and shape.qk == shape.vo else 0.0


def _between(grid: Sequence[int], value: int) -> list[tuple[int, float]]:
    """The grid points around ``value`` and their weights; outside the grid, its end."""
    above = bisect_left(grid, value)
    if above == 0 or above == len(grid) or grid[above] == value:
        return [(min(above, len(grid) - 1), 1.0)]
    share = (value - grid[above - 1]) / (grid[above] - grid[above - 1])
    return [(above - 1, 1 - share), (above, share)]


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured times on one device, at one batch size and precision.

    Attributes:
        fixed: What is outside the blocks, in milliseconds.
        scale: Time of a block inside the network over its time alone.
        blocks: Times of the blocks, by their present shape.
    """

    fixed: float
    scale: float
    blocks: Mapping[BlockShape, BlockTimes]


CostModel = Literal["params", "macs"] | LatencyTable
"""What a plan costs: a number that can be counted, or a time that was measured."""


def kind_of(cost: CostModel) -> BudgetKind:
    """The kind of budget that a cost belongs to."""
    return "latency" if isinstance(cost, LatencyTable) else cost


def fixed_cost(structure: ModelStructure, cost: CostModel) -> float:
    """Cost of what no plan can remove; parameters, MACs per image, or milliseconds a batch."""
    if isinstance(cost, LatencyTable):
        return cost.fixed
    return structure.fixed_params if cost == "params" else structure.fixed_macs


@overload
def block_cost(
    structure: ModelStructure, block: BlockStructure, shape: BlockShape, cost: Literal["params", "macs"]
) -> int: ...
@overload
def block_cost(structure: ModelStructure, block: BlockStructure, shape: BlockShape, cost: CostModel) -> float: ...
def block_cost(structure: ModelStructure, block: BlockStructure, shape: BlockShape, cost: CostModel) -> float:
    """Cost of ``block`` cut down to ``shape``: parameters, MACs per image, or milliseconds a batch.

    MACs are those of the linear maps and of attention's two ``tokens^2`` products; norms, softmax and
    biases are not counted (design, section 8).
    """
    if isinstance(cost, LatencyTable):
        return cost.scale * cost.blocks[block.shape](shape)
    if cost == "params":
        attention = shape.heads * (shape.qk * block.unit_params("qk") + shape.vo * block.unit_params("vo"))
        return attention + shape.ffn * block.unit_params("ffn")
    n = structure.tokens
    linear = shape.heads * (shape.qk * block.unit_macs("qk") + shape.vo * block.unit_macs("vo"))
    linear += shape.ffn * block.unit_macs("ffn")
    return n * linear + n * n * shape.heads * (shape.qk + shape.vo)


@overload
def model_cost(structure: ModelStructure, shapes: Sequence[BlockShape], cost: Literal["params", "macs"]) -> int: ...
@overload
def model_cost(structure: ModelStructure, shapes: Sequence[BlockShape], cost: CostModel) -> float: ...
def model_cost(structure: ModelStructure, shapes: Sequence[BlockShape], cost: CostModel) -> float:
    """Cost of the whole model with its blocks cut down to ``shapes``."""
    blocks = zip(structure.blocks, shapes, strict=True)
    return fixed_cost(structure, cost) + sum(block_cost(structure, b, s, cost) for b, s in blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """What stays of one block, as ascending indices into its present units.

    Attributes:
        heads: Kept heads.
        qk: For each kept head, its kept query/key dimensions; equally many for every head.
        vo: For each kept head, its kept value dimensions; equally many for every head.
        ffn: Kept hidden units.
    """

    heads: tuple[int, ...]
    qk: tuple[tuple[int, ...], ...]
    vo: tuple[tuple[int, ...], ...]
    ffn: tuple[int, ...]

    @property
    def shape(self) -> BlockShape:
        """Widths after the cut."""
        qk, vo = (len(dims[0]) if dims else 0 for dims in (self.qk, self.vo))
        return BlockShape(heads=len(self.heads), qk=qk, vo=vo, ffn=len(self.ffn))

    def units(self, kind: Literal["qk", "vo", "ffn"], shape: BlockShape) -> list[int]:
        """Flat indices of the kept units of ``kind`` in a block that now has ``shape``."""
        if kind == "ffn":
            return list(self.ffn)
        width, kept = (shape.qk, self.qk) if kind == "qk" else (shape.vo, self.vo)
        return [h * width + j for h, dims in zip(self.heads, kept, strict=True) for j in dims]


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays of every block. The one thing that everything downstream takes."""

    blocks: tuple[BlockPlan, ...]

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        """Widths after the cut."""
        return tuple(b.shape for b in self.blocks)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists of kept indices, a block each."""
        return [
            {"heads": list(b.heads), "qk": [list(d) for d in b.qk], "vo": [list(d) for d in b.vo], "ffn": list(b.ffn)}
            for b in self.blocks
        ]

    @staticmethod
    def from_json(blocks: Sequence[Mapping[str, Any]]) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: A block lacks a key, has an unknown one, or holds something else than indices.
        """
        return Plan(tuple(_block_plan(i, b) for i, b in enumerate(blocks)))


def _block_plan(index: int, block: Mapping[str, Any]) -> BlockPlan:
    _require_keys(index, block)

    def listed(value: Any, *types: type) -> tuple[Any, ...]:
        if isinstance(value, list | tuple) and all(type(v) in types for v in value):
            return tuple(value)
        raise PlanError(f"block {index} of the plan: kept units must be lists of indices, got {value!r}")

    return BlockPlan(
        heads=listed(block["heads"], int),
        qk=tuple(listed(dims, int) for dims in listed(block["qk"], list, tuple)),
        vo=tuple(listed(dims, int) for dims in listed(block["vo"], list, tuple)),
        ffn=listed(block["ffn"], int),
    )


def _require_keys(index: int, block: Mapping[str, Any]) -> None:
    fields = BlockShape.__dataclass_fields__.keys()
    for key in block:
        if key not in fields:
            raise PlanError(f"block {index} of the plan: unknown key '{key}'; {nearest(key, fields)}")
    missing = [key for key in fields if key not in block]
    if missing:
        raise PlanError(f"block {index} of the plan lacks {missing}; give heads, qk, vo and ffn for every block")


def dense_plan(structure: ModelStructure) -> Plan:
    """The plan that keeps everything."""
    return Plan(tuple(dense_block_plan(s) for s in structure.shapes))


def dense_block_plan(shape: BlockShape) -> BlockPlan:
    """The plan that keeps everything of a block."""
    return BlockPlan(
        heads=tuple(range(shape.heads)),
        qk=(tuple(range(shape.qk)),) * shape.heads,
        vo=(tuple(range(shape.vo)),) * shape.heads,
        ffn=tuple(range(shape.ffn)),
    )


def check_plan(structure: ModelStructure, plan: Plan) -> None:
    """Check that ``plan`` can be carried out on a model of this structure.

    Raises:
        PlanError: Wrong number of blocks, indices out of range, repeated or unordered, heads of unequal
            width, nothing kept, or a kind cut that this model does not allow.
    """
    check_shapes(structure, plan.shapes)
    for i, (block, kept) in enumerate(zip(structure.blocks, plan.blocks, strict=True)):
        shape = block.shape
        groups = [("heads", kept.heads, shape.heads), ("ffn", kept.ffn, shape.ffn)]
        for kind, per_head, width in (("qk", kept.qk, shape.qk), ("vo", kept.vo, shape.vo)):
            if len(per_head) != len(kept.heads) or len({len(dims) for dims in per_head}) != 1:
                raise PlanError(
                    f"block {i}: '{kind}' must list equally many dimensions for each of the {len(kept.heads)} "
                    f"kept heads, got lists of {[len(dims) for dims in per_head]}"
                )
            groups += [(kind, dims, width) for dims in per_head]
        for label, indices, width in groups:
            if list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= width:
                raise PlanError(
                    f"block {i}: '{label}' must be ascending distinct indices from 0 to {width - 1}, got {indices}"
                )


def check_shapes(structure: ModelStructure, shapes: Sequence[BlockShape]) -> None:
    """Check that a model of this structure can be cut down to ``shapes``.

    Raises:
        PlanError: Wrong number of blocks, a width that is no whole number from 1 to the present one, or a kind that
            may not be cut.
    """
    if len(shapes) != len(structure.blocks):
        raise PlanError(f"the plan has {len(shapes)} blocks, the model has {len(structure.blocks)}")
    for i, (block, shape) in enumerate(zip(structure.blocks, shapes, strict=True)):
        if not isinstance(shape, BlockShape):
            raise PlanError(f"block {i} of the plan must be a BlockShape, got {shape!r}")
        for field, kind in (("heads", "head"), ("qk", "qk"), ("vo", "vo"), ("ffn", "ffn")):
            want, have = getattr(shape, field), getattr(block.shape, field)
            if not _is_whole(want):
                raise PlanError(f"block {i}: '{field}' must be a whole number, got {want!r}")
            if not 1 <= want <= have:
                raise PlanError(f"block {i}: '{field}' must be from 1 to {have}, got {want}")
            if want < have and kind not in block.prunable:
                raise PlanError(
                    f"block {i}: '{field}' cannot be cut in this model (allowed here: {sorted(block.prunable)}); "
                    f"keep it at {have}"
                )


def _is_whole(width: object) -> bool:
    return isinstance(width, int) and not isinstance(width, bool)


def shapes_to_json(shapes: Iterable[BlockShape]) -> list[dict[str, int]]:
    """Widths as plain data: what ``plan.json`` holds and a user may edit."""
    return [asdict(s) for s in shapes]


def shapes_from_json(blocks: Sequence[Mapping[str, Any]]) -> tuple[BlockShape, ...]:
    """Read widths back.

    Raises:
        PlanError: No list of tables; a block lacks a key, has an unknown one, or a width is no positive integer.
    """
    if not isinstance(blocks, Sequence) or not all(isinstance(block, Mapping) for block in blocks):
        raise PlanError(f"the plan's widths must be a list of one table a block, got {blocks!r}")
    shapes = []
    for i, block in enumerate(blocks):
        _require_keys(i, block)
        for key, width in block.items():
            if not _is_whole(width) or width < 1:
                raise PlanError(f"block {i} of the plan: '{key}' must be a whole number above 0, got {width!r}")
        shapes.append(BlockShape(**block))
    return tuple(shapes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """An upper bound on a model's cost.

    Attributes:
        kind: What is counted or measured.
        requested: The text it was read from.
        number: The bound: parameters, MACs per image or milliseconds a batch; or a share of the dense model's cost.
        relative: Whether ``number`` is a share.
    """

    kind: BudgetKind
    requested: str
    number: float
    relative: bool

    def bound(self, dense: float) -> float:
        """The bound for a model that now costs ``dense``, whether that leaves anything to cut or not."""
        return dense * self.number if self.relative else self.number

    def limit(self, dense: float) -> float:
        """The same, checked, and whole where it is a count.

        Raises:
            BudgetError: It is not below ``dense``.
        """
        limit = self.bound(dense)
        if not 0 < limit < dense:
            raise BudgetError(
                f"budget '{self.requested}' allows {amount(self.kind, limit)}, the model has "
                f"{amount(self.kind, dense)}; ask for less, and for more than 0"
            )
        return limit if self.kind == "latency" else int(limit)


UNITS: dict[BudgetKind, str] = {"params": "parameters", "macs": "MACs", "latency": "ms a batch"}
"""What each kind of budget is counted in."""


def amount(kind: BudgetKind, cost: float) -> str:
    """A cost in words, such as ``3,997,816 parameters`` or ``8.250 ms a batch``."""
    return f"{cost:,.{3 if kind == 'latency' else 0}f} {UNITS[kind]}"


_BUDGET = re.compile(r"(?P<kind>\w+)=(?P<sign>-?)(?P<number>\d+(?:\.\d+)?)(?P<unit>%|K|M|G|ms|s|)", re.IGNORECASE)
_EXAMPLES: dict[str, str] = {"params": "params=4.0M", "macs": "macs=0.9G", "latency": "latency=8ms"}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_TIMES = {"ms": 1.0, "s": 1e3}


def parse_budget(text: str) -> Budget:
    """Read a budget such as ``params=4.0M``, ``params=-30%``, ``macs=0.9G``, ``macs=60%`` or ``latency=-25%``.

    ``-30%`` takes 30 % off the given model; ``60%`` leaves 60 % of it. K, M and G are powers of 1000; times are given
    in ms or s.

    Raises:
        BudgetError: Unreadable text, an unknown kind, or a bound that no plan can meet or that leaves nothing to cut.
    """
    match = _BUDGET.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise BudgetError(
            f"budget '{text}' cannot be read; write params=4.0M, params=-30%, macs=0.9G, macs=-50%, latency=-25% or "
            "latency=8ms"
        )
    kind, number, unit = match["kind"].lower(), float(match["number"]), match["unit"].lower()
    if kind not in UNITS:
        raise BudgetError(f"budget kind '{kind}' is unknown; {nearest(kind, UNITS)}")
    relative = unit == "%"
    units = _TIMES if kind == "latency" else _COUNTS
    if relative:
        number = (100 - number if match["sign"] else number) / 100
    elif match["sign"]:
        raise BudgetError(f"budget '{text}': a negative number must be a percentage, as in {kind}=-30%")
    elif unit not in units:
        raise BudgetError(f"budget '{text}': a bound on {kind} ends with one of {[u for u in units if u]}, or %")
    else:
        number *= units[unit]
    if relative and not 0 < number < 1:
        raise BudgetError(
            f"budget '{text}' leaves {100 * number:g} % of the model; ask for more than 0 and less than 100 %, as in "
            f"{kind}=-30%"
        )
    if not 0 < number < float("inf"):
        raise BudgetError(f"budget '{text}' must be a finite number above 0, as in {_EXAMPLES[kind]}")
    return Budget(kind=kind, requested=text, number=number, relative=relative)  # type: ignore[arg-type]
