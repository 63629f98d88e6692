"""Budgets that cannot be read or met."""

from __future__ import annotations

import gohsp
from gohsp.errors import BudgetError
from refusals import Refusal

TITLE = "Budgets"

CASES = (
    Refusal("a budget of an unknown kind", lambda _: gohsp.parse_budget("parms=-40%"), BudgetError, "params"),
    Refusal("a budget that is no number", lambda _: gohsp.parse_budget("params=small"), BudgetError, "small"),
)
