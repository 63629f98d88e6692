from __future__ import annotations

import pytest

from gohsp.errors import BudgetError
from gohsp.structure import amount, parse_budget

DENSE = {"params": 10_007, "macs": 300_001, "latency": 8.0}


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("params=-30%", "params", int(0.7 * DENSE["params"])),
        (" macs=-12.5% ", "macs", int(0.875 * DENSE["macs"])),
        ("MACS=2k", "macs", 2000),
        ("params=0.0003M", "params", 300),
        ("macs=0.000002G", "macs", 2000),
        ("params=345", "params", 345),
    ],
)
def test_budgets(text: str, kind: str, limit: int) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.limit(DENSE[kind]), budget.requested) == (kind, limit, text)


@pytest.mark.parametrize(("text", "limit"), [("latency=-25%", 6.0), ("latency=7.5ms", 7.5), ("latency=0.002s", 2.0)])
def test_latency_budgets_are_milliseconds(text: str, limit: float) -> None:
    budget = parse_budget(text)
    assert budget.kind == "latency"
    assert budget.limit(8.0) == pytest.approx(limit) == budget.bound(8.0)
    assert budget.bound(1.0) > 0  # a machine that runs faster today than its budget is no error once work is done


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params", "cannot be read; write params=4.0M"),
        ("params=4X", "cannot be read"),
        ("params=4 M", "cannot be read"),
        ("params=+30%", "cannot be read"),
        ("", "cannot be read"),
        (4_000_000, "cannot be read"),
        ("param=-30%", r"'param' is unknown; did you mean 'params'\?"),
        ("speed=-30%", "'speed' is unknown; valid: 'latency', 'macs', 'params'"),
        ("latency=3", r"ends with one of \['ms', 's'\], or %"),
        ("latency=3M", "ends with one of"),
        ("params=3ms", r"ends with one of \['k', 'm', 'g'\], or %"),
        ("params=-4M", "must be a percentage, as in params=-30%"),
        ("params=40%", "params=-40% removes 40 %; to keep 40 % write params=-60%"),
        ("macs=87.5%", "macs=-87.5% removes 87.5 %; to keep 87.5 % write macs=-12.5%"),
        ("Latency=25%", "latency=-25% removes 25 %; to keep 25 % write latency=-75%"),
        ("params=0.6", "params=-60% removes 60 %, params=-40% keeps 60 %"),
        ("params=100%", "leaves 100 % of the model; ask for more than 0 and less than 100 %"),
        ("params=-0%", "leaves 100 %"),
        ("macs=-140%", "leaves -40 %"),
        ("params=-100%", "leaves 0 %"),
        ("params=0", "finite number above 0, as in params=4.0M"),
        ("params=" + "9" * 400, "finite number above 0"),
        ("macs=1G", f"allows 1,000,000,000 MACs, the model has {DENSE['macs']:,} MACs"),
        ("latency=9ms", r"allows 9\.000 ms a batch, the model has 8\.000 ms a batch"),
    ],
)
def test_bad_budgets_say_what_to_write(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        parse_budget(text).limit(DENSE[str(text).partition("=")[0]])


def test_amounts_in_words() -> None:
    assert amount("params", 3_997_816) == "3,997,816 parameters"
    assert amount("macs", 1e9) == "1,000,000,000 MACs"
    assert amount("latency", 8.25) == "8.250 ms a batch"
