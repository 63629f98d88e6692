"""Budgets: what a pruned model may cost, as people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gohsp.errors import BudgetError, nearest

BudgetKind = Literal["params", "macs", "latency"]


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
    """Read a budget such as ``params=4.0M``, ``params=-30%``, ``macs=0.9G`` or ``latency=-25%``.

    ``-30%`` takes 30 % off the given model. K, M and G are powers of 1000; times are given in ms or s.

    Raises:
        BudgetError: Unreadable text, an unknown kind, a percentage without a minus, which could be what goes or what
            stays, or a bound that no plan can meet or that leaves nothing to cut.
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
    if relative and not match["sign"] and 0 < number < 100:
        raise BudgetError(
            f"budget '{text}' lacks a minus: {kind}=-{number:g}% removes {number:g} %; to keep {number:g} % write "
            f"{kind}=-{100 - number:g}%"
        )
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
    if not relative and not unit and 0 < number < 1:
        share = f"{100 * number:g}"
        raise BudgetError(
            f"budget '{text}' allows less than one of the {UNITS[kind]}; write a share as what goes, in percent: "
            f"{kind}=-{share}% removes {share} %, {kind}=-{100 * (1 - number):g}% keeps {share} %"
        )
    if not 0 < number < float("inf"):
        raise BudgetError(f"budget '{text}' must be a finite number above 0, as in {_EXAMPLES[kind]}")
    return Budget(kind=kind, requested=text, number=number, relative=relative)  # type: ignore[arg-type]
