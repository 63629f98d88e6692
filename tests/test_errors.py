"""Every refusal, and the page that lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from refusals import Refusal, all_refusals, message_of

CASES = [case for cases in all_refusals().values() for case in cases]
PAGE = Path(__file__).parents[1] / "docs" / "errors.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.given)
def test_bad_input_is_refused_by_one_clear_error(case: Refusal, tmp_path: Path) -> None:
    assert case.says in message_of(case, tmp_path)


def test_the_page_lists_every_refusal_and_no_other() -> None:
    rows = [line.strip("| ").split(" | ", 2) for line in PAGE.read_text(encoding="utf-8").splitlines()]
    listed = {cells[0]: cells[1:] for cells in rows if len(cells) == 3 and cells[1].startswith("`")}
    assert listed.keys() == {case.given for case in CASES}, "run make errors"
    for case in CASES:
        error, message = listed[case.given]
        assert error == f"`{case.error.__name__}`"
        assert case.says.replace("|", "\\|") in message
