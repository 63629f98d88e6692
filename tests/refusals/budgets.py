"""Budgets that cannot be read or met."""

from __future__ import annotations

from gohsp.errors import BudgetError
from gohsp.structure import parse_budget
from refusals import Refusal

TITLE = "Budgets"


def budget(given: str, text: object, says: str) -> Refusal:
    """A budget as a user writes it."""
    return Refusal(given, lambda _: parse_budget(text), BudgetError, says)  # type: ignore[arg-type]


CASES = (
    budget("a budget of an unknown kind", "parms=-40%", "params"),
    budget("a budget that is no number", "params=small", "small"),
    budget("a budget that is no text", 0.6, "budget '0.6' cannot be read; write params=4.0M"),
    budget("a budget of NaN", "params=nan", "'params=nan' cannot be read"),
    budget("a budget with an exponent", "macs=1e400", "'macs=1e400' cannot be read"),
    budget("more than all taken off", "params=-140%", "leaves -40 % of the model; ask for more than 0"),
    budget("all taken off", "macs=-100%", "leaves 0 % of the model"),
    budget("nothing taken off", "macs=-0%", "leaves 100 % of the model; ask for more than 0 and less than 100 %"),
    budget("a percentage without a minus", "params=40%", "params=-40% removes 40 %; to keep 40 % write params=-60%"),
    budget("a share that is no percentage", "macs=0.6", "macs=-60% removes 60 %, macs=-40% keeps 60 %"),
    budget("no parameters", "params=0", "must be a finite number above 0, as in params=4.0M"),
    budget("no time", "latency=0ms", "must be a finite number above 0, as in latency=8ms"),
    budget("a negative number", "params=-4M", "a negative number must be a percentage, as in params=-30%"),
)
