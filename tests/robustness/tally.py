"""Counts of outcomes, and the cases that ended wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class Tally:
    """Counts the outcomes of ``total`` cases; says how far it is at every twentieth, and all of it at the end."""

    def __init__(self, what: str, total: int, good: tuple[str, ...], say: Callable[[str], None]) -> None:
        self._what, self._total, self._say = what, total, say
        self._good = dict.fromkeys(good, 0)
        self._bad: Counter[str] = Counter()
        self._cases: list[str] = []

    def add(self, outcome: str, case: str) -> None:
        """Count a case; one whose outcome is not among the good ones is remembered."""
        if outcome in self._good:
            self._good[outcome] += 1
        else:
            self._bad[outcome] += 1
            self._cases.append(f"{outcome}: {case}")
        done = sum(self._good.values()) + self._bad.total()
        if self._total >= 100 and done % (self._total // 20) == 0:
            self._say(f"{done} of {self}")

    def __str__(self) -> str:
        counts = [f"{n} {outcome}" for outcome, n in {**self._good, **self._bad}.items()]
        return f"{self._total} {self._what}: {', '.join(counts)}"

    def require_good(self, note: str = "") -> None:
        """Print the counts; fail if any case ended wrongly, naming the first of each kind."""
        self._say(f"\n{self}{note}")
        shown = [case[:600] for kind in self._bad for case in [c for c in self._cases if c.startswith(kind)][:20]]
        assert not shown, "\n".join([str(self), *shown])
