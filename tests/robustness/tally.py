"""Counts of outcomes, and the cases that ended wrongly."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable


class Tally:
    """Counts the outcomes of ``total`` cases; says how far it is at every twentieth, and all of it at the end."""

    def __init__(self, what: str, total: int, good: tuple[str, ...], say: Callable[[str], None]) -> None:
        self._what, self._total, self._good, self._say = what, total, good, say
        self._counts = Counter(dict.fromkeys(good, 0))
        self._wrong: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, outcome: str, kind: str, case: str) -> None:
        """Count a case of a kind; one whose outcome is not among the good ones is remembered."""
        self._counts[outcome] += 1
        if outcome not in self._good:
            self._wrong[f"{outcome}: {kind}"].append(case)
        done = self._counts.total()
        if self._total >= 100 and done % (self._total // 20) == 0:
            self._say(f"{done} of {self}")

    def __str__(self) -> str:
        return f"{self._total} {self._what}: {', '.join(f'{n} {outcome}' for outcome, n in self._counts.items())}"

    def require_good(self, note: str = "") -> None:
        """Print the counts; fail if any case ended wrongly, with the first of each outcome and kind."""
        self._say(f"\n{self}{note}")
        wrong = sorted(self._wrong.items())
        assert not wrong, "\n".join([str(self), *(f"{len(cases)} {kind}: {cases[0]:.8000}" for kind, cases in wrong)])
