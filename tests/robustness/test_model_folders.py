"""A spoilt model folder loads the same or is refused: quickly, in little memory, and without a look elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from robustness.loading import load_all
from robustness.mutations import OTHER, REFUSED, SAME
from robustness.tally import Tally


def test_spoilt_model_folders_load_the_same_or_are_refused(
    model_folders: Path, tmp_path: Path, pytestconfig: pytest.Config, say: Callable[[str], None]
):
    """``--mutations N`` tries the first N cases, ``--mutation N`` case N alone."""
    alone = pytestconfig.getoption("mutation")
    numbers = range(pytestconfig.getoption("mutations")) if alone is None else [alone]
    tally = Tally("spoilt model folders", len(numbers), (SAME, REFUSED, OTHER), say)
    slowest, most = 0.0, 0.0
    for loaded in load_all(numbers, model_folders, tmp_path):
        tally.add(loaded.outcome, loaded.case.name, f"{loaded.case}: {loaded.detail}")
        slowest, most = max(slowest, loaded.seconds), max(most, loaded.megabytes)
    tally.require_good(f"; slowest {slowest:.2f} s, most memory {most:.0f} MB")
