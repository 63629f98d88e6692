"""What a network costs, and the one bound that an allocation keeps: parameters, MACs or measured time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Protocol

from gohsp.structure.budget import Budget, BudgetKind
from gohsp.structure.network import Absent, Attention, Network, Sublayer, unit_macs, unit_params
from gohsp.structure.widths import AttentionWidths, FfnWidths, SublayerWidths, Widths, is_absent, unit_count


class Cost(Protocol):
    """Something that a network has so much of outside its sub-layers, and so much in each."""

    kind: ClassVar[BudgetKind]

    def fixed(self, network: Network) -> float:
        """What no cut can remove."""
        ...

    def sublayer(self, sub: Sublayer, widths: SublayerWidths) -> float:
        """What ``sub`` costs, cut down to ``widths``."""
        ...


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters."""

    kind: ClassVar[BudgetKind] = "params"

    def fixed(self, network: Network) -> int:
        """Those outside the sub-layers."""
        return network.fixed_params

    def sublayer(self, sub: Sublayer, widths: SublayerWidths) -> int:
        """Those of units, norms, biases and gains; of an absent sub-layer the one vector that is left."""
        if isinstance(sub, Absent) or is_absent(widths):
            return sub.readout.size
        units = sum(unit_count(widths, kind) * unit_params(sub, kind) for kind in widths.unit_kinds)
        owned = sum(s.size for s in sub.owned) * widths.heads if isinstance(sub, Attention) else 0  # type: ignore[union-attr]
        return sub.overhead + units + owned


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulates per image: linear maps and attention's two products of tokens and keys.

    Norms, softmax, biases and activations are not counted.
    """

    kind: ClassVar[BudgetKind] = "macs"

    def fixed(self, network: Network) -> int:
        """Those outside the sub-layers."""
        return network.fixed_macs

    def sublayer(self, sub: Sublayer, widths: SublayerWidths) -> int:
        """Those of units; none where the sub-layer is absent."""
        if isinstance(sub, Absent):
            return 0
        linear = sum(unit_count(widths, kind) * unit_macs(sub, kind) for kind in widths.unit_kinds)
        if not isinstance(sub, Attention):
            return sub.tokens * linear
        pairs = sum(unit_count(widths, kind) for kind in widths.unit_kinds)
        return sub.tokens * (linear + sub.keys * pairs)


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """Measured times of an attention, in milliseconds; never less for a wider one.

    Attributes:
        heads: Measured numbers of heads, ascending.
        qk: Measured query/key widths, ascending.
        vo: Measured value widths, ascending.
        times: Times ``[heads][qk][vo]`` where the two widths differ.
        saving: What a library's own attention saves where they are equal.
    """

    heads: tuple[int, ...]
    qk: tuple[int, ...]
    vo: tuple[int, ...]
    times: tuple[tuple[tuple[float, ...], ...], ...]
    saving: float

    def __call__(self, widths: AttentionWidths) -> float:
        """Time at ``widths``, linear between measured ones."""
        corners = product(
            _between(self.heads, widths.heads), _between(self.qk, widths.qk), _between(self.vo, widths.vo)
        )
        return sum(a * b * c * self.times[i][j][k] for (i, a), (j, b), (k, c) in corners) - self.saved(widths)

    def saved(self, widths: AttentionWidths) -> float:
        """What ``widths`` save by being equal."""
        return self.saving if widths.heads and widths.qk == widths.vo else 0.0


@dataclass(frozen=True, slots=True)
class FfnTimes:
    """Measured times of a feed-forward network, in milliseconds; never less for a wider one.

    Attributes:
        units: Measured numbers of hidden units, ascending.
        times: Times ``[units]``.
    """

    units: tuple[int, ...]
    times: tuple[float, ...]

    def __call__(self, widths: FfnWidths) -> float:
        """Time at ``widths``, linear between measured ones."""
        return sum(share * self.times[i] for i, share in _between(self.units, widths.units))

    def saved(self, _widths: FfnWidths) -> float:
        """Nothing."""
        return 0.0


SublayerTimes = AttentionTimes | FfnTimes


def _between(grid: Sequence[int], value: int) -> list[tuple[int, float]]:
    """The grid points around ``value`` and their weights; outside the grid, its end."""
    above = bisect_left(grid, value)
    if above == 0 or above == len(grid) or grid[above] == value:
        return [(min(above, len(grid) - 1), 1.0)]
    share = (value - grid[above - 1]) / (grid[above] - grid[above - 1])
    return [(above - 1, 1 - share), (above, share)]


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds a batch, measured on one device, at one batch size and precision.

    Attributes:
        outside: What is outside the sub-layers.
        scale: Time of a sub-layer inside the network over its time alone.
        times: Times of the sub-layers, by name. They are those of the network that was measured, and hold for what it
            is cut down to.
    """

    kind: ClassVar[BudgetKind] = "latency"
    outside: float
    scale: float
    times: Mapping[str, SublayerTimes]

    def fixed(self, network: Network) -> float:  # noqa: ARG002 (it was measured)
        """What is outside the sub-layers."""
        return self.outside

    def sublayer(self, sub: Sublayer, widths: SublayerWidths) -> float:
        """Time of ``sub`` inside the network."""
        return 0.0 if is_absent(widths) else self.scale * self.times[sub.name](widths)  # type: ignore[arg-type]


PARAMS, MACS = Params(), Macs()
COUNTED: dict[BudgetKind, Cost] = {"params": PARAMS, "macs": MACS}
"""Costs that need no measurement."""


def cost_of(network: Network, widths: Widths, cost: Cost) -> float:
    """Cost of the whole network cut down to ``widths``: parameters, MACs per image, or milliseconds a batch."""
    return cost.fixed(network) + sum(cost.sublayer(sub, widths[sub.name]) for sub in network.sublayers)


def count_params(network: Network) -> int:
    """Parameters of the network as it is."""
    return int(cost_of(network, network.widths, PARAMS))


def count_macs(network: Network) -> int:
    """Multiply-accumulates per image of the network as it is."""
    return int(cost_of(network, network.widths, MACS))


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound on what a network costs.

    Attributes:
        cost: What is counted or was measured.
        limit: The bound.
    """

    cost: Cost
    limit: float

    def of(self, network: Network, widths: Widths) -> float:
        """Cost of ``network`` cut down to ``widths``."""
        return cost_of(network, widths, self.cost)

    def met(self, network: Network, widths: Widths) -> bool:
        """Whether ``network`` cut down to ``widths`` keeps the bound."""
        return self.of(network, widths) <= self.limit


def bound_for(network: Network, budget: Budget, cost: Cost | None = None) -> Bound:
    """The bound that a budget means for a network.

    Args:
        network: The dense network.
        budget: What was asked for.
        cost: Measured times, for a latency budget; None for what can be counted.

    Raises:
        BudgetError: The bound is not below what the network costs now.
    """
    cost = cost or COUNTED[budget.kind]
    return Bound(cost, budget.limit(cost_of(network, network.widths, cost)))
